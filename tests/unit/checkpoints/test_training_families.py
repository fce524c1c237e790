"""Training checkpoints of families that differ from Llama, described by a Hugging Face directory."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mqat.checkpoints.source import open_pretrained
from mqat.config import ModelConfig
from mqat.errors import UserError
from mqat.models.hf_keys import hf_shapes
from tests.unit.models.hf_models import imported, transformers_model

NAMES = ("nemotron-biased-tied", "starcoder2", "gpt2-untied", "phi3", "chatglm", "gemma")
EVERYTHING = slice(None)


def save(path: Path, chunk: Any, *, layout: str, args: dict[str, Any] | None = None) -> Path:
    """As Megatron-LM: layers stacked, or numbered with gate and up apart; or NeMo 1's state dicts."""
    from megatron.core import dist_checkpointing

    path.mkdir(parents=True)
    if layout == "ranks":
        tensors = {k: v for k, v in chunk.state_dict().items() if isinstance(v, torch.Tensor)}
        (path / "mp_rank_00").mkdir()
        torch.save(
            {f"model.{k}": v for k, v in tensors.items()},
            path / "mp_rank_00" / "model_weights.ckpt",
        )
        return path
    is_apart = layout == "halves"
    metadata = {"non_homogeneous_layers": is_apart, "singleton_local_shards": is_apart}
    state = {"model": chunk.sharded_state_dict(prefix="module.", metadata=metadata)}
    if args is not None:
        state["args"] = argparse.Namespace(**args)
    dist_checkpointing.save(state, str(path))
    return path


def check_tensors(source: Any, hf: Path) -> None:
    """Every tensor is the directory's to the bit, and so are pieces of it."""
    stored = load_file(hf / "model.safetensors")
    for name, shape in hf_shapes(source.config).items():
        wanted = stored[name]
        assert tuple(wanted.shape) == shape
        columns = EVERYTHING if wanted.dim() > 1 else None
        assert torch.equal(source.read(name, EVERYTHING, columns), wanted), name
        rows = slice(len(wanted) // 3, len(wanted) - 2)
        cut = (rows, slice(5, 17)) if wanted.dim() > 1 else (rows,)
        assert torch.equal(source.read(name, *cut), wanted[cut]), name


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_directory(name, world, tmp_path):
    hf = tmp_path / "hf"
    transformers_model(name).save_pretrained(hf)
    _, chunk = imported(hf)
    for layout in ("stacked", "halves"):
        path = save(tmp_path / layout, chunk, layout=layout)
        check_tensors(open_pretrained(path, config_from=hf), hf)
    with torch.no_grad():
        chunk.decoder.layers[1].mlp.linear_fc2.weight += 1
    changed = open_pretrained(save(tmp_path / "other", chunk, layout="stacked"), config_from=hf)
    with pytest.raises(AssertionError, match="1"):  # control
        check_tensors(changed, hf)


NEMOTRON = {
    "mcore_gpt": True, "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 24,
    "num_attention_heads": 4, "num_query_groups": 2, "encoder_seq_length": 64, "bias": True,
    "normalization": "layernorm1p", "activation": "squared-relu", "layernorm_epsilon": 1e-5,
    "position_embedding_type": "rope", "rotary_base": 5000.0, "rotary_percentage": 0.5,
    "share_embeddings_and_output_weights": True,
}  # fmt: skip


def test_a_nemotron_of_nemo_1_is_read(world, tmp_path):
    """Its state dicts, and what its model_config.yaml says, compared with the directory."""
    hf = tmp_path / "hf"
    transformers_model("nemotron-biased-tied").save_pretrained(hf)
    _, chunk = imported(hf)
    path = save(tmp_path / "nemo", chunk, layout="ranks")
    for changes, message in (
        ({}, None), ({"normalization": "layernorm"}, "zero_centered_gamma=False"),
        ({"activation": "gelu"}, "activation='gelu', but .* is relu2"),
        ({"rotary_percentage": 1.0}, "rotary_percentage=1.0, but"),
    ):  # fmt: skip
        (path / "model_config.yaml").write_text(yaml.safe_dump(NEMOTRON | changes))
        if message is None:
            described = open_pretrained(path, config_from=hf)
            check_tensors(described, hf)
            alone = open_pretrained(
                path
            ).config  # which has no ids of tokens, and padding in its table
            same = {"vocab_size": alone.vocab_size, "token_ids": {}}
            assert replace(described.config, **same) == alone
            continue
        with pytest.raises(UserError, match=message):
            open_pretrained(path, config_from=hf)


GPT = {
    "num_layers": 2, "hidden_size": 60, "ffn_hidden_size": 96, "num_attention_heads": 4,
    "kv_channels": 15, "max_position_embeddings": 64, "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm", "norm_epsilon": 1e-5, "swiglu": False, "openai_gelu": True,
    "rotary_base": 500000, "add_bias_linear": True, "untie_embeddings_and_output_weights": False,
    "padded_vocab_size": 128,
}  # fmt: skip


@pytest.fixture
def gpt(world, tmp_path):
    """Megatron's own GPT with its own layer spec, saved with the arguments of a run; its directory."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.utils import openai_gelu

    torch.manual_seed(0)
    same = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")
    config = TransformerConfig(
        **{key: GPT[key] for key in same}, normalization="LayerNorm", activation_func=openai_gelu,
        hidden_dropout=0.0, attention_dropout=0.0, masked_softmax_fusion=False,
        bias_dropout_fusion=False, bias_activation_fusion=False,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="LayerNorm"), vocab_size=128,
        max_sequence_length=64, share_embeddings_and_output_weights=True,
        position_embedding_type="learned_absolute",
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    transformers_model("gpt2").save_pretrained(tmp_path / "hf")
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(described | {"vocab_size": 128}))
    return save(tmp_path / "iteration", model, layout="stacked", args=GPT), model.eval()


def test_megatrons_gpt_gives_megatrons_logits(gpt, tmp_path):
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.evaluation.forward import logits
    from mqat.specs.model import build_model

    path, model = gpt
    source = open_pretrained(path, config_from=tmp_path / "hf")
    assert open_pretrained(path).config == replace(source.config, token_ids={})
    assert source.config.family == "gpt2" and source.config.tie_word_embeddings
    chunks = build_model(source.config, ModelConfig(), {}, torch.float32)
    load_pretrained_(chunks, source)
    tokens = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(24, 24, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        expected = model(tokens, torch.arange(24).expand(2, 24), mask)
    found = logits(chunks, tokens)
    assert (found - expected).abs().max() <= 1e-4
    assert (found[:, 1:] - expected[:, :-1]).abs().max() > 0.1  # control


def test_layer_norms_without_a_family_are_refused(gpt):
    """Without a description: no family has a squared ReLU between them, or rotary positions."""
    path, _ = gpt
    for changes in (
        {"openai_gelu": False, "squared_relu": True}, {"openai_gelu": False, "bias_gelu_fusion": False},
        {"position_embedding_type": "rope", "rotary_base": 10000, "rotary_percent": 0.5},
        {"apply_layernorm_1p": True}, {"position_embedding_type": "none"},
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"must be|is not supported"):
            open_pretrained(with_args(path, GPT | changes))


def with_args(path: Path, args: dict[str, Any]) -> Path:
    common = torch.load(path / "common.pt", weights_only=False)
    torch.save(common | {"args": argparse.Namespace(**args)}, path / "common.pt")
    return path


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"openai_gelu": False, "squared_relu": True}, "squared_relu=True, but .* gelu_tanh"),
        (
            {"openai_gelu": False, "bias_gelu_fusion": False},
            "bias_gelu_fusion=False, .*by the error",
        ),
        ({"swiglu": True}, "the activation is gelu_tanh"),
        ({"normalization": "RMSNorm"}, "normalization='RMSNorm', but .* norms are LayerNorm"),
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p=True"),
        (
            {"position_embedding_type": "rope"},
            "embedding_type='rope', but .* positions are learned",
        ),
        ({"num_layers": 3}, "num_layers=3, but"),
    ],
)
def test_a_run_that_contradicts_the_directory_is_refused(gpt, tmp_path, args, message):
    path, _ = gpt
    open_pretrained(path, config_from=tmp_path / "hf")  # control
    with pytest.raises(UserError, match=message):
        open_pretrained(with_args(path, GPT | args), config_from=tmp_path / "hf")


def test_positions_of_parts_and_pairs_are_compared(world, tmp_path):
    """ChatGLM turns neighbouring channels of half a head."""
    hf = tmp_path / "hf"
    transformers_model("chatglm").save_pretrained(hf)
    _, chunk = imported(hf)
    said = {"rotary_percent": 0.5, "rotary_interleaved": True, "swiglu": True}
    for args, message in (
        (said, None), (said | {"rotary_percent": 1.0}, "rotary_percent=1.0, but"),
        (said | {"rotary_interleaved": False}, "rotary_interleaved=False, but"),
    ):  # fmt: skip
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        path = save(tmp_path / "c", chunk, layout="stacked", args=args)
        if message is None:
            check_tensors(open_pretrained(path, config_from=hf), hf)
            continue
        with pytest.raises(UserError, match=message):
            open_pretrained(path, config_from=hf)
