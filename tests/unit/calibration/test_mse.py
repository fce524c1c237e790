"""Shares of the maximum against hand-made numbers and brute force."""

import pytest
import torch

from mqat.calibration.clipping import WeightShard
from mqat.calibration.mse import MSE, best_share, shares, squared_errors
from mqat.quant.algorithm import named_scheme
from mqat.quant.formats import FP4_E2M1, FP8_E4M3, INT4, UINT4
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor
from mqat.quant.qparams import frozen_qparams, rounded, statistic_of
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
        TensorScheme(FP4_E2M1, PerGroup(4)),
        TensorScheme(FP4_E2M1, PerGroup(4), torch.float8_e8m0fnu),
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
                for f in shares(scheme)
            ]
            best = shares(scheme)[min(range(len(errors)), key=errors.__getitem__)]
            index = (..., row, group) if size < 16 else (..., row)
            torch.testing.assert_close(found[index], statistic[index] * best)
    if scheme.format != FP8_E4M3:
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


def test_exponents_of_mx_blocks_go_up_and_down():
    # Scales are 2**(floor(log2 amax) - 2). A block of 7.9 saturates at 6, and twice the step holds 8;
    # one of 4.1 and many of 0.24 loses the small ones, which half the step holds, less than by clipping.
    scheme = TensorScheme(FP4_E2M1, PerGroup(32), torch.float8_e8m0fnu)
    up, down, exact = torch.full((32,), 2.0), torch.full((32,), 0.24), torch.full((32,), 1.5)
    up[0], down[0], exact[0] = 7.9, 4.1, 6.0
    weight = torch.stack([up, down, exact])
    scales = frozen_qparams(chosen(weight, scheme), scheme)["scale"]
    assert scales.flatten().tolist() == [2.0, 0.5, 1.0]
    assert frozen_qparams(statistic_of(weight, scheme), scheme)["scale"].unique().tolist() == [1.0]


def test_nvfp4_blocks_gain_and_none_saturates_for_want_of_room():
    scheme = named_scheme("nvfp4").weight
    weight = weights(64, 64)
    plain = statistic_of(weight, scheme)
    above = plain.amax().reshape(1) * MSE.headroom
    found = MSE.choose(plain, MSE.measure(WeightShard(weight, plain, scheme, above)), scheme)
    assert (found > plain).any() and (found < plain).any()
    frozen = frozen_qparams(found, scheme, above)
    torch.testing.assert_close(frozen["scale"], found / 6, rtol=1 / 16, atol=0)
    cut = frozen_qparams(plain * 1.5, scheme, above / MSE.headroom)["scale"]  # control: no room
    assert (cut < plain * 1.5 / 6 * (15 / 16)).any()

    def error(amax, above):
        return float((rounded(weight, scheme, amax, above) - weight).double().square().sum())

    assert error(found, above) < 0.85 * error(plain, plain.amax().reshape(1))
