"""The quantized linear's two gradients, exact or of 8-bit codes, and how the weight's is delivered.

With dY [N, O] of the output, codes q and steps s of both operands:

| gradient | exact              | 8 bits: codes g of dY are rounded stochastically, with steps r       |
|----------|--------------------|----------------------------------------------------------------------|
| input    | dX = dY (s_w q_w)  | g, r of dY * s_w by rows (tokens);     dX = r * (g q_w)              |
| weight   | dW = dY^T (s_x q_x)| g, r of dY * s_x by columns (outputs); dW = r * (g^T q_x)            |

The step of an operand that lies along the summed dimension cannot be taken out of the sum, so it is
multiplied into dY before that is rounded (a single step for the tensor can, and is). The operands' own
codes are used as they are. Sources: SwitchBack (Wortsman et al. 2023, arXiv:2304.13013), Jetfire (Xi et
al. 2024, arXiv:2403.12422), HALO (Ashkboos et al. 2025, arXiv:2501.02625).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import layers as megatron_layers
from torch import Tensor

from mqat.kernels.gemm import transposed
from mqat.kernels.operators import (
    accumulate_,
    apply_mask_,
    decode,
    scaled_matmul,
    stochastic_columns,
    stochastic_rows,
)
from mqat.parallel.operands import Operand
from mqat.parallel.step_weights import StepWeight
from mqat.quant.formats import QuantFormat
from mqat.quant.granularity import PerChannel, PerTensor, PerToken

_OTHER_NOISE = 0x5BD1E995


@dataclass(frozen=True)
class Rounding:
    """How one backward call rounds its output gradient to 8 bits.

    Attributes:
        format: Of both operands, and so of the gradient's codes.
        columns: int32 (O,): numbers of this rank's outputs in the whole linear.
        seed: 32 bits.
    """

    format: QuantFormat
    columns: Tensor
    seed: int


class GradientNoise:
    """One linear's source of `Rounding`s: a new one for every forward that backward follows.

    Attributes:
        step: Of the optimizer, set by `quantized_step`.
        microbatch: Forwards with a graph so far in this step.
    """

    def __init__(self, fmt: QuantFormat, columns: Tensor, salt: str) -> None:
        self.step = self.microbatch = 0
        self._format, self._columns, self._salt = fmt, columns, salt

    def begin_step(self, step: int | None) -> None:
        """Counts microbatches from the first again; None: the step after the last."""
        self.step, self.microbatch = self.step + 1 if step is None else step, 0

    def next_rounding(self) -> Rounding:
        """For the microbatch that comes next."""
        name = f"{self._salt} {self.step} {self.microbatch}"
        self.microbatch += 1
        return Rounding(self._format, self._columns, zlib.crc32(name.encode()))


def input_gradient(
    dy_NO: Tensor,  # noqa: N803
    used: StepWeight,
    dtype: torch.dtype,
    rounding: Rounding | None,
) -> Tensor:
    """`dy @ w`, [N, I], before masking."""
    scale = used.scale
    if rounding is not None:
        assert scale is not None, "8-bit gradients need codes"
        is_one = scale.numel() == 1
        codes, steps = stochastic_rows(
            dy_NO, None if is_one else scale, rounding.columns, rounding.format.name, rounding.seed
        )
        left = scale if is_one else steps.new_ones(1)
        return scaled_matmul(codes, transposed(used.operand), left, dtype, row_scale=steps)
    wide = dy_NO.dtype
    if scale is None:
        return (dy_NO @ used.operand.to(wide)).to(dtype)
    granularity = PerTensor() if scale.numel() == 1 else PerChannel()
    weight = decode(used.operand, wide, scale=scale, granularity=granularity)
    return (dy_NO @ weight).to(dtype)


def weight_gradient(
    dy_NO: Tensor,  # noqa: N803
    operand: Operand,
    dtype: torch.dtype,
    rounding: Rounding | None,
) -> tuple[Tensor, Tensor | None]:
    """`dy.T @ x`, [O, I], before masking, and the factor (1,) that it lacks."""
    if rounding is not None:
        scale = operand.scale
        assert scale is not None, "8-bit gradients need codes"
        is_one = operand.granularity != PerToken()
        codes, steps = stochastic_columns(
            dy_NO, None if is_one else scale.view(-1), rounding.columns, rounding.format.name,
            rounding.seed ^ _OTHER_NOISE,
        )  # fmt: skip
        left = scale if is_one else steps.new_ones(1)
        product = scaled_matmul(codes, transposed(operand.rows), left, dtype, row_scale=steps)
        return product, None
    if operand.granularity == PerTensor():
        # Codes are exact in float32 and bfloat16; the scale is applied in the pass that adds it up.
        return (dy_NO.t() @ decode(operand.rows, dy_NO.dtype)).to(dtype), operand.scale
    values = operand.values(dy_NO.dtype)
    return (dy_NO.t() @ values.reshape(-1, values.shape[-1])).to(dtype), None


def accumulates(node: Any) -> bool:
    """Whether this backward pass ends in `.grad` (and Megatron's hook) of the leaf behind `node`."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # says that `torch.autograd.grad` collects it
        return False


def open_main_grad(weight: Any, *, accumulates: bool, fuses: bool) -> Tensor | None:
    """`main_grad`, if Megatron lets kernels add to it in this pass; None: return the gradient.

    `grad_added_to_main_grad` tells its DDP hook, which runs next, to leave the returned tensor alone.
    Not while `torch.autograd.grad` collects gradients, which nobody would add up (`accumulates`).
    `fuses` is `gradient_accumulation_fusion`: gradients are added up here in any dtype.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None or not hasattr(weight, "grad_added_to_main_grad"):
        return None
    is_added = accumulates and (fuses or main_grad.dtype == torch.float32)
    weight.grad_added_to_main_grad = is_added
    return main_grad if is_added else None


def add_by_fused_kernel_(
    main_grad: Tensor,
    dy_NO: Tensor,  # noqa: N803
    operand: Operand,
    dtype: torch.dtype,
) -> None:
    """`main_grad += dy.T @ x` in Megatron's one kernel (`gradient_accumulation_fusion`)."""
    name = "wgrad_gemm_accum_fp32" if main_grad.dtype == torch.float32 else "wgrad_gemm_accum_fp16"
    values = operand.values(dtype)
    kernel = getattr(megatron_layers.fused_weight_gradient_mlp_cuda, name)
    kernel(values.reshape(-1, values.shape[-1]), dy_NO.contiguous(), main_grad)


def deliver(
    dw: Tensor, mask: Tensor | None, factor: Tensor | None, main_grad: Tensor | None
) -> None:
    """Scales and masks a weight gradient, in place or, if there is one, on its way to `main_grad`."""
    if main_grad is not None and main_grad.dtype == torch.float32:
        accumulate_(main_grad, dw, mask, factor)
        return
    if mask is not None or factor is not None:
        apply_mask_(dw, mask, factor)
    if main_grad is not None:
        main_grad.add_(dw)


def returned(weight: Any, dw: Tensor | None) -> Tensor:
    """What autograd gets when `main_grad` has the gradient: something of its shape, never read.

    But where Megatron marks `zero_out_wgrad`, its hook adds it all the same.
    """
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight) if dw is None else dw
