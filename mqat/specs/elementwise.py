"""Norms and SwiGLU; RMSNorm and SwiGLU keep their input for backward and nothing else of that size.

On CUDA torch's own RMSNorm already keeps no more than this.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mqat.errors import UserError
from mqat.kernels import operators


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.offset = offset
        out, rstd = operators.rms_norm(*_RmsNorm.operands(x, weight, offset), eps)
        ctx.save_for_backward(x, weight, rstd)
        return out.to(x.dtype)

    @staticmethod
    def operands(x: Tensor, weight: Tensor, offset: float) -> tuple[Tensor, Tensor]:
        """Input and factors; in float32 where `1 + weight` would be rounded."""
        return (x.float(), weight.float() + offset) if offset else (x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        operands = _RmsNorm.operands(x, weight, ctx.offset)
        dx, dweight = operators.rms_norm_backward(grads[0].to(operands[0].dtype), *operands, rstd)
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None


class RmsNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension, also with weights that are stored less one.

    Attributes:
        zero_centered_gamma: It multiplies by `1 + weight`.
    """

    zero_centered_gamma = False

    def forward(self, x: Tensor) -> Tensor:
        """`x / rms(x) * weight`, computed in float32 and rounded once."""
        offset = float(self.zero_centered_gamma)
        if self.weight is None or self.eps is None or (x.is_cuda and not offset):
            return super().forward(x)
        if x.is_cuda:
            factors = _RmsNorm.operands(x, self.weight, offset)
            return F.rms_norm(factors[0], self.normalized_shape, factors[1], self.eps).to(x.dtype)
        result: Tensor = _RmsNorm.apply(x, self.weight, self.eps, offset)  # type: ignore[no-untyped-call]
        return result


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`, also with weights that are stored less one (LayerNorm1P).

    Attributes:
        zero_centered_gamma: It multiplies by `1 + weight`, rounded to the weight's dtype as servers do.
    """

    zero_centered_gamma = False

    def forward(self, x: Tensor) -> Tensor:
        """`(x - mean) / sqrt(variance + eps) * weight + bias`."""
        if not self.zero_centered_gamma:
            return super().forward(x)
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class Norm(nn.Module):
    """RMSNorm or LayerNorm, by `config.normalization`, that also works under sequence parallelism.

    Multiplies by `1 + weight` where `config.layernorm_zero_centered_gamma` says so. Each rank normalizes
    its own tokens, so the parameters' gradients must be summed over the tensor-parallel group: Megatron
    does that for parameters marked `sequence_parallel`.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """Arguments as Megatron passes them to a norm; extra ones do not apply to torch norms."""
        kinds: dict[str, Any] = {"RMSNorm": RmsNorm, "LayerNorm": LayerNorm}
        if config.normalization not in kinds:
            raise UserError(
                f"normalization={config.normalization!r}: only {sorted(kinds)} are supported."
            )
        norm = kinds[config.normalization](
            hidden_size,
            eps=eps,
            device=torch.cuda.current_device(),
            dtype=config.params_dtype,
        )
        norm.zero_centered_gamma = bool(config.layernorm_zero_centered_gamma)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class OutputNorm(nn.Module):
    """A norm of what attention or MLP adds; in the place of Megatron's `*_bda`, which adds it.

    Args:
        config: Megatron's, which its builder does not give.
        make_norm: Class of the norm.
    """

    def __init__(self, config: Any, make_norm: Any = Norm) -> None:
        super().__init__()
        self.norm = make_norm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )

    def forward(self, training: bool, _: bool) -> Any:
        """A function of (output, its bias), the hidden states before, and a rate of dropout."""

        def add(output: tuple[Tensor, Tensor | None], residual: Tensor, rate: float) -> Tensor:
            x, bias = output
            normed = self.norm(x if bias is None else x + bias)
            return residual + F.dropout(normed, rate, training)

        return add


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return operators.swiglu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return operators.swiglu_backward(grads[0], x, None)


class Swiglu(nn.Module):
    """`silu(gate) * up` of [..., gate | up]; in the place of Megatron's `activation_func` module."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not config.gated_linear_unit or config.activation_func is not F.silu:
            raise UserError(
                f"activation_func={config.activation_func} with gated_linear_unit="
                f"{config.gated_linear_unit}: this layer spec computes SwiGLU; use F.silu and True."
            )

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing: Megatron's MLP asks the modules in it for their part of a checkpoint."""
        return {}

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 F] -> [..., F]."""
        result: Tensor = _Swiglu.apply(x)  # type: ignore[no-untyped-call]
        return result


class ActivatedLater(Swiglu):
    """In the place of a `Swiglu` that the linear behind it has inside."""

    def forward(self, x: Tensor) -> Tensor:
        """What is given."""
        return x
