"""Refuses a schedule of weight bits that does not end in what is served."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mqat.errors import UserError
from mqat.quant.scheme import LinearScheme


def _is_stage(stage: Any) -> bool:
    return (
        isinstance(stage, Sequence)
        and [type(number) for number in stage] == [int, int]
        and 2 <= stage[1] <= 8
    )


def check_bits(stages: Sequence[Any], layers: Mapping[str, LinearScheme]) -> None:
    """Refuses a bit schedule, [first step, bits] each, that does not end in what is served.

    Raises:
        UserError: Stages out of order, or a weight that cannot follow them; names the linear.
    """
    if not stages:
        return
    key = "config: quantization.bit_schedule"
    if not all(_is_stage(stage) for stage in stages):
        raise UserError(f"{key}={list(stages)} must be a list of [first step, bits from 2 to 8].")
    firsts = [first for first, _ in stages]
    if firsts[0] != 0 or any(a >= b for a, b in pairwise(firsts)):
        raise UserError(f"{key}: first steps {firsts} must start at 0 and ascend.")
    for name, scheme in layers.items():
        weight = scheme.weight
        if weight is None:
            continue
        if not weight.format.is_uniform or weight.is_asymmetric:
            raise UserError(
                f"{key}: {name}.weight has format {weight.format.name!r}"
                f"{' with a zero point' * weight.is_asymmetric}; only symmetric integer weights can "
                "go through stages of other integer formats."
            )
        if stages[-1][1] != weight.format.bits:
            raise UserError(
                f"{key}: the last stage has {stages[-1][1]} bits, but {name}.weight is served as "
                f"{weight.format.name!r} of {weight.format.bits}; end the schedule with "
                f"[<step>, {weight.format.bits}]."
            )
