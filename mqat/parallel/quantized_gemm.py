"""The quantized linear's autograd function: one-byte operands, straight-through gradients.

What a linear computes and what it keeps of its weight for an optimizer step, by scheme:

| input             | weight               | kept of the weight | forward                            |
|-------------------|----------------------|--------------------|------------------------------------|
| INT8 per tensor   | INT8 per channel     | codes, mask        | integer GEMM, then one scale       |
| FP8 per tensor    | FP8 per tensor       | codes, mask        | GEMM of codes, then one scale      |
| INT8/FP8 p.tensor | other integer format | values, mask       | GEMM of dequantized operands       |
| -                 | any integer format   | values, mask       | GEMM with the dequantized weight   |

Any other scheme stays on the reference path (fake-quantized floats through Megatron's own GEMM).
Kept for backward of a quantized input: its codes and one bit per element, never a float copy.

Collectives, with local shapes (column-parallel; row-parallel linears have none in here):

    forward   sequence parallel: all-gather of codes  [S/tp, B, I] -> [S, B, I]
    backward  sequence parallel: the same gather, under the input-gradient GEMM; then a reduce-scatter
              of the input gradient, under the weight-gradient GEMM
              otherwise: all-reduce of the input gradient [S, B, I], under the weight-gradient GEMM
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.quant.formats import FP8_E4M3, INT4, INT8, INT8_FULL, INT8_LOADER
from mqat.quant.functional import dequantize, fake_quantize
from mqat.quant.gemm import compute_dtype, decode, float_matmul, scaled_matmul
from mqat.quant.gemm_operands import apply_mask_, encode, encode_input, mask_of
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor
from mqat.quant.scheme import LinearScheme, TensorScheme

_INT8 = (INT8, INT8_FULL, INT8_LOADER)
_INTEGERS = (*_INT8, INT4)


class GemmKind(Enum):
    """How operands are multiplied."""

    CODES = "codes"  # both operands as codes, the result scaled
    VALUES = "values"  # dequantized operands


def _is_plain(scheme: TensorScheme) -> bool:
    """Whether format, granularity and grid of scales say all there is to this scheme."""
    is_shifted = scheme.is_dynamic or scheme.is_asymmetric
    return not is_shifted and scheme.reach is None  # gradients end where codes do


def gemm_kind(scheme: LinearScheme | None) -> GemmKind | None:
    """Which fast path serves a scheme; None: only the reference path does."""
    if scheme is None or scheme.weight is None or not _is_plain(scheme.weight):
        return None
    weight, operand = scheme.weight, scheme.input
    is_per_row = isinstance(weight.granularity, (PerChannel, PerTensor))
    is_known = isinstance(weight.granularity, (PerChannel, PerTensor, PerGroup))
    if operand is None:
        return GemmKind.VALUES if weight.format in _INTEGERS and is_known else None
    if not _is_plain(operand) or operand.granularity != PerTensor():
        return None
    if operand.format in _INT8 and weight.format in _INT8 and is_per_row:
        return GemmKind.CODES
    if operand.format == FP8_E4M3 and weight.format == FP8_E4M3 and is_per_row:
        return GemmKind.CODES
    has_codes = operand.format in (*_INT8, FP8_E4M3)
    return GemmKind.VALUES if has_codes and weight.format in _INTEGERS and is_known else None


@dataclass(frozen=True)
class StepWeight:
    """A weight as an optimizer step uses it; shared by all microbatches and by recompute.

    Attributes:
        operand: Codes (`GemmKind.CODES`), or dequantized values in the parameter's dtype.
        scale: float32 (O,) or (1,) with codes; None with values.
        mask: Packed bits, 1 where the weight was not clipped; None: no gradient was wanted.
    """

    operand: Tensor
    scale: Tensor | None
    mask: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        held = [tensor for tensor in (self.operand, self.scale, self.mask) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


@torch.no_grad()
def encode_weight(
    weight: Tensor, scale: Tensor, scheme: TensorScheme, kind: GemmKind, *, with_mask: bool
) -> StepWeight:
    """Quantizes a weight [O, I] for as long as it does not change."""
    fmt, granularity = scheme.format, scheme.granularity
    if kind is GemmKind.CODES:
        encoded = encode(weight, scale, fmt, granularity, with_mask=with_mask)
        return StepWeight(encoded.codes, encoded.scale, encoded.mask)
    mask = mask_of(weight, scale, fmt, granularity) if with_mask else None
    return StepWeight(fake_quantize(weight, scale, fmt, granularity), None, mask)


@dataclass(frozen=True)
class Gemm:
    """How one call multiplies and communicates.

    Attributes:
        kind: From the scheme.
        input_scheme: None leaves the input in floats.
        allreduce_dgrad: Sum the input gradient over `tp_group`.
        sequence_parallel: Gather the input over `tp_group`, scatter its gradient.
        tp_group: Needed by either.
        keeps_graph: Whether autograd records this call.
    """

    kind: GemmKind
    input_scheme: TensorScheme | None
    allreduce_dgrad: bool
    sequence_parallel: bool
    tp_group: Any
    keeps_graph: bool


def _gather_tokens(local: Tensor, group: Any, *, async_op: bool = False) -> tuple[Tensor, Any]:
    """All-gathers along the first dimension; one-byte codes travel as bytes. Returns the handle."""
    shape = (local.shape[0] * group.size(), *local.shape[1:])
    full = torch.empty(shape, dtype=local.dtype, device=local.device)
    sent, received = local.contiguous(), full
    if local.element_size() == 1:
        sent, received = sent.view(torch.uint8), full.view(torch.uint8)
    handle = dist.all_gather_into_tensor(received, sent, group=group, async_op=async_op)
    return full, handle


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _QuantizedGemm(torch.autograd.Function):
    """`x @ w.T` with the gradients of the straight-through estimator."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, used: StepWeight, gemm: Gemm
    ) -> Tensor:
        """`weight` only receives the gradient; `used` is what is multiplied. Returns [N, O]."""
        wants_dx = gemm.keeps_graph and x.requires_grad
        wants_dw = gemm.keeps_graph and weight.requires_grad
        ctx.gemm, ctx.used, ctx.dtype = gemm, used, x.dtype
        if gemm.input_scheme is None:
            kept: list[Tensor | None] = [x if wants_dw else None, None, None]
        else:
            assert scale is not None, "a quantized input has a scale"
            fmt = gemm.input_scheme.format
            encoded = encode_input(x, scale, fmt, with_mask=wants_dx)
            x, scale = encoded.codes, encoded.scale
            kept = [encoded.codes if wants_dw else None, encoded.mask, encoded.scale]
        ctx.save_for_backward(*kept)
        if gemm.sequence_parallel:
            x, _ = _gather_tokens(x, gemm.tp_group)
        ctx.tokens = x.shape[:-1]
        if gemm.kind is GemmKind.CODES:
            assert scale is not None and used.scale is not None, "codes have scales"
            y = scaled_matmul(_rows(x), used.operand, scale * used.scale, ctx.dtype)
        else:
            if scale is not None:
                x = dequantize(x, scale, PerTensor(), ctx.dtype)
            y = float_matmul(_rows(x), used.operand.t(), ctx.dtype)
        return y  # no view of it: autograd forbids in-place changes (a vocabulary loss's) of those

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """As Megatron overlaps it: communication of the input under the GEMM of the other."""
        (dy,) = grads
        gemm: Gemm = ctx.gemm
        x, mask, scale = ctx.saved_tensors
        group = gemm.tp_group
        handle = None
        if gemm.sequence_parallel and ctx.needs_input_grad[1]:
            x, handle = _gather_tokens(x, group, async_op=True)
        wide = compute_dtype(ctx.dtype, dy.device)
        dy_rows = dy.to(wide)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(dy_rows, ctx.used, ctx.dtype).view(*ctx.tokens, -1)
        if handle is not None:
            handle.wait()
        sent, dx_sum = None, dx
        if dx is not None and gemm.sequence_parallel:
            shape = (dx.shape[0] // group.size(), *dx.shape[1:])
            dx_sum = torch.empty(shape, dtype=dx.dtype, device=dx.device)
            sent = dist.reduce_scatter_tensor(dx_sum, dx, group=group, async_op=True)
        elif dx is not None and gemm.allreduce_dgrad:
            sent = dist.all_reduce(dx, group=group, async_op=True)
        if ctx.needs_input_grad[1]:
            dw = _weight_gradient(dy_rows, x, scale, ctx.used, ctx.dtype)
        if sent is not None:
            sent.wait()
        if dx_sum is not None and mask is not None:
            apply_mask_(dx_sum, mask)
        return dx_sum, dw, None, None, None


def _input_gradient(dy_NO: Tensor, used: StepWeight, dtype: torch.dtype) -> Tensor:  # noqa: N803
    """`dy @ w`, [N, I], before masking. A scale per row of w is cheaper to put on dy."""
    wide = dy_NO.dtype
    if used.scale is None:
        return (dy_NO @ used.operand.to(wide)).to(dtype)
    return ((dy_NO * used.scale).to(wide) @ decode(used.operand, wide)).to(dtype)


def _weight_gradient(
    dy_NO: Tensor,  # noqa: N803
    x: Tensor,
    scale: Tensor | None,
    used: StepWeight,
    dtype: torch.dtype,
) -> Tensor:
    """`dy.T @ x`, [O, I], zero where the weight was clipped; x is codes when it has a scale."""
    x_NI = decode(_rows(x), dy_NO.dtype)  # noqa: N806
    if scale is not None:
        x_NI = x_NI.mul_(scale)  # noqa: N806
    dw = (dy_NO.t() @ x_NI).to(dtype)
    assert used.mask is not None, "encoded with a mask for a weight that gets a gradient"
    return apply_mask_(dw, used.mask)


def quantized_matmul(
    x: Tensor, weight: Tensor, input_scale: Tensor | None, used: StepWeight, gemm: Gemm
) -> Tensor:
    """`x @ weight.T` of the quantized operands, differentiable in `x` and `weight`.

    Args:
        x: Float [S/tp, B, I] under sequence parallelism, else [S, B, I].
        weight: The parameter [O, I] that receives the gradient.
        input_scale: float32 (1,); None leaves the input in floats.
        used: What `encode_weight` made of `weight`.
        gemm: Kind and communication.

    Returns:
        [S, B, O] in the dtype of `x`.
    """
    rows: Tensor = _QuantizedGemm.apply(x, weight, input_scale, used, gemm)  # type: ignore[no-untyped-call]
    sequence = x.shape[0] * (gemm.tp_group.size() if gemm.sequence_parallel else 1)
    return rows.view(sequence, *x.shape[1:-1], rows.shape[-1])
