"""Error-compensated rounding: what rounding one column breaks, later columns make good.

Frantar et al. 2022, GPTQ, arXiv:2210.17323, algorithm 1, with H = XᵀX and columns in the order of
falling H_jj. Scales are fixed beforehand, so that groups may be visited in any order and serving
needs no index. Rows do not depend on each other: tiles of rows are rounded independently, and since H
and the tiles are the same on every layout, so is the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mqat.errors import UserError
from mqat.quant.functional import fake_quantize
from mqat.quant.granularity import PerChannel
from mqat.quant.qparams import compute_qparams
from mqat.quant.scales import compute_global_scale
from mqat.quant.scheme import TensorScheme

_BLOCK = 128


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of H⁻¹ in visiting order, and that order.

    Args:
        hessian: XᵀX, float64 [I, I].
        damping: Share of the mean diagonal that is added to it; raised tenfold, up to 10, while
            the matrix is not numerically positive definite.

    Returns:
        float32 [I, I] and int64 [I].

    Raises:
        ValueError: The matrix cannot be factored at all.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    hessian = hessian[order][:, order].clone()
    mean = float(diagonal.mean())
    while damping <= 10:
        damped = hessian.clone()
        # A channel that was always zero gets the damping alone: its weight rounds to nearest.
        damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper.float(), order
        damping *= 10
    raise UserError("XᵀX is not positive definite even with damping; calibrate with more tokens.")


def round_tile(
    tile: Tensor,
    statistic: Tensor,
    global_amax: Tensor | None,
    factor: Tensor,
    order: Tensor,
    scheme: TensorScheme,
) -> Tensor:
    """Values on the quantization grid, float32 [rows, I].

    Args:
        tile: Weights, float32 [rows, I].
        statistic: Calibrated maxima in the granularity's scale shape, or (2, ...) ranges, of the tile.
        global_amax: Of the whole tensor, for two levels.
        factor: From `inverse_factor`.
        order: From `inverse_factor`.
        scheme: Of the weight.
    """
    above = None if global_amax is None else compute_global_scale(global_amax, scheme.format)
    scale, zero_point = compute_qparams(statistic, scheme, above)

    def by_column(per_group: Tensor) -> Tensor:
        whole = scheme.granularity.expand(per_group, tuple(tile.shape)).expand_as(tile)
        return whole[:, order].t().contiguous()

    steps = by_column(scale)
    zeros = None if zero_point is None else by_column(zero_point)
    left, done = tile[:, order].contiguous(), torch.empty_like(tile)
    width = tile.shape[1]
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        block = left[:, start:end].t().contiguous()  # columns become rows: contiguous updates
        errors = torch.empty_like(block)
        for i in range(end - start):
            column = block[i].clone()
            zero = None if zeros is None else zeros[start + i]
            value = fake_quantize(
                column[:, None], steps[start + i], scheme.format, PerChannel(), zero_point=zero
            )[:, 0]
            done[:, start + i] = value
            errors[i] = (column - value) / factor[start + i, start + i]
            row = factor[start + i, start + i : end]
            block[i:] -= row[:, None] * errors[i]
        left[:, end:] -= errors.t() @ factor[start:end, end:]
    result = torch.empty_like(done)
    result[:, order] = done
    return result
