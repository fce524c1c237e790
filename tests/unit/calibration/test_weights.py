"""Clipping points of weights against hand-made numbers and brute force."""

import pytest
import torch

from mqat.calibration.weights import FACTORS, sawb_amax, sawb_sums, shrink_errors, shrunk
from mqat.quant.formats import FP8_E4M3, INT4, UINT4
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor
from mqat.quant.qparams import rounded, statistic_of
from mqat.quant.scheme import TensorScheme

GROUPS = TensorScheme(INT4, PerGroup(4))


def weights(rows: int = 6, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def chosen(tile, scheme, hessian=None, global_amax=None):
    statistic = statistic_of(tile, scheme)
    errors = shrink_errors(tile, statistic, global_amax, scheme, hessian)
    return shrunk(statistic, errors, scheme.granularity)


def test_a_lone_outlier_is_clipped_when_that_costs_less():
    # The step is 1/7, so 0.45 of it rounds to zero: 255 errors of 0.064. With an amax of 0.9 the same
    # values round to a code, which is 0.5 to 1 step: nearly nothing is lost but 0.1 of the outlier.
    tile = torch.full((1, 256), 0.45 / 7)
    tile[0, 0] = 1.0
    amax = chosen(tile, TensorScheme(INT4, PerGroup(256)))
    assert float(amax) < 0.9
    flat = torch.tensor([[7.0, -7, 3, 1]])  # on the grid already: nothing to gain
    assert chosen(flat, GROUPS).tolist() == [[7.0]]


@pytest.mark.parametrize(
    "scheme",
    [
        GROUPS,
        TensorScheme(INT4, PerGroup(5)),  # a short last group
        TensorScheme(INT4, PerChannel()),
        TensorScheme(FP8_E4M3, PerChannel()),
        TensorScheme(UINT4, PerGroup(4), is_asymmetric=True),
    ],
)
def test_every_group_gets_the_factor_that_brute_force_finds(scheme):
    tile = weights()
    statistic, found = statistic_of(tile, scheme), chosen(tile, scheme)
    size = getattr(scheme.granularity, "size", 16)
    for row in range(tile.shape[0]):
        for group, start in enumerate(range(0, 16, size)):
            block = slice(start, start + size)
            errors = [
                float(
                    (rounded(tile, scheme, statistic * f) - tile)[row, block]
                    .double()
                    .square()
                    .sum()
                )
                for f in FACTORS
            ]
            best = FACTORS[min(range(len(FACTORS)), key=errors.__getitem__)]
            index = (..., row, group) if size < 16 else (..., row)
            torch.testing.assert_close(found[index], statistic[index] * best)
    if not scheme.format.is_float:
        assert not torch.equal(found, statistic)  # control: something was clipped


def test_awq_weighs_errors_by_the_inputs_they_meet():
    tile = weights()
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 16)
    hessian = (x.t() @ x).double()

    def output_error(amax):
        # groups interact in the output; clip search looks at each group alone
        error = rounded(tile, GROUPS, amax) - tile
        blocks = error.view(6, 4, 4), x.view(64, 4, 4)
        return float(torch.einsum("rgk,tgk->rtg", *blocks).square().sum())

    plain = statistic_of(tile, GROUPS)
    assert output_error(chosen(tile, GROUPS, hessian)) < output_error(chosen(tile, GROUPS))
    assert output_error(chosen(tile, GROUPS, hessian)) < output_error(plain)


def test_one_scale_for_the_tensor_takes_the_sum_over_its_tiles():
    scheme, tile = TensorScheme(INT4, PerTensor()), weights()
    statistic = statistic_of(tile, scheme)
    whole = shrink_errors(tile, statistic, None, scheme, None).sum(dim=(1, 2))
    halves = sum(
        shrink_errors(part, statistic, None, scheme, None).sum(dim=(1, 2)) for part in tile.chunk(2)
    )
    torch.testing.assert_close(whole, halves)
    best = shrunk(statistic, whole[:, None, None], scheme.granularity)
    assert best.shape == (1,) and float(best) < float(statistic)


def test_sawb_by_hand():
    # INT4: 12.035 sqrt(E[w^2]) - 12.03 E[|w|]; a row of +-1 has both input_hessians 1: 0.005.
    scheme, tile = TensorScheme(INT4, PerChannel()), torch.tensor([[1.0, -1, 1, -1], [3, 0, 0, 4]])
    counts = torch.full((1, 1), 4.0, dtype=torch.float64)
    found = sawb_amax(statistic_of(tile, scheme), sawb_sums(tile, PerChannel()), counts, scheme)
    # second row: sqrt(25 / 4) = 2.5, mean 1.75: 30.0875 - 21.0525 = 9.035, more than the maximum
    torch.testing.assert_close(found, torch.tensor([0.005, 4.0]), rtol=1e-5, atol=1e-6)
    for other in (FP8_E4M3, UINT4):
        with pytest.raises(ValueError, match="weight_calibrator=sawb has no coefficients"):
            bad = TensorScheme(other, PerChannel(), is_asymmetric=other == UINT4)
            sawb_amax(statistic_of(tile, bad), torch.ones(2, 2, 1), counts, bad)
