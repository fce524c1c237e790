"""Error-compensated rounding: each column's rounding error is compensated in the columns after it.

Frantar et al. 2022, GPTQ, arXiv:2210.17323, algorithm 1, with H = XᵀX and columns in the order of
falling H_jj. Scales are fixed beforehand, so that groups may be visited in any order and serving
needs no index. Rows do not depend on each other: shards of rows are rounded independently, and since
H and the shards are the same on every layout, so is the result.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mqat.errors import UserError
from mqat.quant.functional import fake_quantize
from mqat.quant.granularity import PerChannel
from mqat.quant.scheme import TensorScheme

_COLUMNS = 128  # compensated one by one before the rest of the row is, in one GEMM


def inverse_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of H⁻¹ in visiting order, and that order.

    A hundredth of the mean diagonal is added to H; tenfold more, up to ten times the mean, while it is
    not numerically positive definite.

    Args:
        hessian: XᵀX, float64 [I, I].

    Returns:
        float32 [I, I] and int64 [I].

    Raises:
        UserError: The matrix cannot be factored at all.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    hessian = hessian[order][:, order].clone()
    mean = float(diagonal.mean())
    damping = 0.01
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


def round_shard(
    weight: Tensor,
    frozen: Mapping[str, Tensor],
    factor: Tensor,
    order: Tensor,
    scheme: TensorScheme,
) -> Tensor:
    """Some rows of a weight, float32 [rows, I], moved to the grid of their `frozen` tensors.

    `factor` and `order` are those of `inverse_factor`.
    """

    def by_column(per_group: Tensor) -> Tensor:
        whole = scheme.granularity.expand(per_group, tuple(weight.shape)).expand_as(weight)
        return whole[:, order].t().contiguous()

    scales = by_column(frozen["scale"])
    zeros = by_column(frozen["zero_point"]) if "zero_point" in frozen else None
    left, done = weight[:, order].contiguous(), torch.empty_like(weight)
    width = weight.shape[1]
    for start in range(0, width, _COLUMNS):
        end = min(start + _COLUMNS, width)
        columns = left[:, start:end].t().contiguous()  # columns become rows: contiguous updates
        errors = torch.empty_like(columns)
        for i in range(end - start):
            column = columns[i].clone()
            zero = None if zeros is None else zeros[start + i]
            value = fake_quantize(
                column[:, None], scales[start + i], scheme.format, PerChannel(), zero_point=zero
            )[:, 0]
            done[:, start + i] = value
            errors[i] = (column - value) / factor[start + i, start + i]
            row = factor[start + i, start + i : end]
            columns[i:] -= row[:, None] * errors[i]
        left[:, end:] -= errors.t() @ factor[start:end, end:]
    result = torch.empty_like(done)
    result[:, order] = done
    return result
