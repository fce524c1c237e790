"""RMSNorm and SwiGLU that keep their input for backward and nothing else of that size.

Where the CPU kernels do not serve, backward computes the forward once more; on CUDA torch's and
Megatron's own fused kernels already keep no more than this.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mqat.errors import UserError
from mqat.kernels.cpu import passes as native


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        if native.serves_floats(x, weight):
            out, rstd = native.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, rstd)
            return out
        ctx.save_for_backward(x, weight, None)
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        if rstd is None:
            dx, dweight = _recomputed(_torch_norm, grads[0], x, weight, eps=ctx.eps)
            return dx, dweight, None
        dx, dweight = native.rms_norm_backward(grads[0].contiguous(), x, weight, rstd)
        return dx, dweight.to(weight.dtype), None


def _torch_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _torch_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _recomputed(function: Any, grad: Tensor, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves, **options), leaves, grad)


class RmsNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """`x / rms(x) * weight`, computed in float32 and rounded once."""
        if x.is_cuda or self.weight is None or self.eps is None:
            return super().forward(x)
        result: Tensor = _RmsNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return result


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return native.swiglu(x) if native.serves_floats(x) else _torch_swiglu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if native.serves_floats(x, grads[0]):
            return native.swiglu_backward(grads[0], x)
        return _recomputed(_torch_swiglu, grads[0], x)[0]


class Swiglu:
    """`silu(gate) * up` of [..., gate | up]; in the place of Megatron's `activation_func` module.

    Not a module: Megatron's MLP asks the modules in it for their part of a checkpoint.
    """

    def __init__(self, config: Any) -> None:
        if not config.gated_linear_unit or config.activation_func is not F.silu:
            raise UserError(
                f"activation_func={config.activation_func} with gated_linear_unit="
                f"{config.gated_linear_unit}: this layer spec computes SwiGLU; use F.silu and True."
            )

    def __call__(self, x: Tensor) -> Tensor:
        """[..., 2 F] -> [..., F]."""
        if x.is_cuda:
            fused: Tensor = bias_swiglu_impl(x, None)
            return fused
        result: Tensor = _Swiglu.apply(x)  # type: ignore[no-untyped-call]
        return result
