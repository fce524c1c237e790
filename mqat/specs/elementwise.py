"""RMSNorm and SwiGLU that keep their input for backward and nothing else of that size.

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
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, rstd = operators.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = operators.rms_norm_backward(grads[0], x, weight, rstd)
        return dx, dweight.to(weight.dtype), None


class RmsNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """`x / rms(x) * weight`, computed in float32 and rounded once."""
        if x.is_cuda or self.weight is None or self.eps is None:
            return super().forward(x)
        result: Tensor = _RmsNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return result


class Norm(nn.Module):
    """RMSNorm or LayerNorm, by `config.normalization`, that also works under sequence parallelism.

    Each rank normalizes its own tokens, so the parameters' gradients must be summed over the
    tensor-parallel group: Megatron does that for parameters marked `sequence_parallel`.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """Arguments as Megatron passes them to a norm; extra ones do not apply to torch norms."""
        kinds: dict[str, type[nn.Module]] = {"RMSNorm": RmsNorm, "LayerNorm": nn.LayerNorm}
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
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


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
