"""The MLP's activation: of a family, and of a Megatron configuration whatever the function is called."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mqat.models.family import Activation


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its approximation with tanh."""
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU."""
    return F.relu(x).square()


# Other functions: what Megatron offers besides, so that it is called by its name.
FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu_tanh": gelu_tanh, "relu2": relu2,
}  # fmt: skip


def find_activation(config: Any) -> Activation | None:
    """The activation of a `TransformerConfig`; None: none of a family's."""
    return activation_of(config.activation_func, config)


def activation_of(function: Any, config: Any) -> Activation | None:
    """What Megatron's MLP computes with a function, told by values; None: none of a family's."""
    if config.bias_activation_fusion and function is F.gelu:
        return "gelu_tanh"  # as Megatron's fused kernels do
    x = torch.linspace(-4, 4, 64)
    for name, known in FUNCTIONS.items():
        try:
            if torch.allclose(function(x), known(x), atol=1e-5):
                return name
        except (TypeError, ValueError, RuntimeError):
            return None
    return None
