"""The loss that candidates are compared by is the error that the layer would really make."""

from dataclasses import replace

import pytest
import torch

from mqat.calibration.scale_search import InputStatistics, best_candidate, shard_losses
from mqat.calibration.smoothquant import smoothquant_scale
from mqat.quant.algorithm import named_scheme
from mqat.quant.formats import FP8_E4M3, INT4, INT8_MIN128
from mqat.quant.granularity import PerGroup, PerTensor, PerToken
from mqat.quant.qparams import rounded
from mqat.quant.scheme import TensorScheme

WEIGHT = TensorScheme(INT4, PerGroup(8))
INPUT = TensorScheme(INT8_MIN128, PerTensor())


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=generator)
    x[:, 3] *= 50  # an outlier channel
    weight = torch.randn(16, 32, generator=generator)
    inputs = InputStatistics((x.t() @ x).double(), x.abs().amax(dim=0), len(x))
    scales = torch.stack([torch.ones(32), smoothquant_scale(inputs.amax, torch.ones(32), 0.5)])
    return x, weight, inputs, scales


def test_weight_losses_are_the_output_errors(layer):
    x, weight, inputs, scales = layer
    losses = shard_losses(weight.chunk(2), inputs, scales, WEIGHT, None)
    weight = weight[::8]
    assert losses.shape == (2, 2)
    for scale, found in zip(scales, losses.sum(dim=1), strict=True):
        deployed = rounded(weight * scale, WEIGHT) / scale
        actual = (x.double() @ (deployed - weight).t().double()).square().sum()
        torch.testing.assert_close(found, actual, rtol=1e-4, atol=0)


def test_input_losses_are_near_the_output_errors(layer):
    x, weight, inputs, scales = layer
    losses = shard_losses([weight], inputs, scales, None, INPUT).sum(dim=1)
    weight = weight[::8]
    for scale, found in zip(scales, losses, strict=True):
        error = rounded(x / scale, INPUT) - x / scale
        actual = (error @ (weight * scale).t()).double().square().sum()
        assert float(found) == pytest.approx(float(actual), rel=0.3)
    assert best_candidate(losses[:, None]) == 1  # moving the outlier pays
    for exact in (TensorScheme(FP8_E4M3, PerTensor()),
                  TensorScheme(INT8_MIN128, PerToken(), is_dynamic=True)):  # fmt: skip
        assert not shard_losses([weight], inputs, scales, None, exact).any()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_losses_of_inputs_in_blocks_say_what_a_candidate_gains(layer, name):
    """An outlier makes the steps of its own block wide: what it costs the others is what is compared."""
    x, weight, inputs, scales = layer
    operand = named_scheme(name).input
    found = shard_losses([weight], inputs, scales, None, operand).sum(dim=1)
    actual = []
    for scale in scales:
        error = rounded(x / scale, replace(operand, is_dynamic=False)) - x / scale
        error[:, 3] = 0  # the outlier's own, in proportion to itself
        actual.append(float((error @ (weight[::8] * scale).t()).double().square().sum()))
    assert float(found[0] - found[1]) == pytest.approx(actual[0] - actual[1], rel=0.4)
    assert best_candidate(found[:, None]) == 1


def test_ties_keep_the_first_candidate():
    assert best_candidate(torch.tensor([[2.0, 1], [1, 2], [3, 3]])) == 0
