"""How the tensors of a linear are quantized, and how checkpoints say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mqat.errors import UserError, nearest_hint
from mqat.quant.formats import FORMATS, INT2_ELASTIC, INT4_AMAX7_5, TERNARY, QuantFormat
from mqat.quant.granularity import (
    Granularity,
    PerGroup,
    PerTensor,
    PerToken,
    granularity_from_str,
)
from mqat.quant.scales import EXPONENTS, SCALE_DTYPES

_COARSE = (torch.float8_e8m0fnu, torch.float8_e4m3fn)


@dataclass(frozen=True)
class TensorScheme:
    """How one tensor is quantized.

    Attributes:
        format: Codes.
        granularity: Which elements share a scale.
        scale_dtype: Grid of the scales (`scales.compute_scale`); E4M3 stands for two levels.
        is_dynamic: Scales are computed from every tensor that arrives; nothing is frozen but the
            global scale of two levels.
        is_asymmetric: Codes are shifted by an integer zero point.
        exponent: How maxima are rounded to E8M0 scales, one of `scales.EXPONENTS`.
    """

    format: QuantFormat
    granularity: Granularity
    scale_dtype: torch.dtype = torch.float32
    is_dynamic: bool = False
    is_asymmetric: bool = False
    exponent: str = "floor"

    def __post_init__(self) -> None:
        """Raises UserError for combinations without a meaning."""
        fmt, granularity = self.format, self.granularity
        if fmt.is_unsigned and not self.is_asymmetric:
            raise UserError(
                f"format {fmt.name!r} has no negative codes: set asymmetric, or use "
                f"{fmt.name.removeprefix('u')!r}."
            )
        if self.is_asymmetric and (fmt.is_float or self.scale_dtype in _COARSE):
            raise UserError(
                f"asymmetric needs an integer format with float32 or bfloat16 scales, not "
                f"{fmt.name!r} with {self.scale_name!r}."
            )
        if self.exponent not in EXPONENTS:
            raise UserError(
                f"exponent {self.exponent!r} is unknown; {nearest_hint(self.exponent, EXPONENTS)}"
            )
        if self.exponent != "floor" and self.scale_dtype != torch.float8_e8m0fnu:
            raise UserError(
                f"exponent {self.exponent!r} is of float8_e8m0fnu scales, which are powers of two, not "
                f"of {self.scale_name!r}; leave it out."
            )
        if self.has_global_scale and not isinstance(granularity, PerGroup):
            raise UserError(
                f"scale {self.scale_name!r} stands under a global scale and needs granularity "
                f"'group:<size>', not {str(granularity)!r}."
            )
        if isinstance(granularity, PerToken) and not self.is_dynamic:
            raise UserError("granularity 'token' is known only at run time: set dynamic.")
        if self.is_dynamic and not isinstance(granularity, PerToken | PerGroup):
            raise UserError(
                f"dynamic scales need granularity 'token' or 'group:<size>', not {str(granularity)!r}: "
                "a wider one would depend on how tokens are spread over ranks and microbatches."
            )

    @property
    def scale_name(self) -> str:
        """Name of `scale_dtype`."""
        return str(self.scale_dtype).removeprefix("torch.")

    @property
    def has_global_scale(self) -> bool:
        """Block scales are E4M3 under one float32 scale (NVFP4)."""
        return self.scale_dtype == torch.float8_e4m3fn

    @property
    def ste_clip_range(self) -> float | None:
        """Largest |x / scale| that lets gradients pass (`functional.fake_quantize`).

        Dynamic scales follow x, so nothing is clipped for good. Scales on a coarse grid may be
        smaller than amax / max_value by nearly a factor of two; what they saturate at calibration
        shall still be trained. Where codes are stretched (`format.max_value` half a code beyond
        `format.qmax`), the maximum itself lies on the border of clipping.
        """
        if self.is_dynamic:
            return math.inf
        if self.format in (INT4_AMAX7_5, TERNARY, INT2_ELASTIC):
            return self.format.max_value + 1
        return 2.0 ** (self.format.max_exponent + 1) if self.scale_dtype in _COARSE else None

    def frozen_shapes(self, shape: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that calibration fixes and checkpoints hold.

        `shape` is that of the quantized tensor; None for activations.
        """
        names = (
            () if self.is_dynamic else ("scale", *(["zero_point"] if self.is_asymmetric else []))
        )
        scale_shape = (1,) if shape is None else self.granularity.scale_shape(shape)
        shapes = dict.fromkeys(names, scale_shape)
        return shapes | ({"global_scale": (1,)} if self.has_global_scale else {})

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form; flags only where they are set, so that old descriptions stay equal."""
        flags = {"is_dynamic": self.is_dynamic, "is_asymmetric": self.is_asymmetric}
        exponent = {} if self.exponent == "floor" else {"exponent": self.exponent}
        return {
            "format": self.format.name,
            "granularity": str(self.granularity),
            "scale_dtype": self.scale_name,
            **exponent,
        } | {name: True for name, is_set in flags.items() if is_set}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TensorScheme:
        """Inverse of `to_dict`; an unknown format, granularity or dtype is a UserError."""
        name = values["format"]
        if name not in FORMATS:
            raise UserError(
                f"quantization format {name!r} is unknown; {nearest_hint(name, FORMATS)}"
            )
        scale_dtype = values["scale_dtype"]
        if scale_dtype not in SCALE_DTYPES:
            raise UserError(
                f"scale_dtype {scale_dtype!r} is unknown; {nearest_hint(scale_dtype, SCALE_DTYPES)}"
            )
        return cls(
            FORMATS[name],
            granularity_from_str(values["granularity"]),
            SCALE_DTYPES[scale_dtype],
            bool(values.get("is_dynamic", False)),
            bool(values.get("is_asymmetric", False)),
            str(values.get("exponent", "floor")),
        )


@dataclass(frozen=True)
class LinearScheme:
    """How a linear is quantized; None leaves that operand alone."""

    name: str = field(compare=False)  # for people: what is equal and what is served are operands
    weight: TensorScheme | None
    input: TensorScheme | None
    output: TensorScheme | None = None

    def __post_init__(self) -> None:
        """Raises UserError for operands that cannot be quantized that way."""
        if self.weight is not None and self.weight.is_dynamic:
            raise UserError(
                "weight: dynamic scales are for inputs and outputs; weights are frozen."
            )
        for kind, scheme in (("input", self.input), ("output", self.output)):
            if scheme is None or scheme.is_dynamic:
                continue
            if not isinstance(scheme.granularity, PerTensor):
                raise UserError(
                    f"{kind}: static scales have granularity 'tensor', not "
                    f"{str(scheme.granularity)!r}; set dynamic."
                )
        if self.output is not None and isinstance(self.output.granularity, PerGroup):
            raise UserError("output: granularity must be 'tensor', or 'token' with dynamic.")

    @property
    def operands(self) -> dict[str, TensorScheme]:
        """The quantized ones among `weight`, `input` and `output`."""
        found = {"weight": self.weight, "input": self.input, "output": self.output}
        return {kind: scheme for kind, scheme in found.items() if scheme is not None}

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        empty: dict[str, Any] = {"name": self.name, "weight": None, "input": None}
        return empty | {kind: scheme.to_dict() for kind, scheme in self.operands.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LinearScheme:
        """Inverse of `to_dict`."""
        kinds = ("weight", "input", "output")
        given = {"output": None, **values}
        parts = {kind: TensorScheme.from_dict(given[kind]) for kind in kinds if given[kind]}
        return cls(values["name"], parts.get("weight"), parts.get("input"), parts.get("output"))
