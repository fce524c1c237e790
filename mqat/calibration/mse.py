"""`mse`: the share of the maximum with the least squared rounding error of the weight."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mqat.calibration.clipping import ClippingMethod, WeightShard, grouped
from mqat.quant.granularity import PerGroup
from mqat.quant.qparams import rounded
from mqat.quant.scheme import TensorScheme
from mqat.transfer import to_device

SHARES = tuple(1 - 0.05 * i for i in range(12))


def rounding_errors(shard: WeightShard) -> Iterator[Tensor]:
    """Q(W) - W with each of SHARES of the statistic, float32 [rows, G, width]."""
    for share in SHARES:
        values = rounded(shard.weight, shard.scheme, shard.statistic * share, shard.global_amax)
        yield grouped(values - shard.weight, shard.group_width)


def squared_errors(shard: WeightShard) -> Tensor:
    """Of each share and row group, float64 [SHARES, rows, G]."""
    return torch.stack([e.double().square().sum(dim=2) for e in rounding_errors(shard)])


def best_share(statistic: Tensor, errors: Tensor, scheme: TensorScheme) -> Tensor:
    """`statistic` times the share with the least error of each scale; the largest share on a tie."""
    best = to_device(torch.tensor(SHARES), statistic.device)[errors.argmin(dim=0)]
    return statistic * (best if isinstance(scheme.granularity, PerGroup) else best.flatten())


MSE = ClippingMethod(squared_errors, best_share)
