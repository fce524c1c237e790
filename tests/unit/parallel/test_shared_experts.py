"""Shared experts, corrected routers, dense layers: what is quantized, what stays, what is refused."""

from dataclasses import replace

import pytest
import torch

from mqat.calibration.check_recipes import check_recipes
from mqat.config import ModelConfig
from mqat.errors import UserError
from mqat.specs.policy import Policy, Rule
from tests.distributed.worker import CORRECTED, SHARED
from tests.unit.model_fixtures import microbatches

ROUTER = "decoder.layers.1.mlp.router"


def built(model, *, rate=0.0, dtype=torch.float32, algorithm="null"):
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.checkpoints.random_weights import RandomWeights
    from mqat.specs.model import build_model

    settings = ModelConfig(moe_router_bias_update_rate=rate)
    chunks = build_model(model, settings, Policy(algorithm).schemes(model), dtype)
    load_pretrained_(chunks, RandomWeights(model, 1, 0.1))
    return chunks


@pytest.mark.parametrize("rate", [0.0, 1e-3])
def test_a_correction_is_in_float32_and_moves_where_it_is_asked_to(world, rate):
    from mqat.checkpoints.random_weights import RandomWeights
    from mqat.training.optimizer import wrap_for_training
    from mqat.training.step import forward_backward

    chunks = built(CORRECTED, rate=rate, dtype=torch.bfloat16)
    bias = chunks[0].get_buffer(f"{ROUTER}.expert_bias")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    before = RandomWeights(CORRECTED, 1, 0.1).read(name, slice(None))
    assert bias.dtype == torch.float32 and torch.equal(bias, before)
    forward_backward(wrap_for_training(chunks), microbatches())
    moved = (bias - before).abs()
    if rate:
        assert float(moved.max()) == pytest.approx(rate, rel=1e-3)
    else:
        assert torch.equal(bias, before)


def test_another_correction_sends_tokens_to_other_experts(world):
    from mqat.evaluation.forward import logits

    chunks, tokens = built(CORRECTED), torch.arange(32)[None]
    before = logits(chunks, tokens)
    chunks[0].get_buffer(f"{ROUTER}.expert_bias").copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    assert float((logits(chunks, tokens) - before).abs().max()) > 1e-3


def test_shared_experts_are_quantized_and_what_chooses_is_not():
    for model, layers in ((SHARED, (0, 1)), (CORRECTED, (1, 2, 3))):
        own = {
            f"decoder.layers.{i}.mlp.shared_experts.linear_fc{n}" for i in layers for n in (1, 2)
        }
        assert (
            set(Policy("null", rules=(Rule("*.shared_experts.*", "int8"),)).resolve(model)) == own
        )
        assert own < set(Policy("int8").resolve(model))
        experts = Policy("null", rules=(Rule("*.mlp.experts.*", "int4"),), group_size=32)
        assert len(experts.resolve(model)) == len(layers) * 2 * model.num_experts
    dense = set(Policy("int8").resolve(CORRECTED))
    assert "decoder.layers.0.mlp.linear_fc1" in dense
    assert "decoder.layers.1.mlp.linear_fc1" not in dense
    assert "decoder.layers.0.mlp.experts.0.linear_fc1" not in dense
    for pattern, kind in (
        ("*.mlp.router", "routers"), ("*.gate_weight", "gates of experts"), ("*.router.*", "gates"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"names {kind}.*never quantized"):
            Policy("int8", rules=(Rule(pattern, "int8"),)).resolve(SHARED)


def test_an_input_that_shared_experts_read_too_is_not_rescaled():
    found = Policy("int8_sq").resolve(CORRECTED)
    recipes = {name: a.recipe for name, a in found.items()}
    name = "decoder.layers.1.mlp.shared_experts.linear_fc1"
    with pytest.raises(UserError, match="its input also feeds"):
        check_recipes(recipes, {name: found[name].scheme.weight}, CORRECTED)
    for alone in (
        "decoder.layers.0.mlp.linear_fc1", "decoder.layers.1.mlp.shared_experts.linear_fc2",
    ):  # fmt: skip
        check_recipes(recipes, {alone: found[alone].scheme.weight}, CORRECTED)


def test_what_a_description_does_not_say_is_noticed(world):
    from mqat.checkpoints.describe import check_description, describe_model

    for model in (SHARED, CORRECTED):
        chunks = built(model)
        assert replace(describe_model(chunks), token_ids={}) == model
    for changes, message in (
        ({"expert_weight_scale": 1.0}, "moe_router_topk_scaling_factor=1.5"),
        ({"expert_groups": 1}, "moe_router_num_groups=2"),
        ({"dense_layers": ()}, "layers without experts are"),
        ({"shared_intermediate_size": 64}, "moe_shared_expert_intermediate_size=128"),
        ({"normalizes_heads": False}, "qk_layernorm=True"),
    ):
        with pytest.raises(UserError, match=message):
            check_description(chunks, replace(CORRECTED, **changes))


def test_a_layer_spec_for_all_layers_is_not_enough_beside_dense_ones(world):
    from mqat.specs.backend import gpt_layer_spec
    from mqat.specs.model import build_model

    spec = gpt_layer_spec(CORRECTED.norms, num_experts=CORRECTED.num_experts)
    with pytest.raises(UserError, match=r"layers \[0\] have no experts; give a spec for them"):
        build_model(CORRECTED, ModelConfig(), {}, torch.float32, layer_spec=spec)
    both = {"layer_spec": spec, "dense_layer_spec": gpt_layer_spec(CORRECTED.norms)}
    build_model(CORRECTED, ModelConfig(), {}, torch.float32, **both)


def test_sizes_that_no_such_mixture_has_are_refused():
    for changes, message in (
        ({"shared_intermediate_size": 0}, "has a shared expert in each layer with experts"),
        ({"shared_intermediate_size": 96}, "no multiple of expert_intermediate_size=64"),
        ({"dense_layers": (1,)}, "must be the first ones"),
        ({"dense_layers": (0, 1, 2, 3)}, "has experts somewhere"),
        ({"experts_per_token": 3, "expert_groups": 4, "expert_groups_per_token": 3}, "best two scores"),
        ({"normalizes_expert_weights": False}, "by their sum, always"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            replace(CORRECTED, **changes)
    with pytest.raises(UserError, match="has no shared experts"):
        replace(SHARED, family="qwen3_moe", biases=())
    with pytest.raises(UserError, match=r"model.expert_weight_scale=2.0.*cannot say that"):
        replace(SHARED, expert_weight_scale=2.0)
