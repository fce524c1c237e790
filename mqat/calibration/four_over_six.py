"""`four_over_six`: NVFP4 blocks whose largest element goes to 6 or to 4, whichever rounds better.

E2M1 ends in 3, 4, 6: between 4 and 6 its steps are widest, so that a block whose elements lie near its
maximum often loses less if that becomes 4. The maximum at 4 is the scale of 1.5 times the maximum, for
which the upper scale leaves room: E4M3 block scales reach 256 for a maximum at 6, and 384 at 4.

Cook et al. 2025, "Four Over Six", arXiv:2512.02010.
"""

import torch
from torch import Tensor

from mqat.calibration.clipping import ClippingMethod, WeightShard, grouped
from mqat.calibration.mse import HEADROOM
from mqat.errors import UserError
from mqat.quant.formats import FP4_E2M1
from mqat.quant.qparams import rounded
from mqat.quant.scheme import TensorScheme
from mqat.transfer import to_device

FACTORS = (1.0, 6.0 / 4.0)


def squared_errors(shard: WeightShard) -> Tensor:
    """Of each of FACTORS and each block, float64 [2, rows, G]."""
    errors = [
        rounded(shard.weight, shard.scheme, shard.statistic * factor, shard.global_amax)
        - shard.weight
        for factor in FACTORS
    ]
    squares = [grouped(error, shard.group_width).double().square() for error in errors]
    return torch.stack([square.sum(dim=2) for square in squares])


def better_factor(amax: Tensor, errors: Tensor, scheme: TensorScheme) -> Tensor:
    """`amax` of each block times the factor with the least error, 1 on a tie; float32 [rows, G]."""
    return amax * to_device(torch.tensor(FACTORS), amax.device)[errors.argmin(dim=0)]


def check(name: str, scheme: TensorScheme) -> None:
    """Raises UserError for another format than NVFP4's."""
    if scheme.format != FP4_E2M1 or not scheme.has_global_scale:
        raise UserError(
            f"{name}: quantization.weight_calibrator=four_over_six chooses between two block scales of "
            f"NVFP4 (fp4_e2m1 with e4m3 scales), not of {scheme.format.name} with "
            f"{scheme.scale_name} scales. Use algorithm nvfp4, or mse."
        )


FOUR_OVER_SIX = ClippingMethod(squared_errors, better_factor, check, headroom=HEADROOM)
