"""Experts with and without tokens: forward, backward, scales; what is not built for them is refused."""

from dataclasses import replace

import pytest
import torch

from mqat.errors import UserError
from mqat.specs.policy import Policy, Rule
from tests.distributed.worker import EXPERTS
from tests.unit.model_fixtures import microbatches

SCHEMES = ("int8", "int8_pc_pt", "int4", "fp8", "fp8_pc_pt", "nvfp4", "8da4w", "w4a8_awq", "null")
IDLE = "decoder.layers.0.mlp.experts.3.linear_fc"
AWAY = torch.tensor([0.0, 0.0, 0.0, -1e4])


def calibrated(algorithm, *, idle=True, method="max"):
    """(DDP-wrapped chunks, names of idle linears) of a tiny mixture, without a token for expert 3."""
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.checkpoints.random_weights import RandomWeights
    from mqat.config import ModelConfig
    from mqat.evaluation.forward import run_layers
    from mqat.specs.model import build_model
    from mqat.training.optimizer import wrap_for_training

    rules = (
        (Rule("*.mlp.experts.*", operands=OPERANDS[algorithm]),) if algorithm in OPERANDS else ()
    )
    policy = Policy("null" if rules else algorithm, None if algorithm == "null" else 32, rules)
    layers = policy.schemes(EXPERTS)
    chunks = build_model(EXPERTS, ModelConfig(), layers, torch.float32)
    load_pretrained_(chunks, RandomWeights(EXPERTS, 1, 0.1))
    router = chunks[0].decoder.layers[0].mlp.router
    if idle:
        gating = router.gating
        router.gating = lambda x: gating(x) + AWAY
    chunks = wrap_for_training(chunks)
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    found = calibrate(
        chunks, lambda: run_layers(chunks, [microbatches()]), group=group, method=method
    )
    return chunks, found


# W4A8 by its operands: its own name promises a recipe.
OPERANDS = {
    "w4a8_awq": {
        "weight": {"format": "int4", "granularity": "group:32", "scale": "bfloat16"},
        "input": {"format": "fp8_e4m3", "granularity": "tensor"},
    }
}


@pytest.mark.parametrize("algorithm", SCHEMES)
def test_an_expert_without_tokens_trains_with_gradients_of_zero(world, algorithm):
    from mqat.parallel.linear import quantized_linears
    from mqat.training.step import forward_backward

    chunks, idle = calibrated(algorithm)
    has_input = algorithm not in ("null", "int4")
    assert idle == ([f"{IDLE}1", f"{IDLE}2"] if has_input else [])
    loss, tokens = forward_backward(chunks, microbatches())
    assert tokens == 128 and torch.isfinite(torch.tensor(loss))
    for name, linear in quantized_linears(chunks).items():
        assert linear.weight.main_grad.isfinite().all()
        assert bool(linear.weight.main_grad.any()) != name.startswith(IDLE), name
    router = chunks[0].module.decoder.layers[0].mlp.router.weight
    assert router.main_grad.any()


@pytest.mark.parametrize("backward", ["int8", "fp8"])
def test_gradients_in_8_bits_of_no_tokens_are_zero_too(world, backward):
    from mqat.parallel.linear import quantized_linears
    from mqat.parallel.low_precision_backward import set_backward_
    from mqat.training.step import forward_backward

    chunks, _ = calibrated(backward)
    set_backward_(chunks, backward)
    forward_backward(chunks, microbatches())
    for name, linear in quantized_linears(chunks).items():
        assert bool(linear.weight.main_grad.any()) != name.startswith(IDLE), name


@pytest.mark.parametrize("method", ["max", "percentile", "mse"])
def test_an_idle_expert_takes_the_largest_input_scale_of_its_layer(world, method):
    from mqat.parallel.linear import quantized_linears

    chunks, idle = calibrated("int8", method=method)
    linears = quantized_linears(chunks)
    assert idle == [f"{IDLE}1", f"{IDLE}2"]
    for kind in ("linear_fc1", "linear_fc2"):
        names = [f"decoder.layers.0.mlp.experts.{n}.{kind}" for n in range(4)]
        *others, own = [linears[name].input_quantizer.scale for name in names]
        assert torch.equal(own, torch.stack(others).amax(dim=0))
        assert len({float(scale) for scale in others}) > 1  # each has its own
    weight, other = (linears[f"decoder.layers.0.mlp.experts.{n}.linear_fc1"] for n in (3, 0))
    own = weight.weight.detach().abs().amax(dim=1) / 127
    assert torch.allclose(weight.weight_quantizer.scale, own, rtol=1e-4)
    assert not torch.equal(weight.weight_quantizer.scale, other.weight_quantizer.scale)
    _, none = calibrated("int8", idle=False)
    assert none == []  # control


def test_what_is_not_built_for_experts_is_refused_by_name():
    for pattern in ("decoder.layers.0.mlp.router", "*.router", "*router*"):
        with pytest.raises(UserError, match="names routers, which are never quantized"):
            Policy("int8", rules=(Rule(pattern, "int8"),)).resolve(EXPERTS)
    wide = Policy("null", rules=(Rule("*.mlp.*", "int4"),)).resolve(EXPERTS)
    assert len(wide) == 2 * 8 and all(".experts." in name for name in wide)
    with pytest.raises(UserError, match="has no output to quantize"):
        operands = {"weight": {"format": "int8", "granularity": "channel"},
                    "output": {"format": "int8", "granularity": "tensor"}}  # fmt: skip
        Policy("null", rules=(Rule("*.experts.*", operands=operands),)).resolve(EXPERTS)


def test_sizes_that_no_mixture_has_are_refused():
    for changes, message in (
        ({"num_experts": 0, "experts_per_token": 0}, "has experts in every layer"),
        ({"family": "llama"}, "a llama model has none"),
        ({"experts_per_token": 5}, "more experts than there are"),
        ({"experts_per_token": 1, "normalizes_expert_weights": True}, "weight is always 1"),
    ):
        with pytest.raises(UserError, match=message):
            replace(EXPERTS, **changes)
