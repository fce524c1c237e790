"""Clipping points from histograms against brute force over the samples themselves."""

import pytest
import torch

from mqat.quant.formats import FP8_E4M3, INT4, INT8_MIN128
from mqat.quant.granularity import PerTensor
from mqat.quant.histogram import entropy_amax, mse_amax
from mqat.quant.observers import ActivationObserver
from mqat.quant.qparams import rounded
from mqat.quant.scheme import TensorScheme


def observed(x: torch.Tensor, method: str) -> ActivationObserver:
    observer = ActivationObserver(method)
    for part in x.chunk(3):
        observer.observe_(part)
    return observer


def normal(count: int = 20000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def error(x: torch.Tensor, amax: float, fmt) -> float:
    grid = rounded(x, TensorScheme(fmt, PerTensor()), torch.tensor([amax]))
    return float((grid - x).double().square().sum())


@pytest.mark.parametrize("fmt", [INT4, INT8_MIN128, FP8_E4M3], ids=lambda f: f.name)
def test_mse_is_as_good_as_trying_every_clipping_point(fmt):
    x = torch.cat([normal(), torch.tensor([30.0])])
    found = float(observed(x, "mse").calibrated(TensorScheme(fmt, PerTensor()), 100.0))
    best = min(error(x, amax, fmt) for amax in torch.linspace(0.5, 30, 400).tolist())
    assert error(x, found, fmt) <= 1.02 * best
    if not fmt.is_float:
        assert error(x, found, fmt) < 0.95 * error(x, 30.0, fmt)  # control: the maximum is worse


def test_mse_of_a_gaussian_in_four_bits_is_near_the_known_optimum():
    # Symmetric 15 levels: the optimal step is about 0.34 sigma (Max 1960), so amax about 2.4 to 2.6.
    found = float(
        observed(normal(200000), "mse").calibrated(TensorScheme(INT4, PerTensor()), 100.0)
    )
    assert 2.2 < found < 2.8


def test_entropy_drops_a_far_tail_and_keeps_an_even_spread():
    tailed = torch.cat([normal(), torch.full((2,), 300.0)])
    assert (
        float(observed(tailed, "entropy").calibrated(TensorScheme(INT8_MIN128, PerTensor()), 100.0))
        < 60
    )
    even = torch.linspace(-1, 1, 20001)
    assert (
        float(observed(even, "entropy").calibrated(TensorScheme(INT8_MIN128, PerTensor()), 100.0))
        > 0.9
    )


@pytest.mark.parametrize("choose", [mse_amax, entropy_amax])
def test_nothing_but_zeros_keeps_the_maximum(choose):
    observer = observed(torch.zeros(8), "mse")
    assert choose(observer.histogram, observer.amax(), INT4).tolist() == [0.0]


def test_a_histogram_is_needed():
    with pytest.raises(ValueError, match="needs a histogram"):
        observed(normal(), "max").amax(99.0)
