"""Clipping points for weights: their maximum, or the best of several shrunken ones.

| method | chooses, for each scale group                                                          |
|--------|----------------------------------------------------------------------------------------|
| `max`  | the largest |w|                                                                        |
| `mse`  | the share of it with the least squared rounding error of the weight                    |
| `awq`  | the share with the least output error d G dᵀ, G the group's block of XᵀX               |
| `sawb` | c1 sqrt(E[w²]) + c2 E[|w|], at most the maximum; coefficients by number of levels      |

`awq` is AWQ's clip search (arXiv:2306.00978, section 3.2) with exact output errors. SAWB is Choi et al.
2018, arXiv:1807.06964, section 3.2, with the coefficients that fms-model-optimizer publishes for
symmetric grids.

Legend: a tile is [rows, I] (`tiles.py`); `F` factors; scales as the granularity shapes them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mqat.errors import UserError
from mqat.quant.granularity import Granularity, PerGroup, PerTensor
from mqat.quant.qparams import rounded
from mqat.quant.scheme import TensorScheme

METHODS = ("max", "mse", "awq", "sawb")
FACTORS = tuple(1 - 0.05 * i for i in range(12))
# bits -> (c1, c2) for 2**bits - 1 levels, symmetric around zero.
_SAWB = {2: (2.6, -1.71), 3: (7.509, -6.892), 4: (12.035, -12.03), 5: (17.74, -18.64),
         7: (28.24, -30.81), 8: (31.76, -35.04)}  # fmt: skip


def group_width(granularity: Granularity, width: int) -> int:
    """Elements along a row that share a scale."""
    return granularity.size if isinstance(granularity, PerGroup) else width


def _grouped(x: Tensor, size: int) -> Tensor:
    """[rows, I] -> [rows, G, size], the last group filled with zeros."""
    return F.pad(x, (0, -x.shape[1] % size)).view(x.shape[0], -1, size)


def _hessian_blocks(hessian: Tensor, size: int) -> Tensor:
    """Diagonal blocks of XᵀX, float32 [G, size, size]."""
    padding = -hessian.shape[0] % size
    padded = F.pad(hessian.float(), (0, padding, 0, padding))
    count = padded.shape[0] // size
    blocks = padded.view(count, size, count, size)
    return blocks[torch.arange(count), :, torch.arange(count)].contiguous()


def shrink_errors(
    tile: Tensor,
    statistic: Tensor,
    global_amax: Tensor | None,
    scheme: TensorScheme,
    hessian: Tensor | None,
) -> Tensor:
    """Squared error for each of FACTORS and each row group of a tile, float64 [F, rows, G].

    Args:
        tile: float32 [rows, I].
        statistic: Of the tile, or of the whole tensor where that shares one scale.
        global_amax: Of the whole tensor, for two levels.
        scheme: Of the weight.
        hessian: XᵀX [I, I] weighs errors by the inputs they meet; None weighs all alike.
    """
    size = group_width(scheme.granularity, tile.shape[1])
    blocks = None if hessian is None else _hessian_blocks(hessian, size)
    errors = []
    for factor in FACTORS:
        error = _grouped(rounded(tile, scheme, statistic * factor, global_amax) - tile, size)
        if blocks is None:
            errors.append(error.double().square().sum(dim=2))
            continue
        weighted = torch.bmm(error.transpose(0, 1).contiguous(), blocks).transpose(0, 1)
        errors.append((weighted * error).sum(dim=2).double())
    return torch.stack(errors)


def shrunk(statistic: Tensor, errors: Tensor, granularity: Granularity) -> Tensor:
    """`statistic` times the best factor of each scale; the largest factor on a tie.

    Args:
        statistic: Maxima in the granularity's scale shape, or (2, ...) ranges.
        errors: As from `shrink_errors`; for one scale per tensor summed over all tiles, [F, 1, 1].
        granularity: Of the weight.
    """
    best = torch.tensor(FACTORS, device=statistic.device)[errors.argmin(dim=0)]
    return statistic * (best if isinstance(granularity, PerGroup) else best.flatten())


def sawb_sums(tile: Tensor, granularity: Granularity) -> Tensor:
    """Sum of w² and of |w| over each row group of a tile, float64 [2, rows, G]."""
    groups = _grouped(tile, group_width(granularity, tile.shape[1])).double()
    return torch.stack([groups.square().sum(dim=2), groups.abs().sum(dim=2)])


def sawb_amax(amax: Tensor, sums: Tensor, counts: Tensor, scheme: TensorScheme) -> Tensor:
    """SAWB's clipping point in the scale's shape, float32, never above `amax`.

    Args:
        amax: Largest |w|.
        sums: As from `sawb_sums`, for one scale per tensor added up to [2, 1, 1].
        counts: Number of elements behind each sum, broadcastable.
        scheme: Its format must be an integer one with known coefficients.

    Raises:
        ValueError: No coefficients for the format.
    """
    fmt = scheme.format
    if fmt.is_float or scheme.is_asymmetric or fmt.bits not in _SAWB:
        raise UserError(
            f"quantization.weight_calibrator=sawb has no coefficients for {fmt.name}"
            f"{' with zero points' * scheme.is_asymmetric}; it needs symmetric integers of "
            f"{sorted(_SAWB)} bits. Use mse or awq."
        )
    c1, c2 = _SAWB[scheme.format.bits]
    square, magnitude = sums / counts
    found = (c1 * square.sqrt() + c2 * magnitude).float().view_as(amax)
    return torch.where(found > 0, torch.minimum(found, amax), amax)


def group_counts(width: int, rows: int, granularity: Granularity) -> Tensor:
    """Elements behind each scale of a tensor [rows, width], float64 [1, 1] or [1, G]."""
    if isinstance(granularity, PerTensor):
        return torch.full((1, 1), float(width * rows), dtype=torch.float64)
    return _grouped(torch.ones(1, width), group_width(granularity, width)).double().sum(dim=2)
