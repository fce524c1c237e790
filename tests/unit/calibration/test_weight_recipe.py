"""Every linear goes through its own recipe, and what was searched is what is frozen."""

import pytest
import torch

from mqat.calibration.mse import MSE
from mqat.checkpoints.random_weights import RandomWeights
from mqat.models.structure import DENSE_LINEARS, FC1, FC2, in_layer
from mqat.quant.qparams import frozen_qparams, statistic_of
from mqat.specs.policy import Policy, Rule
from tests.unit.model_fixtures import MODEL, microbatches

FC2_OF_1 = in_layer(1, FC2.name)


@pytest.fixture
def carried_out(world):
    """`carried_out(policy)`: weights before and linears after, calibrated with their recipes."""
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.calibration.weight_recipe import apply_weight_recipe_
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.config import ModelConfig
    from mqat.evaluation.forward import evaluate
    from mqat.parallel.linear import quantized_linears
    from mqat.specs.model import build_model

    def run(policy, change_=lambda weight: None, at_once=0):
        algorithms = policy.resolve(MODEL)
        chunks = build_model(MODEL, ModelConfig(), policy.schemes(MODEL), torch.float32)
        load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.1))
        linears = quantized_linears(chunks)
        for linear in linears.values():
            change_(linear.weight.data)
        before = {name: linear.weight.detach().clone() for name, linear in linears.items()}
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        qparams, _ = apply_weight_recipe_(
            chunks, lambda: evaluate(chunks, [microbatches()]),
            {name: algorithm.recipe for name, algorithm in algorithms.items()},
            model=MODEL, group=group, calib_layers_at_once=at_once,
            dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )  # fmt: skip
        calibrate(
            chunks, lambda: evaluate(chunks, [microbatches()]), group=group, weight_qparams=qparams
        )
        return before, linears, qparams

    return run


def changed(before, linears) -> set[str]:
    """Names of linears whose weight is another one now."""
    return {
        name
        for name, linear in linears.items()
        if not torch.equal(linear.weight.detach(), before[name])
    }


@pytest.mark.parametrize("at_once", [0, 1])
def test_a_rule_with_awq_carries_out_awq_on_its_linears_alone(carried_out, at_once):
    rules = (Rule(f"*.{FC2.name}", "int4_awq"),)
    before, linears, qparams = carried_out(Policy("int8", 64, rules), at_once=at_once)
    fc2 = {in_layer(i, FC2.name) for i in range(2)}
    taking_up = {in_layer(i, FC1.name) for i in range(2)}  # its up rows
    assert changed(before, linears) == fc2 | taking_up
    assert qparams.keys() == fc2
    for name in fc2:
        quantizer = linears[name].weight_quantizer
        assert torch.equal(quantizer.scale, qparams[name]["scale"])
        plain = frozen_qparams(
            statistic_of(linears[name].weight, quantizer.scheme), quantizer.scheme
        )
        assert not torch.equal(quantizer.scale, plain["scale"])  # the clip search chose others
    *_, nothing = carried_out(Policy("int8", 64, (Rule(f"*.{FC2.name}", "int4"),)))
    assert not nothing  # control


def test_a_default_of_awq_leaves_linears_alone_that_rules_make_int8(carried_out):
    rules = (Rule(f"*.{FC2.name}", "int8"),)
    before, linears, qparams = carried_out(Policy("int4_awq", 64, rules))
    assert not any(name.endswith(FC2.name) for name in qparams)
    others = {in_layer(i, x.name) for i in range(2) for x in DENSE_LINEARS if x != FC2}
    assert qparams.keys() == others  # a search may leave a linear as it is
    assert set() < changed(before, linears) <= others


@pytest.mark.parametrize("calibrator", ["max", "mse", "awq"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_two_level_weights_are_frozen_with_the_scales_of_their_search(
    carried_out, calibrator, rounding
):
    def with_a_poor_maximum(weight):
        # In units of amax / 6, 15 fives between the values 4 and 6: another maximum is better.
        weight[0, :16] = 0.5
        weight[0, 0] = 0.6

    policy = Policy("nvfp4", recipe={"weight_calibrator": calibrator, "rounding": rounding})
    before, linears, _ = carried_out(policy, with_a_poor_maximum)
    for name, linear in linears.items():
        quantizer, weight = linear.weight_quantizer, linear.weight.detach()
        original = before[name].abs().amax() / torch.tensor(6 * 448.0)
        room = 1.0 if calibrator == "max" else MSE.headroom
        torch.testing.assert_close(quantizer.global_scale[0], original * room)
        if calibrator != "max":
            assert abs(float(quantizer.scale[0, 0]) * 6 - 0.6) > 0.06  # control: not the maximum's
        if rounding == "gptq":
            assert torch.equal(quantizer(weight), weight), name
    assert (rounding == "gptq") == bool(changed(before, linears))
