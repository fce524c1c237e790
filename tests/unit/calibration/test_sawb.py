"""SAWB against numbers made by hand."""

import pytest
import torch

from mqat.calibration.clipping import WeightShard
from mqat.calibration.sawb import SAWB, clipping_point, sums
from mqat.quant.formats import FP8_E4M3, INT4, UINT4
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor
from mqat.quant.qparams import statistic_of
from mqat.quant.scheme import TensorScheme


def test_sawb_by_hand():
    # INT4: 12.035 sqrt(E[w^2]) - 12.03 E[|w|]; a row of +-1 has both means 1: 0.005.
    scheme = TensorScheme(INT4, PerChannel())
    weight = torch.tensor([[1.0, -1, 1, -1], [3, 0, 0, 4]])
    shard = WeightShard(weight, statistic_of(weight, scheme), scheme)
    found = clipping_point(shard.statistic, sums(shard), scheme)
    # second row: sqrt(25 / 4) = 2.5, mean 1.75: 30.0875 - 21.0525 = 9.035, more than the maximum
    torch.testing.assert_close(found, torch.tensor([0.005, 4.0]), rtol=1e-5, atol=1e-6)


def test_a_short_last_group_counts_its_own_elements():
    scheme, weight = TensorScheme(INT4, PerGroup(3)), torch.ones(2, 4)
    shard = WeightShard(weight, statistic_of(weight, scheme), scheme)
    assert sums(shard)[2].tolist() == [[3, 1]] * 2
    found = clipping_point(shard.statistic, sums(shard), scheme)
    torch.testing.assert_close(found, torch.full((2, 2), 0.005), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(3)], ids=str)
def test_nothing_leaves_the_device_of_the_weight(granularity):
    """On `meta`, which refuses to meet tensors of another device."""
    scheme = TensorScheme(INT4, granularity)
    weight = torch.ones(2, 4, device="meta")
    shard = WeightShard(weight, statistic_of(weight, scheme), scheme)
    measured = sums(shard)
    assert measured.device.type == "meta"
    if isinstance(granularity, PerTensor):
        measured = measured.sum(dim=(1, 2))[:, None, None]
    assert clipping_point(shard.statistic, measured, scheme).device.type == "meta"


@pytest.mark.parametrize("other", [FP8_E4M3, UINT4], ids=lambda fmt: fmt.name)
def test_formats_without_coefficients_are_refused(other):
    bad = TensorScheme(other, PerChannel(), is_asymmetric=other == UINT4)
    with pytest.raises(ValueError, match="weight_calibrator=sawb has no coefficients"):
        SAWB.check("a linear", bad)
