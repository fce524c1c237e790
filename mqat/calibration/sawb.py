"""`sawb`: c1 sqrt(E[w²]) + c2 E[|w|], at most the maximum; coefficients by number of levels.

Choi et al. 2018, arXiv:1807.06964, section 3.2, with the coefficients that fms-model-optimizer
publishes for symmetric grids.
"""

import torch
from torch import Tensor

from mqat.calibration.clipping import ClippingMethod, WeightShard, grouped
from mqat.errors import UserError
from mqat.quant.scheme import TensorScheme

# bits -> (c1, c2) for 2**bits - 1 levels, symmetric around zero.
_COEFFICIENTS = {2: (2.6, -1.71), 3: (7.509, -6.892), 4: (12.035, -12.03), 5: (17.74, -18.64),
                 7: (28.24, -30.81), 8: (31.76, -35.04)}  # fmt: skip


def sums(shard: WeightShard) -> Tensor:
    """Sum of w² and of |w|, and number of elements of each row group, float64 [3, rows, G]."""
    groups = grouped(shard.weight, shard.group_width).double()
    counts = grouped(torch.ones_like(shard.weight), shard.group_width).double()
    return torch.stack([x.sum(dim=2) for x in (groups.square(), groups.abs(), counts)])


def clipping_point(amax: Tensor, measured: Tensor, scheme: TensorScheme) -> Tensor:
    """SAWB's clipping point in the scale's shape, float32, never above `amax`."""
    c1, c2 = _COEFFICIENTS[scheme.format.bits]
    square, magnitude = measured[:2] / measured[2]
    found = (c1 * square.sqrt() + c2 * magnitude).float().view_as(amax)
    return torch.where(found > 0, torch.minimum(found, amax), amax)


def check(name: str, scheme: TensorScheme) -> None:
    """Raises UserError for a format without coefficients."""
    fmt = scheme.format
    if fmt.is_float or scheme.is_asymmetric or fmt.bits not in _COEFFICIENTS:
        raise UserError(
            f"{name}: quantization.weight_calibrator=sawb has no coefficients for {fmt.name}"
            f"{' with zero points' * scheme.is_asymmetric}; it needs symmetric integers of "
            f"{sorted(_COEFFICIENTS)} bits. Use mse or awq."
        )


SAWB = ClippingMethod(sums, clipping_point, check)
