"""What changes about quantizers during a phase, by optimizer step: which are on, and weights' bits.

Everything follows from the step, which checkpoints hold, so a resumed run is in the right stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mqat.parallel.quantized_module import quantized_modules
from mqat.quant.formats import FORMATS, QuantFormat
from mqat.quant.scheme import LinearScheme, TensorScheme


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

    def apply_(self, model: Any, step: int) -> None:
        """Sets every quantizer of this rank for the optimizer step `step`, counted from 0."""
        inputs = self.on_after if self.inputs_on_after is None else self.inputs_on_after
        started = [bits for first, bits in self.bits if first <= step]
        for name, module in quantized_modules(model).items():
            for kind, quantizer in module.quantizers.items():
                quantizer.is_enabled = step >= (inputs if kind == "input" else self.on_after)
                if kind == "weight" and name.startswith("decoder."):
                    quantizer.stage = _stage(quantizer.scheme, started[-1]) if started else None


def _stage(scheme: TensorScheme, bits: int) -> QuantFormat | None:
    return None if bits == scheme.format.bits else FORMATS[f"int{bits}"]


def _is_stage(stage: Any) -> bool:
    return (
        isinstance(stage, Sequence)
        and [type(number) for number in stage] == [int, int]
        and 2 <= stage[1] <= 8
    )


def check_bits(stages: Sequence[Any], layers: Mapping[str, LinearScheme]) -> None:
    """Refuses a bit schedule that does not end in what is served.

    Args:
        stages: `quantization.bit_schedule`, [first step, bits] each.
        layers: Resolved schemes.

    Raises:
        ValueError: Stages out of order, or a weight that cannot follow them; names the linear.
    """
    if not stages:
        return
    key = "config: quantization.bit_schedule"
    if not all(_is_stage(stage) for stage in stages):
        raise ValueError(f"{key}={list(stages)} must be a list of [first step, bits from 2 to 8].")
    firsts = [first for first, _ in stages]
    if firsts[0] != 0 or any(a >= b for a, b in pairwise(firsts)):
        raise ValueError(f"{key}: first steps {firsts} must start at 0 and ascend.")
    for name, scheme in layers.items():
        weight = scheme.weight
        if weight is None:
            continue
        if not weight.format.is_uniform or weight.is_asymmetric:
            raise ValueError(
                f"{key}: {name}.weight has format {weight.format.name!r}"
                f"{' with a zero point' * weight.is_asymmetric}; only symmetric integer weights can "
                "go through stages of other integer formats."
            )
        if stages[-1][1] != weight.format.bits:
            raise ValueError(
                f"{key}: the last stage has {stages[-1][1]} bits, but {name}.weight is served as "
                f"{weight.format.name!r} of {weight.format.bits}; end the schedule with "
                f"[<step>, {weight.format.bits}]."
            )
