"""SmoothQuant's factors against numbers made by hand."""

import pytest
import torch

from mqat.calibration.smoothquant import round_scale, smoothquant_scale


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
