"""Two candidate scales for each NVFP4 block, against hand-made numbers and brute force."""

import pytest
import torch

from mqat.calibration.clipping import WeightShard
from mqat.calibration.four_over_six import FOUR_OVER_SIX
from mqat.quant.algorithm import named_scheme
from mqat.quant.qparams import frozen_qparams, rounded, statistic_of

NVFP4 = named_scheme("nvfp4").weight


def chosen(weight):
    """What scales are made from, and the maximum that the upper scale is made from."""
    amax = statistic_of(weight, NVFP4)
    above = amax.amax().reshape(1) * FOUR_OVER_SIX.headroom
    measured = FOUR_OVER_SIX.measure(WeightShard(weight, amax, NVFP4, above))
    return FOUR_OVER_SIX.choose(amax, measured, NVFP4), above


def test_a_block_near_its_maximum_goes_to_four():
    # At 6 the levels next to the maximum are 4 and 6: 0.83 lies between 0.67 and 1. At 4 it is 3.33
    # steps, next to 3. A block of levels of E2M1 itself stays at 6.
    near = torch.full((1, 16), 0.83 * 6)
    near[0, 0] = 6.0
    exact = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6] * 2)[None]
    amax, _ = chosen(torch.cat([near, exact]))
    assert amax.tolist() == [[9.0], [6.0]]


def test_every_block_gets_the_better_scale_and_none_saturates():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    amax, above = chosen(weight)
    plain = statistic_of(weight, NVFP4)
    assert 0.1 < (amax > plain).float().mean() < 0.9  # both occur
    error = {
        factor: (rounded(weight, NVFP4, plain * factor, above) - weight).view(64, 4, 16)
        for factor in (1.0, 1.5)
    }
    squared = {factor: e.double().square().sum(dim=2) for factor, e in error.items()}
    assert torch.equal(amax > plain, squared[1.5] < squared[1.0])
    frozen = frozen_qparams(amax, NVFP4, above)
    stored = frozen["scale"] / frozen["global_scale"]
    assert 240 < stored.max() <= 384  # E4M3 ends at 448: room is left for the largest block at 4
    found = (rounded(weight, NVFP4, amax, above) - weight).double().square().sum()
    assert found < (rounded(weight, NVFP4) - weight).double().square().sum()  # than plain NVFP4


def test_other_formats_are_refused_by_name():
    scheme = named_scheme("mxfp4").weight
    with pytest.raises(ValueError, match="not of fp4_e2m1 with float8_e8m0fnu scales"):
        FOUR_OVER_SIX.check("a linear", scheme)
