"""SmoothQuant's factors for a given strength, and the grid that factors are rounded to.

s_j = amax(x_j)**alpha / amax(W_j)**(1 - alpha)      arXiv:2211.10438, eq. 4
"""

import torch
from torch import Tensor

FLOOR = 1e-5  # dead channels: keep their factor moderate


def smoothquant_scale(input_amax: Tensor, weight_amax: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's factors before rounding, from the largest |x_j| and |W_oj|, all float32 [I].

    `alpha`: 0 leaves activations alone, 1 moves all of their range into the weights.
    """
    return input_amax.clamp_min(FLOOR) ** alpha / weight_amax.clamp_min(FLOOR) ** (1 - alpha)


def round_scale(scale: Tensor, sq_grid: str) -> Tensor:
    """Factors as they will be folded, float32, centred on one.

    Args:
        scale: Positive factors [..., I]; a common factor does not matter.
        sq_grid: `power_of_two`: folding changes no mantissa, so the unquantized function stays bit
            for bit (but for zero-centred norms). `float`: finer, but norm and weights are rounded
            again to their dtype.
    """
    log = torch.log2(scale.double())
    log = log - log.mean(dim=-1, keepdim=True)
    return torch.exp2(log.round() if sq_grid == "power_of_two" else log).float()
