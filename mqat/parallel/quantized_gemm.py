"""The quantized linear's autograd function: one-byte operands, straight-through gradients.

What a linear computes and what it keeps of its weight for an optimizer step, by scheme:

| input                   | weight                | kept of the weight | forward                       |
|-------------------------|-----------------------|--------------------|-------------------------------|
| INT8, tensor or token   | INT8 per channel      | codes, mask        | integer GEMM, then the scales |
| FP8, tensor or token    | FP8 tensor or channel | codes, mask        | GEMM of codes, then scales    |
| INT8 (any token), FP8   | other integer format  | values, mask       | GEMM of dequantized operands  |
| -                       | any integer format    | values, mask       | GEMM with dequantized weight  |

Any other scheme stays on the reference path (fake-quantized floats through Megatron's own GEMM).
Kept for backward of a quantized input: its codes and one bit per element (none per token, where nothing
is clipped), never a float copy. On a CPU the masked weight gradient is added to Megatron's `main_grad`
here, in one pass, by the protocol of its own fused kernels (`grad_added_to_main_grad`).

Collectives, with local shapes (column-parallel; row-parallel linears have none in here):

    forward   sequence parallel: all-gather of codes  [S/tp, B, I] -> [S, B, I]; of their steps
              [S/tp, B] -> [S, B] too if every token has its own
    backward  sequence parallel: the same gather, under the input-gradient GEMM; then a reduce-scatter
              of the input gradient, under the weight-gradient GEMM
              otherwise: all-reduce of the input gradient [S, B, I], under the weight-gradient GEMM
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.kernels.gemm import compute_dtype, float_matmul
from mqat.kernels.operators import (
    accumulate_,
    apply_mask_,
    decode,
    encode,
    fake_quantize_with_mask,
    scaled_matmul,
)
from mqat.kernels.stored import Stored
from mqat.quant.formats import FP8_E4M3, INT8_FORMATS, QuantFormat
from mqat.quant.functional import fake_quantize
from mqat.quant.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from mqat.quant.scheme import LinearScheme, TensorScheme


class GemmKind(Enum):
    """How operands are multiplied."""

    CODES = "codes"  # both operands as codes, the result scaled
    VALUES = "values"  # dequantized operands


def _is_integer(fmt: QuantFormat) -> bool:
    return not fmt.is_float and fmt.storage_dtype == torch.int8


def _serves_weight(weight: TensorScheme) -> bool:
    is_known = isinstance(weight.granularity, (PerChannel, PerTensor, PerGroup))
    is_fp8 = weight.format == FP8_E4M3 and weight.ste_clip_range is None
    is_shifted = weight.is_dynamic or weight.is_asymmetric
    return is_known and not is_shifted and (_is_integer(weight.format) or is_fp8)


def _serves_input(operand: TensorScheme) -> bool:
    """Whether the fast path takes this input: 8 bits, static per tensor or dynamic per token."""
    is_static = operand.granularity == PerTensor() and not operand.is_asymmetric
    is_per_token = operand.granularity == PerToken() and operand.is_dynamic
    return operand.format in (*INT8_FORMATS, FP8_E4M3) and (is_static or is_per_token)


def gemm_kind(scheme: LinearScheme | None) -> GemmKind | None:
    """Which fast path serves a scheme; None: only the reference path does."""
    if scheme is None or scheme.weight is None or not _serves_weight(scheme.weight):
        return None
    weight, operand = scheme.weight, scheme.input
    if operand is None:
        return GemmKind.VALUES if _is_integer(weight.format) else None
    if not _serves_input(operand):
        return None
    is_per_row = isinstance(weight.granularity, (PerChannel, PerTensor))
    is_int8 = operand.format in INT8_FORMATS and weight.format in INT8_FORMATS
    is_fp8 = operand.format == FP8_E4M3 and weight.format == FP8_E4M3
    if is_per_row and (is_int8 or is_fp8) and not operand.is_asymmetric:
        return GemmKind.CODES
    return GemmKind.VALUES if _is_integer(weight.format) else None


@dataclass(frozen=True)
class StepWeight(Stored):
    """A weight as an optimizer step uses it; shared by all microbatches and by recompute.

    Attributes:
        operand: Codes (`GemmKind.CODES`), or dequantized values in the parameter's dtype.
        scale: float32 (O,) or (1,) with codes; None with values.
        mask: Packed bits, 1 where the weight was not clipped; None: no gradient was wanted.
    """

    operand: Tensor
    scale: Tensor | None
    mask: Tensor | None


@torch.no_grad()
def encode_weight(
    weight: Tensor, scale: Tensor, scheme: TensorScheme, kind: GemmKind, *, with_mask: bool
) -> StepWeight:
    """Quantizes a weight [O, I] for as long as it does not change."""
    fmt, granularity, ste_clip_range = scheme.format, scheme.granularity, scheme.ste_clip_range
    if kind is GemmKind.CODES:
        encoded = encode(
            weight, scale, fmt, granularity, with_mask=with_mask, ste_clip_range=ste_clip_range
        )
        return StepWeight(encoded.codes, encoded.scale, encoded.mask)
    if not with_mask:
        return StepWeight(fake_quantize(weight, scale, fmt, granularity), None, None)
    values, mask = fake_quantize_with_mask(
        weight, scale, fmt, granularity, ste_clip_range=ste_clip_range
    )
    return StepWeight(values, None, mask)


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


def _gather_tokens(
    local: Tensor, group: dist.ProcessGroup, *, async_op: bool = False
) -> tuple[Tensor, Any]:
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


@dataclass(frozen=True)
class _Operand:
    """An input as this rank has it or, once gathered, of all tokens.

    Attributes:
        x: Codes with `scale`, floats without.
        scale: float32 (1,), or [S, B] with a step per token.
        zero_point: int32, shaped like `scale`, of asymmetric codes.
        granularity: Of the scale; None without.
    """

    x: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    granularity: Granularity | None

    def values(self, dtype: torch.dtype) -> Tensor:
        """In floats."""
        if self.scale is None or self.granularity is None:
            return self.x.to(dtype)
        return decode(
            self.x,
            dtype,
            scale=self.scale,
            granularity=self.granularity,
            zero_point=self.zero_point,
        )

    def gathered(
        self, group: dist.ProcessGroup, *, async_op: bool = False
    ) -> tuple[_Operand, list[Any]]:
        """Of all sequence-parallel ranks, and handles to wait for."""
        handles, parts = [], []
        for part in (self.x, self.scale, self.zero_point):
            if part is not None and (part is self.x or self.granularity == PerToken()):
                part, handle = _gather_tokens(part, group, async_op=async_op)
                handles.append(handle)
            parts.append(part)
        x, scale, zero_point = parts
        assert x is not None, "gathered"
        return _Operand(x, scale, zero_point, self.granularity), [
            h for h in handles if h is not None
        ]


class _QuantizedGemm(torch.autograd.Function):
    """`x @ w.T` with the gradients of the straight-through estimator."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        used: StepWeight,
        gemm: Gemm,
    ) -> Tensor:
        """`weight` only receives the gradient; `used` is what is multiplied. Returns [N, O]."""
        wants_dx = gemm.keeps_graph and x.requires_grad
        wants_dw = gemm.keeps_graph and weight.requires_grad
        ctx.gemm, ctx.used, ctx.dtype, ctx.weight = gemm, used, x.dtype, weight
        operand, mask = _Operand(x, None, None, None), None
        if gemm.input_scheme is not None:
            operand, mask = _encode_input(x, scale, zero_point, gemm.input_scheme, wants_dx)
        kept = (operand.x, operand.scale, operand.zero_point) if wants_dw else (None, None, None)
        ctx.save_for_backward(*kept, mask)
        if gemm.sequence_parallel:
            operand, _ = operand.gathered(gemm.tp_group)
        ctx.tokens = operand.x.shape[:-1]
        # No view of the result: autograd forbids in-place changes (a vocabulary loss's) of those.
        if gemm.kind is GemmKind.VALUES:
            return float_matmul(_rows(operand.values(ctx.dtype)), used.operand.t(), ctx.dtype)
        assert operand.scale is not None and used.scale is not None, "codes have scales"
        codes = _rows(operand.x)
        if operand.granularity == PerToken():
            steps = operand.scale.view(-1)
            return scaled_matmul(codes, used.operand, used.scale, ctx.dtype, row_scale=steps)
        return scaled_matmul(codes, used.operand, operand.scale * used.scale, ctx.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Overlaps as Megatron does.

        The input gather under the dX GEMM, the sum of dX under the dW GEMM.
        """
        gemm: Gemm = ctx.gemm
        x, scale, zero_point, mask = ctx.saved_tensors
        group = gemm.tp_group
        wants_dx, wants_dw = ctx.needs_input_grad[:2]
        scheme = gemm.input_scheme
        operand = _Operand(x, scale, zero_point, scheme.granularity if scheme else None)
        handles: list[Any] = []
        if gemm.sequence_parallel and wants_dw:
            operand, handles = operand.gathered(group, async_op=True)
        dy_rows = grads[0].to(compute_dtype(ctx.dtype, grads[0].device))
        dx = dw = None
        if wants_dx:
            dx = _input_gradient(dy_rows, ctx.used, ctx.dtype).view(*ctx.tokens, -1)
        for handle in handles:
            handle.wait()
        sent, dx_sum = None, dx
        if dx is not None and gemm.sequence_parallel:
            shape = (dx.shape[0] // group.size(), *dx.shape[1:])
            dx_sum = torch.empty(shape, dtype=dx.dtype, device=dx.device)
            sent = dist.reduce_scatter_tensor(dx_sum, dx, group=group, async_op=True)
        elif dx is not None and gemm.allreduce_dgrad:
            sent = dist.all_reduce(dx, group=group, async_op=True)
        if wants_dw:
            dw, factor = _weight_gradient(dy_rows, operand, ctx.dtype)
            assert ctx.used.mask is not None, "encoded with one for a weight that gets a gradient"
            dw = _deliver(dw, ctx.used.mask, factor, ctx.weight, ctx.next_functions[1][0])
        if sent is not None:
            sent.wait()
        if dx_sum is not None and mask is not None:
            apply_mask_(dx_sum, mask, None)
        return dx_sum, dw, None, None, None, None


def _encode_input(
    x: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    scheme: TensorScheme,
    wants_dx: bool,
) -> tuple[_Operand, Tensor | None]:
    assert scale is not None, "a quantized input has a scale"
    clips = scheme.ste_clip_range is None or math.isfinite(scheme.ste_clip_range)
    encoded = encode(
        x, scale, scheme.format, scheme.granularity,
        with_mask=wants_dx and clips, zero_point=zero_point, ste_clip_range=scheme.ste_clip_range,
    )  # fmt: skip
    return _Operand(encoded.codes, encoded.scale, zero_point, scheme.granularity), encoded.mask


def _input_gradient(dy_NO: Tensor, used: StepWeight, dtype: torch.dtype) -> Tensor:  # noqa: N803
    """`dy @ w`, [N, I], before masking."""
    wide = dy_NO.dtype
    if used.scale is None:
        return (dy_NO @ used.operand.to(wide)).to(dtype)
    granularity = PerTensor() if used.scale.numel() == 1 else PerChannel()
    weight = decode(used.operand, wide, scale=used.scale, granularity=granularity)
    return (dy_NO @ weight).to(dtype)


def _weight_gradient(
    dy_NO: Tensor,  # noqa: N803
    operand: _Operand,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """`dy.T @ x`, [O, I], before masking, and the factor (1,) that it lacks."""
    codes = operand.x
    if operand.granularity == PerTensor():
        # Codes are exact in float32 and bfloat16; the scale is applied in the pass that masks.
        return (dy_NO.t() @ decode(_rows(codes), dy_NO.dtype)).to(dtype), operand.scale
    return (dy_NO.t() @ _rows(operand.values(dy_NO.dtype))).to(dtype), None


def _accumulates(node: Any) -> bool:
    """Whether this backward pass ends in `.grad` (and Megatron's hook) of the leaf behind `node`."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # says that `torch.autograd.grad` collects it
        return False


def _deliver(
    dw: Tensor, mask: Tensor, factor: Tensor | None, weight: Tensor, accumulator: Any
) -> Tensor:
    """Masks a weight gradient; adds it to `main_grad` at once where Megatron lets kernels do so.

    `grad_added_to_main_grad` tells its DDP hook, which runs next, to leave the returned tensor alone.
    Not while `torch.autograd.grad` collects gradients, which nobody would add up.
    """
    main_grad: Any = getattr(weight, "main_grad", None)
    is_added = False
    if hasattr(weight, "grad_added_to_main_grad") and main_grad is not None:
        is_added = main_grad.dtype == torch.float32 and _accumulates(accumulator)
        weight.grad_added_to_main_grad = is_added
    if is_added:
        accumulate_(main_grad, dw, mask, factor)
    else:
        apply_mask_(dw, mask, factor)
    return dw


class _AccumulatedByMegatron(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        ctx.weight.grad_added_to_main_grad = False
        return grads[0]


def accumulated_by_megatron(weight: Tensor) -> Tensor:
    """The weight, for a pass that leaves its gradient to Megatron's hook.

    The flag of `_deliver` outlives a microbatch, and without this the hook would drop the gradient.
    """
    if not (weight.requires_grad and hasattr(weight, "grad_added_to_main_grad")):
        return weight
    marked: Tensor = _AccumulatedByMegatron.apply(weight)  # type: ignore[no-untyped-call]
    return marked


def quantized_matmul(
    x: Tensor,
    weight: Tensor,
    input_qparams: tuple[Tensor | None, Tensor | None],
    used: StepWeight,
    gemm: Gemm,
) -> Tensor:
    """`x @ weight.T` of the quantized operands, differentiable in `x` and `weight`.

    Args:
        x: Float [S/tp, B, I] under sequence parallelism, else [S, B, I].
        weight: The parameter [O, I] that receives the gradient.
        input_qparams: float32 scale (1,), or [S/tp, B] per token; int32 zero point shaped like it or
            None. No scale leaves the input in floats.
        used: What `encode_weight` made of `weight`.
        gemm: Kind and communication.

    Returns:
        [S, B, O] in the dtype of `x`.
    """
    rows: Tensor = _QuantizedGemm.apply(x, weight, *input_qparams, used, gemm)  # type: ignore[no-untyped-call]
    sequence = x.shape[0] * (gemm.tp_group.size() if gemm.sequence_parallel else 1)
    return rows.view(sequence, *x.shape[1:-1], rows.shape[-1])
