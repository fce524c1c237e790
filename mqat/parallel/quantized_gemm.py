"""The quantized linear's autograd function: one-byte operands, straight-through gradients.

What is multiplied, by scheme: `step_weights.py`; the gradients: `linear_gradients.py`. Kept for
backward of an input in 8 bits: its codes and one bit per element (none per token, where nothing is
clipped), never a float copy. Inputs on other grids are quantized in here too (`operands.encode_input`),
but multiplied and kept as floats in the input's dtype. Only asymmetric ones that are not kept as codes
come as floats, from their quantizer, whose gradient is its own. A SwiGLU in front is computed in here
where its result would only be read to be encoded (`activated_linear.py`); then its input is kept, too.

Collectives, with local shapes (column-parallel; row-parallel linears have none in here):

    forward   sequence parallel: all-gather of codes  [S/tp, B, I] -> [S, B, I]; of their steps
              [S/tp, B] -> [S, B] too if every token has its own
    backward  sequence parallel: the same gather, under the input-gradient GEMM; then a reduce-scatter
              of the input gradient, under the weight-gradient GEMM
              otherwise: all-reduce of the input gradient [S, B, I], under the weight-gradient GEMM
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.errors import UserError
from mqat.kernels.gemm import compute_dtype, float_matmul
from mqat.kernels.operators import apply_mask_, scaled_matmul, swiglu_backward
from mqat.parallel.linear_gradients import (
    Rounding,
    accumulates,
    add_by_fused_kernel_,
    deliver,
    input_gradient,
    open_main_grad,
    returned,
    weight_gradient,
)
from mqat.parallel.operands import Operand, encode_activated, encode_input
from mqat.parallel.step_weights import GemmKind, StepWeight, WeightCache
from mqat.quant.granularity import PerToken
from mqat.quant.scheme import TensorScheme


@dataclass(frozen=True)
class Gemm:
    """How one call multiplies and communicates.

    Attributes:
        kind: From the scheme.
        input_scheme: None takes the input as it comes.
        allreduce_dgrad: Sum the input gradient over `tp_group`.
        sequence_parallel: Gather the input over `tp_group`, scatter its gradient.
        tp_group: Needed by either.
        keeps_graph: Whether autograd records this call.
        scope: Where the weight's gradient may be masked at the end of the step; None: at once.
        rounding: Of the output's gradient, for 8-bit GEMMs; None: exact gradients.
        fuses: `gradient_accumulation_fusion`: add the weight's gradient in Megatron's kernel.
        deferred: Megatron computes the weight's gradient later, from these two lists.
        activates: The input is [..., gate | up], of which SwiGLU is multiplied.
    """

    kind: GemmKind
    input_scheme: TensorScheme | None
    allreduce_dgrad: bool
    sequence_parallel: bool
    tp_group: Any
    keeps_graph: bool
    scope: WeightCache | None = None
    rounding: Rounding | None = None
    fuses: bool = False
    deferred: Deferred | None = None
    activates: bool = False


@dataclass(frozen=True)
class Deferred:
    """`defer_embedding_wgrad_compute`: what Megatron multiplies once all microbatches are through.

    Attributes:
        inputs: As Megatron keeps them; the last is this call's, not quantized yet.
        gradients: Of outputs [S, B, O], in the order of backward passes.
    """

    inputs: list[Tensor]
    gradients: list[Tensor]


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
        ctx.scope_number = gemm.scope.number if gemm.scope is not None else None
        operand, mask = Operand(x), None
        if gemm.activates:
            operand, mask = encode_activated(x, scale, gemm.input_scheme, wants_dx=wants_dx)
        elif gemm.input_scheme is not None:
            operand, mask = encode_input(x, scale, zero_point, gemm.input_scheme, wants_dx=wants_dx)
        if gemm.deferred is not None and wants_dw:
            gemm.deferred.inputs[-1] = operand.values(ctx.dtype)
            wants_dw = False
        kept = (operand.x, operand.scale, operand.zero_point) if wants_dw else (None, None, None)
        ctx.save_for_backward(*kept, mask, x if gemm.activates and wants_dx else None)
        if gemm.sequence_parallel:
            operand, _ = operand.gathered(gemm.tp_group)
        ctx.tokens = operand.x.shape[:-1]
        # No view of the result: autograd forbids in-place changes (a vocabulary loss's) of those.
        if gemm.kind is GemmKind.VALUES:
            values = operand.values(ctx.dtype)
            return float_matmul(values.reshape(-1, values.shape[-1]), used.operand.t(), ctx.dtype)
        assert operand.scale is not None and used.scale is not None, "codes have scales"
        if operand.granularity == PerToken():
            steps = operand.scale.view(-1)
            return scaled_matmul(operand.rows, used.operand, used.scale, ctx.dtype, row_scale=steps)
        return scaled_matmul(operand.rows, used.operand, operand.scale * used.scale, ctx.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Overlaps as Megatron does.

        The input gather under the dX GEMM, the sum of dX under the dW GEMM.
        """
        gemm: Gemm = ctx.gemm
        if gemm.scope is not None and gemm.scope.number != ctx.scope_number:
            raise UserError(
                "backward: another quantized_step has begun since this forward, so its gradient belongs "
                "to weights of an earlier step. Run backward before it opens."
            )
        x, scale, zero_point, mask, gate_and_up = ctx.saved_tensors
        group = gemm.tp_group
        wants_dx, wants_dw = ctx.needs_input_grad[:2]
        scheme = gemm.input_scheme
        granularity = scheme.granularity if scheme is not None and scale is not None else None
        operand = Operand(x, scale, zero_point, granularity)
        handles: list[Any] = []
        if gemm.sequence_parallel and x is not None:
            operand, handles = operand.gathered(group, async_op=True)
        dy = grads[0]
        if gemm.rounding is None:
            dy = dy.to(compute_dtype(ctx.dtype, dy.device))
        dx = dw = None
        if wants_dx:
            dx = input_gradient(dy, ctx.used, ctx.dtype, gemm.rounding)
            dx = dx.view(*ctx.tokens, dx.shape[-1])
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
            dw = _weight_gradient(ctx, grads[0], dy, operand)
        if sent is not None:
            sent.wait()
        if dx_sum is not None and gate_and_up is not None:
            dx_sum = swiglu_backward(dx_sum, gate_and_up, mask)
        elif dx_sum is not None and mask is not None:
            apply_mask_(dx_sum, mask, None)
        return dx_sum, dw, None, None, None, None


def _weight_gradient(ctx: Any, grad: Tensor, dy: Tensor, operand: Operand) -> Tensor:
    """What backward returns for the weight; `dy` is `grad` in the dtype of the exact GEMMs."""
    gemm, weight, used = ctx.gemm, ctx.weight, ctx.used
    assert used.mask is not None, "encoded with one for a weight that gets a gradient"
    is_summed = accumulates(ctx.next_functions[1][0])
    main_grad = open_main_grad(weight, accumulates=is_summed, fuses=gemm.fuses)
    is_owed = is_summed and gemm.scope is not None and gemm.scope.masks_later(weight, used)
    mask = None if is_owed else used.mask
    dw = None
    if gemm.deferred is not None:
        if main_grad is None or mask is not None:
            raise UserError(
                "defer_embedding_wgrad_compute: Megatron adds this gradient to main_grad when all "
                "microbatches are through, so it can be masked only at the end of a quantized_step "
                "around them, with DDP, and if the output layer is not tied. Set it to False."
            )
        gemm.deferred.gradients.append(grad.view(*ctx.tokens, grad.shape[-1]))
    elif main_grad is not None and gemm.fuses and mask is None and gemm.rounding is None:
        add_by_fused_kernel_(main_grad, grad, operand, ctx.dtype)
    else:
        dw, factor = weight_gradient(dy, operand, ctx.dtype, gemm.rounding)
        deliver(dw, mask, factor, main_grad)
        if main_grad is None:
            return dw
    return returned(weight, dw)


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

    The flag of `open_main_grad` outlives a microbatch, and without this the hook would drop the
    gradient.
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
        x: Float [S/tp, B, I] under sequence parallelism, else [S, B, I]; [S, B, 2 I] to activate.
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
