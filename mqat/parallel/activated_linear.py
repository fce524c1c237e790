"""A row-parallel linear with the SwiGLU in front of it inside, whose values are then never written.

Codes and mask of the input come out of the activation's kernel, and the gradient's mask goes into the
kernel of its backward: the same bits as by a module each, and as much is kept for backward. Whatever
must see the activated input gets it: hooks, observers, learned and dynamic scales, the reference, packed
weights.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mqat.parallel.linear import QuantRowParallelLinear
from mqat.parallel.step_weights import encodes_input
from mqat.quant.scheme import TensorScheme

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def fuses_activation(operand: TensorScheme | None) -> bool:
    """Whether codes of such an input can come out of the activation: 8 bits, one static step."""
    return operand is not None and encodes_input(operand) and not operand.is_dynamic


def _is_watched(module: nn.Module) -> bool:
    """Whether a hook may look at what the module reads; Megatron's own only gather parameters."""
    hooks = [hook for kind in _HOOKS for hook in getattr(module, kind).values()]
    return any(not hook.__module__.startswith("megatron.core.distributed") for hook in hooks)


class ActivatedRowParallelLinear(QuantRowParallelLinear):
    """`QuantRowParallelLinear` of [..., gate | up], which it activates, or of activated [..., I].

    Args:
        *args: As for the base class.
        activation: Makes the activation from Megatron's config; a model whose config has
            `use_te_activation_func` off activates before the linear.
        **kwargs: As for the base class.

    Attributes:
        activation: For calls that need the activated input; None: it comes activated.
    """

    input_size_per_partition: int
    activation: nn.Module | None

    def __init__(self, *args: Any, activation: type[nn.Module], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        owns = self.config.use_te_activation_func
        self.activation = activation(self.config) if owns else None

    def takes_gate_and_up(self, x: Tensor) -> bool:
        """Whether `x` is [..., gate | up], told by its width."""
        is_wide = x.shape[-1] == 2 * self.input_size_per_partition
        return self.activation is not None and is_wide

    def _fuses(self) -> bool:
        quantizer = self.input_quantizer
        return (
            not self.is_calibrating
            and self.packed_weight is None
            and (self.adapter is None or self._merges())  # beside the weight, it reads the input
            and self._is_fast()
            and quantizer is not None
            and fuses_activation(quantizer.scheme)
            and not _has_any_global_hook()
            and not any(_is_watched(module) for module in (self, self.activation) if module)
        )

    def __call__(self, x: Tensor) -> Any:
        """Activates first, before any hook, what the fast path does not."""
        if self.takes_gate_and_up(x) and not self._fuses():
            assert self.activation is not None, "takes_gate_and_up()"
            x = self.activation(x)
        return super().__call__(x)
