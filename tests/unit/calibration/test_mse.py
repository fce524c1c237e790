"""Shares of the maximum against hand-made numbers and brute force."""

import pytest
import torch

from mqat.calibration.clipping import WeightShard
from mqat.calibration.mse import SHARES, best_share, squared_errors
from mqat.quant.formats import FP8_E4M3, INT4, UINT4
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor
from mqat.quant.qparams import rounded, statistic_of
from mqat.quant.scheme import TensorScheme

GROUPS = TensorScheme(INT4, PerGroup(4))


def weights(rows: int = 6, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def chosen(weight, scheme):
    statistic = statistic_of(weight, scheme)
    return best_share(statistic, squared_errors(WeightShard(weight, statistic, scheme)), scheme)


def test_a_lone_outlier_is_clipped_when_that_costs_less():
    # The step is 1/7, so 0.45 of it rounds to zero: 255 errors of 0.064. With an amax of 0.9 the same
    # values round to a code, which is 0.5 to 1 step: nearly nothing is lost but 0.1 of the outlier.
    weight = torch.full((1, 256), 0.45 / 7)
    weight[0, 0] = 1.0
    amax = chosen(weight, TensorScheme(INT4, PerGroup(256)))
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
def test_every_group_gets_the_share_that_brute_force_finds(scheme):
    weight = weights()
    statistic, found = statistic_of(weight, scheme), chosen(weight, scheme)
    size = getattr(scheme.granularity, "size", 16)
    for row in range(weight.shape[0]):
        for group, start in enumerate(range(0, 16, size)):
            block = slice(start, start + size)
            errors = [
                float(
                    (rounded(weight, scheme, statistic * f) - weight)[row, block]
                    .double()
                    .square()
                    .sum()
                )
                for f in SHARES
            ]
            best = SHARES[min(range(len(SHARES)), key=errors.__getitem__)]
            index = (..., row, group) if size < 16 else (..., row)
            torch.testing.assert_close(found[index], statistic[index] * best)
    if not scheme.format.is_float:
        assert not torch.equal(found, statistic)  # control: something was clipped


def test_one_scale_for_the_tensor_takes_the_sum_over_its_shards():
    scheme, weight = TensorScheme(INT4, PerTensor()), weights()
    statistic = statistic_of(weight, scheme)
    whole, *halves = (
        squared_errors(WeightShard(part, statistic, scheme)).sum(dim=(1, 2))
        for part in (weight, *weight.chunk(2))
    )
    torch.testing.assert_close(whole, sum(halves))
    best = best_share(statistic, whole[:, None, None], scheme)
    assert best.shape == (1,) and float(best) < float(statistic)
