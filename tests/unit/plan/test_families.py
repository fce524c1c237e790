"""What `mqat plan` says of families that differ from Llama."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mqat.checkpoints.hf_config import decoder_config
from mqat.config import ModelConfig, load_config
from mqat.errors import UserError
from mqat.models.schemes import linear_schemes
from mqat.plan import run
from mqat.plan.step_model import H100, estimate, linear_kernels, modelled_step
from mqat.quant.algorithm import named_scheme
from mqat.specs.policy import Policy
from tests.unit.checkpoints import malformed_sources
from tests.unit.checkpoints.malformed_families import NEWER, good


def model_of(family):
    config = good(family).config if family in NEWER else malformed_sources.good(family).config
    return replace(decoder_config(config), vocab_size=128)  # no padding


@pytest.mark.parametrize("family", NEWER)
def test_the_estimate_counts_every_parameter_that_is_built(world, family):
    from mqat.specs.model import build_model

    model, settings = model_of(family), ModelConfig()
    (chunk,) = build_model(model, settings, {}, torch.float32)
    built = sum(parameter.numel() for parameter in chunk.parameters())
    assert sum(run.rank_parameters(model, settings)) == built


def test_what_is_whole_on_every_rank_is_not_divided():
    model = model_of("gpt2")
    settings = ModelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    hidden, inner, layers = model.hidden_size, model.intermediate_size, model.num_layers
    cut = layers / 2 * (4 * hidden * hidden + 3 * hidden + 2 * hidden * inner + inner) / 2
    whole = layers / 2 * (2 * hidden + 4 * hidden) + 2 * hidden / 2  # biases, norms; the last one
    tables = 128 * hidden / 2 + model.max_position_embeddings * hidden
    assert run.rank_parameters(model, settings) == (cut + whole + tables, 0)


def test_capped_scores_are_refused_with_transformer_engine_before_anything_is_built(monkeypatch):
    config = load_config(
        None,
        ["model.data.packaged=python_docs", "model.transformer_engine=true", "export.format=null"],
    )
    model = replace(model_of("gemma2"), sliding_window=4096, max_position_embeddings=1024)
    monkeypatch.setattr(run, "read_source", lambda *_: (model, None))
    monkeypatch.setattr(run, "_check_decoder", lambda *_: None)
    with pytest.raises(UserError, match=r"transformer_engine=true: .* cap scores at 50"):
        run.make_plan(config, world_size=1)
    config.model.transformer_engine = False
    assert run.make_plan(config, world_size=1).model == model  # control


def modelled(family):
    model = replace(
        model_of(family), hidden_size=4096, intermediate_size=8192, num_attention_heads=32,
        num_query_groups=32, head_dim=128,
    )  # fmt: skip
    config = load_config(None, ["model.data.seq_length=4096"])
    layers = linear_schemes(Policy("int8").schemes(model))
    plan = SimpleNamespace(model=model, layers=layers, config=config, data_parallel=1)
    return model, config.model, next(iter(modelled_step(plan).values()))


@pytest.mark.parametrize(("family", "is_swiglu"), [("gemma", False), ("mistral", True)])
def test_only_swiglu_is_modelled_as_a_part_of_the_linear_behind_it(family, is_swiglu):
    model, settings, text = modelled(family)
    tokens = settings.micro_batch_size * 4096
    pairs = [
        tuple(
            linear_kernels(scheme, tokens, *linear.shape(model), is_activated=is_last)
            for scheme in (named_scheme("int8"), None)
        )
        for linear in model.linears
        for is_last in (is_swiglu and linear.activation is not None,)
    ] * model.num_layers
    found = estimate(pairs, settings.global_batch_size // settings.micro_batch_size, H100)
    told = f"forward {found.forward:.2f}, backward {found.backward:.2f}"
    assert text.startswith(f"{found.ratio:.2f} of BF16 (linears: {told};")
