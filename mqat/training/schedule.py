"""What changes about quantizers during a phase, by optimizer step: which are on, and weights' bits.

Everything follows from the step, which checkpoints hold, so a resumed run is in the right stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mqat.models.structure import is_in_layer
from mqat.parallel.quantized_module import quantized_modules
from mqat.quant.formats import FORMATS, QuantFormat
from mqat.quant.scheme import TensorScheme


@dataclass(frozen=True)
class QuantizerSchedule:
    """By default everything is on and in its final format from the first step.

    Attributes:
        on_after: Steps for which calibrated quantizers stay off.
        inputs_on_after: The same for input quantizers; None: as the others.
        bits: (first step, bits of all layers' weights), ascending; empty: the scheme's, always.
    """

    on_after: int = 0
    inputs_on_after: int | None = None
    bits: Sequence[tuple[int, int]] = ()

    @property
    def settled_after(self) -> int:
        """Steps after which nothing changes any more."""
        inputs = self.on_after if self.inputs_on_after is None else self.inputs_on_after
        return max([self.on_after, inputs, *(first for first, _ in self.bits)])

    def apply_(self, model: Any, step: int) -> None:
        """Sets every quantizer of this rank for the optimizer step `step`, counted from 0."""
        inputs = self.on_after if self.inputs_on_after is None else self.inputs_on_after
        started = [bits for first, bits in self.bits if first <= step]
        for name, module in quantized_modules(model).items():
            for kind, quantizer in module.quantizers.items():
                quantizer.is_enabled = step >= (inputs if kind == "input" else self.on_after)
                if kind == "weight" and is_in_layer(name):
                    quantizer.active_format = (
                        _stage(quantizer.scheme, started[-1]) if started else None
                    )


def _stage(scheme: TensorScheme, bits: int) -> QuantFormat | None:
    return None if bits == scheme.format.bits else FORMATS[f"int{bits}"]
