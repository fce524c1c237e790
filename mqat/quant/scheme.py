"""What a named algorithm means for the weight and the input of a linear."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mqat.quant.formats import FORMATS, FP8_E4M3, INT4, INT8, INT8_FULL, INT8_LOADER, QuantFormat
from mqat.quant.granularity import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    granularity_from_str,
)

ALGORITHMS = ("int8", "int8_wo", "int4", "int4_w_int8_a", "fp8", "null")
SCALE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TensorScheme:
    """How one tensor is quantized.

    Attributes:
        format: Codes.
        granularity: Which elements share a scale.
        scale_dtype: Grid of the scales (`functional.compute_scale`).
    """

    format: QuantFormat
    granularity: Granularity
    scale_dtype: torch.dtype = torch.float32

    def to_dict(self) -> dict[str, str]:
        """JSON-safe form."""
        return {
            "format": self.format.name,
            "granularity": str(self.granularity),
            "scale_dtype": str(self.scale_dtype).removeprefix("torch."),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, str]) -> TensorScheme:
        """Inverse of `to_dict`; an unknown format, granularity or dtype is a ValueError."""
        name = values["format"]
        if name not in FORMATS:
            raise ValueError(f"quantization format {name!r} is unknown; known: {sorted(FORMATS)}.")
        scale_dtype = values["scale_dtype"]
        if scale_dtype not in SCALE_DTYPES:
            raise ValueError(
                f"scale_dtype {scale_dtype!r} is unknown; known: {list(SCALE_DTYPES)}."
            )
        return cls(
            FORMATS[name],
            granularity_from_str(values["granularity"]),
            SCALE_DTYPES[scale_dtype],
        )


@dataclass(frozen=True)
class LinearScheme:
    """How a linear is quantized; None leaves that operand alone."""

    name: str
    weight: TensorScheme | None
    input: TensorScheme | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {
            "name": self.name,
            "weight": self.weight.to_dict() if self.weight else None,
            "input": self.input.to_dict() if self.input else None,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LinearScheme:
        """Inverse of `to_dict`."""
        weight, operand = values["weight"], values["input"]
        return cls(
            values["name"],
            TensorScheme.from_dict(weight) if weight else None,
            TensorScheme.from_dict(operand) if operand else None,
        )


def named_scheme(algorithm: str, *, group_size: int = 128) -> LinearScheme | None:
    """The scheme of a named algorithm; `null` is None.

    | algorithm       | weight                         | input                       |
    |-----------------|--------------------------------|-----------------------------|
    | `int8`          | INT8 per output channel        | INT8 per tensor, static     |
    | `int8_wo`       | INT8 on TensorRT-LLM's grid    | -                           |
    | `int4`          | INT4 groups of `group_size`    | -                           |
    | `int4_w_int8_a` | INT4 groups of `group_size`    | INT8 per tensor, static     |
    | `fp8`           | FP8 E4M3 per tensor            | FP8 E4M3 per tensor, static |

    INT4 and FP8 scales lie on the bfloat16 grid, because servers keep them in the model's dtype.

    Raises:
        ValueError: Unknown name; suggests the nearest.
    """
    bf16 = torch.bfloat16
    activation = TensorScheme(INT8_FULL, PerTensor())
    if algorithm == "null":
        return None
    if algorithm == "int8":
        return LinearScheme(algorithm, TensorScheme(INT8, PerChannel()), activation)
    if algorithm == "int8_wo":
        return LinearScheme(algorithm, TensorScheme(INT8_LOADER, PerChannel()), None)
    if algorithm == "int4":
        return LinearScheme(algorithm, TensorScheme(INT4, PerGroup(group_size), bf16), None)
    if algorithm == "int4_w_int8_a":
        weight = TensorScheme(INT4, PerGroup(group_size), bf16)
        return LinearScheme(algorithm, weight, activation)
    if algorithm == "fp8":
        per_tensor = TensorScheme(FP8_E4M3, PerTensor(), bf16)
        return LinearScheme(algorithm, per_tensor, per_tensor)
    near = difflib.get_close_matches(algorithm, ALGORITHMS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(
        f"quantization algorithm {algorithm!r} is unknown{hint} Known: {', '.join(ALGORITHMS)}."
    )
