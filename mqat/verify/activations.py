"""What norms and activations compute, by the words of `facts/`; float32, along the last dimension."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU as `gelu_new`, `gelu_pytorch_tanh` and TensorRT-LLM's `gelu` have it."""
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu_tanh": gelu_tanh, "squared_relu": lambda x: x.clamp_min(0) ** 2,
}  # fmt: skip


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """X / rms(x)."""
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """The same of x around its mean."""
    return rms_norm(x - x.mean(-1, keepdim=True), eps)


NORMS: dict[str, Callable[[Tensor, float], Tensor]] = {"rms": rms_norm, "layer": layer_norm}
