"""GEMMs whose result does not depend on the tensor-parallel size, for calibration.

Floating-point sums depend on their order, so TP 1 and TP 2 see activations that differ in the last
bits, and then calibrated scales do too. Here both causes are removed:

- Every GEMM is cut into tiles of `1 / num_shards` of the parallel dimension, whatever the layout.
  A rank owns whole tiles, so each tile is one GEMM of the same shape on every layout.
- Partial sums over the input dimension are added as 64-bit fixed-point integers, which is
  associative: the local sum and the all-reduce over ranks may happen in any order.

    column-parallel  x [S, B, I]     w [O/tp, I]  ->  y [S, B, O/tp]   num_shards/tp tiles of rows
    row-parallel     x [S, B, I/tp]  w [O, I/tp]  ->  fixed-point y [S, B, O], summed over TP later
"""

from __future__ import annotations

import torch
from torch import Tensor

# Resolution 2**-36 of one unit; sums stay below 2**62 for 64 tiles of magnitude MAX_PARTIAL.
FRACTION_BITS = 36
MAX_PARTIAL = 2.0**20


def tiled_linear(x: Tensor, weight: Tensor, num_tiles: int) -> Tensor:
    """`x @ weight.T` as `num_tiles` GEMMs over equal blocks of weight rows."""
    rows = x.reshape(-1, x.shape[-1])
    tiles = [rows @ tile.contiguous().t() for tile in weight.chunk(num_tiles, dim=0)]
    return torch.cat(tiles, dim=-1).view(*x.shape[:-1], weight.shape[0])


def fixed_point_linear(x: Tensor, weight: Tensor, num_tiles: int) -> tuple[Tensor, Tensor]:
    """Partial `x @ weight.T` over this rank's input features, as an exactly summable integer.

    Args:
        x: Local input, shape [..., I/tp].
        weight: Local weight, shape [O, I/tp].
        num_tiles: Number of equal blocks of input features on this rank.

    Returns:
        int64 tensor [..., O] in units of 2**-FRACTION_BITS, and a 0-d bool tensor that is true when
        a partial sum was not finite or too large for the format (the sum is then meaningless).
    """
    rows = x.reshape(-1, x.shape[-1])
    total: Tensor | None = None
    overflow = torch.zeros((), dtype=torch.bool, device=x.device)
    for x_tile, w_tile in zip(
        rows.chunk(num_tiles, dim=1), weight.chunk(num_tiles, dim=1), strict=True
    ):
        partial = x_tile.contiguous() @ w_tile.contiguous().t()
        if partial.numel():
            low, high = torch.aminmax(partial)
            overflow |= ~(torch.maximum(-low, high) <= MAX_PARTIAL)
        # A power of two is exact; what is beyond the point is cut off.
        fixed = partial.float().mul_(2.0**FRACTION_BITS).to(torch.int64)
        total = fixed if total is None else total.add_(fixed)
    assert total is not None, "there is at least one tile"
    return total.view(*x.shape[:-1], weight.shape[0]), overflow


def from_fixed_point(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Value of a fixed-point sum, rounded once to `dtype`."""
    return total.double().mul_(2.0**-FRACTION_BITS).to(dtype)
