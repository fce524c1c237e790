"""`mse`: the share of the maximum with the least squared rounding error of the weight."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mqat.calibration.clipping import ClippingMethod, WeightShard, grouped
from mqat.quant.formats import FP4_E2M1
from mqat.quant.granularity import PerGroup
from mqat.quant.qparams import rounded
from mqat.quant.scheme import TensorScheme
from mqat.transfer import to_device

_CLIPPED = tuple(1 - 0.05 * i for i in range(12))
# E2M1 is coarsest next to its end, 4 and 6, so that a maximum may round better at 4 (`four_over_six.py`)
# or in between; 4 is the maximum's level at 1.5.
_STRETCHED = (1.1, 1.2, 1.3, 1.4, 1.5)
# Scales that are powers of two know no others. At 1 a maximum that is nearly twice a power of two
# saturates; at 2 nothing does, by a step of twice the size.
_EXPONENTS = (1.0, 2.0, 0.5)


def shares(scheme: TensorScheme) -> tuple[float, ...]:
    """What maxima are multiplied by, for each candidate; 1 comes first."""
    if scheme.scale_dtype == torch.float8_e8m0fnu:
        return _EXPONENTS
    above = _STRETCHED if scheme.format == FP4_E2M1 else ()
    return _CLIPPED[:1] + above + _CLIPPED[1:]


def rounding_errors(shard: WeightShard) -> Iterator[Tensor]:
    """Q(W) - W with each of `shares` of the statistic, float32 [rows, G, width]."""
    for share in shares(shard.scheme):
        values = rounded(shard.weight, shard.scheme, shard.statistic * share, shard.global_amax)
        yield grouped(values - shard.weight, shard.group_width)


def squared_errors(shard: WeightShard) -> Tensor:
    """Of each share and row group, float64 [shares, rows, G]."""
    return torch.stack([e.double().square().sum(dim=2) for e in rounding_errors(shard)])


def best_share(statistic: Tensor, errors: Tensor, scheme: TensorScheme) -> Tensor:
    """`statistic` times the share with the least error of each scale; the first on a tie."""
    best = to_device(torch.tensor(shares(scheme)), statistic.device)[errors.argmin(dim=0)]
    return statistic * (best if isinstance(scheme.granularity, PerGroup) else best.flatten())


# The upper scale of two levels leaves room for a block scale of 1.5 times the largest maximum.
HEADROOM = 448.0 / 256.0
MSE = ClippingMethod(squared_errors, best_share, headroom=HEADROOM)
