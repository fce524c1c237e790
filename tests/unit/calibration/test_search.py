"""The loss that candidates are compared by is the error that the layer would really make."""

import pytest
import torch

from mqat.calibration.search import (
    InputStatistics,
    best_candidate,
    smoothquant_scale,
    tile_losses,
)
from mqat.calibration.smoothing_pairs import round_scale
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
    losses = tile_losses(weight.chunk(2), inputs, scales, WEIGHT, None)
    weight = weight[::8]
    assert losses.shape == (2, 2)
    for scale, found in zip(scales, losses.sum(dim=1), strict=True):
        deployed = rounded(weight * scale, WEIGHT) / scale
        actual = (x.double() @ (deployed - weight).t().double()).square().sum()
        torch.testing.assert_close(found, actual, rtol=1e-4, atol=0)


def test_input_losses_are_near_the_output_errors(layer):
    x, weight, inputs, scales = layer
    losses = tile_losses([weight], inputs, scales, None, INPUT).sum(dim=1)
    weight = weight[::8]
    for scale, found in zip(scales, losses, strict=True):
        error = rounded(x / scale, INPUT) - x / scale
        actual = (error @ (weight * scale).t()).double().square().sum()
        assert float(found) == pytest.approx(float(actual), rel=0.3)
    assert best_candidate(losses[:, None]) == 1  # moving the outlier pays
    for exact in (TensorScheme(FP8_E4M3, PerTensor()),
                  TensorScheme(INT8_MIN128, PerToken(), is_dynamic=True)):  # fmt: skip
        assert not tile_losses([weight], inputs, scales, None, exact).any()


def test_ties_keep_the_first_candidate():
    assert best_candidate(torch.tensor([[2.0, 1], [1, 2], [3, 3]])) == 0


def test_smoothquant_by_hand():
    x, w = torch.tensor([16.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 1.0])
    torch.testing.assert_close(smoothquant_scale(x, w, 0.5)[:2], torch.tensor([4.0, 0.5]))
    assert smoothquant_scale(x, w, 1.0)[0] == 16
    assert float(smoothquant_scale(x, w, 0.5)[2]) > 0  # a dead channel keeps a usable factor


@pytest.mark.parametrize("grid", ["power_of_two", "float"])
def test_factors_are_centred_and_on_their_grid(grid):
    scale = round_scale(torch.tensor([1.0, 3.0, 20.0, 400.0]), grid)
    assert abs(float(scale.log2().mean())) <= 0.5
    on_grid = torch.equal(scale.log2().round(), scale.log2())
    assert on_grid == (grid == "power_of_two")
    assert torch.equal(scale.argsort(), torch.arange(4))
