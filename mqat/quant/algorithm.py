"""A quantization algorithm: the scheme of a linear, and the recipe its weight goes through before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from mqat.errors import UserError, nearest_hint
from mqat.quant.formats import (
    FP4_E2M1,
    FP8_E4M3,
    INT4,
    INT4_AMAX7_5,
    INT8,
    INT8_AMAX128,
    INT8_MIN128,
    NF4,
    UINT4,
)
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken
from mqat.quant.scheme import LinearScheme, TensorScheme

# Values of recipe keys; `calibration/clipping_methods.py` lists what the weight calibrators do.
SQ_GRIDS = ("power_of_two", "float")
WEIGHT_CALIBRATORS = ("max", "mse", "awq", "sawb", "four_over_six")
ROUNDINGS = ("nearest", "gptq")
_CHOICES = {
    "sq_grid": SQ_GRIDS,
    "weight_calibrator": WEIGHT_CALIBRATORS,
    "rounding": ROUNDINGS,
}


@dataclass(frozen=True)
class Recipe:
    """What is done to the weight and the input of one linear before its scales are frozen.

    Configurations have the same keys in the `recipe` of a rule and, but for `search_steps`, under
    `quantization`.

    Attributes:
        smoothquant: Rescale the input, where the tensor before can take up the factor
            (`calibration/smoothing_pairs.py`).
        sq_alpha: SmoothQuant's strength; None: searched (`calibration/scale_search.py`).
        sq_grid: Of the factors, one of `SQ_GRIDS`.
        search_steps: Alphas tried between 0 and 1.
        weight_calibrator: What weight scales are made from, one of `WEIGHT_CALIBRATORS`.
        rounding: `nearest`, or `gptq`: weights are moved to grid values chosen together.
    """

    smoothquant: bool = False
    sq_alpha: float | None = 0.8
    sq_grid: str = "power_of_two"
    search_steps: int = 10
    weight_calibrator: str = "max"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        """Raises UserError for an unknown name or a number out of range."""
        for key, known in _CHOICES.items():
            if getattr(self, key) not in known:
                value = getattr(self, key)
                raise UserError(f"{key}={value!r} is unknown; {nearest_hint(value, known)}")
        if not isinstance(self.smoothquant, bool):
            raise UserError(f"smoothquant={self.smoothquant!r} must be true or false.")
        if self.sq_alpha is not None and not 0 <= self.sq_alpha <= 1:
            raise UserError(f"sq_alpha={self.sq_alpha} must be in [0, 1], or null.")
        if self.search_steps < 1:
            raise UserError(f"search_steps={self.search_steps} must be at least 1.")

    @property
    def chooses_scales(self) -> bool:
        """Whether weight scales are not simply those of the maxima, or the weight is rounded before."""
        return self.weight_calibrator != "max" or self.rounding != "nearest"

    @property
    def changes_anything(self) -> bool:
        """Whether there is anything to do beyond the weight's maxima."""
        return self.smoothquant or self.chooses_scales

    def with_keys(self, keys: Mapping[str, Any], path: str) -> Recipe:
        """This recipe with the keys replaced that stand at `path` in a configuration.

        Raises:
            UserError: Unknown key or value.
        """
        known = [field.name for field in fields(self)]
        for key in keys:
            if key not in known:
                hint = nearest_hint(key, known)
                raise UserError(f"config: unknown key {f'{path}.{key}'!r}; {hint}")
        try:
            return replace(self, **keys)
        except (UserError, TypeError) as error:
            raise UserError(f"config: {path}.{error}") from error


@dataclass(frozen=True)
class Algorithm:
    """How one linear or vocabulary table is quantized, and what is done to it before."""

    scheme: LinearScheme
    recipe: Recipe = Recipe()


_BF16, _E8M0, _E4M3 = torch.bfloat16, torch.float8_e8m0fnu, torch.float8_e4m3fn
_INT8 = TensorScheme(INT8, PerChannel())
_INT8_STATIC = TensorScheme(INT8_MIN128, PerTensor())
_INT8_TOKEN = TensorScheme(INT8_MIN128, PerToken(), is_dynamic=True)
_FP8_STATIC = TensorScheme(FP8_E4M3, PerTensor(), _BF16)
_FP8_TOKEN = TensorScheme(FP8_E4M3, PerToken(), is_dynamic=True)
_INT4_GROUPS = TensorScheme(INT4, PerGroup(128), _BF16)
_NVFP4 = TensorScheme(FP4_E2M1, PerGroup(16), _E4M3)  # block scales under a static global one
_MXFP4 = TensorScheme(FP4_E2M1, PerGroup(32), _E8M0, exponent="nearest")
_MXFP8 = TensorScheme(FP8_E4M3, PerGroup(32), _E8M0)

_SMOOTHQUANT = Recipe(smoothquant=True)
_AWQ = Recipe(smoothquant=True, sq_alpha=None, sq_grid="float", weight_calibrator="awq")

# Name -> weight, input, recipe.
_NAMED: dict[str, tuple[TensorScheme, TensorScheme | None, Recipe]] = {
    "int8": (_INT8, _INT8_STATIC, Recipe()),
    "int8_sq": (_INT8, _INT8_STATIC, _SMOOTHQUANT),
    "int8_pc_pt": (_INT8, _INT8_TOKEN, Recipe()),
    "int8_wo": (TensorScheme(INT8_AMAX128, PerChannel()), None, Recipe()),
    "fp8": (_FP8_STATIC, _FP8_STATIC, Recipe()),
    "fp8_pc_pt": (TensorScheme(FP8_E4M3, PerChannel()), _FP8_TOKEN, Recipe()),
    "nvfp4": (_NVFP4, replace(_NVFP4, is_dynamic=True), Recipe()),
    "mxfp4": (_MXFP4, replace(_MXFP4, is_dynamic=True), Recipe()),
    "mxfp8": (_MXFP8, replace(_MXFP8, is_dynamic=True), Recipe()),
    "nf4": (TensorScheme(NF4, PerGroup(64)), None, Recipe()),
    "int4": (_INT4_GROUPS, None, Recipe()),
    "int4_awq": (_INT4_GROUPS, None, _AWQ),
    "w4a8_awq": (_INT4_GROUPS, _FP8_STATIC, _AWQ),
    "int4_w_int8_a": (_INT4_GROUPS, _INT8_STATIC, Recipe()),
    "8da4w": (
        TensorScheme(INT4_AMAX7_5, PerGroup(256)),
        replace(_INT8_TOKEN, is_asymmetric=True),
        Recipe(),
    ),
    "w_int4_sym": (TensorScheme(INT4_AMAX7_5, PerGroup(128), _BF16), None, Recipe()),
    "w_uint4_asym": (
        TensorScheme(UINT4, PerGroup(128), _BF16, is_asymmetric=True),
        None,
        Recipe(),
    ),
}
ALGORITHMS = (*_NAMED, "null")


def takes_group_size(name: str) -> bool:
    """Whether weights of a named algorithm are groups of integers: other formats fix their blocks."""
    weight = _NAMED[name][0] if name in _NAMED else None
    return (
        weight is not None
        and isinstance(weight.granularity, PerGroup)
        and not weight.format.is_float
    )


def named_algorithm(name: str, *, group_size: int | None = None) -> Algorithm | None:
    """A named algorithm; `null` is None.

    INT4 and UINT4 scales lie on the bfloat16 grid, because servers keep them in the model's dtype;
    ExecuTorch keeps those of `8da4w` in float32. Static FP8 scales do because TensorRT-LLM's graph casts
    them to the model's dtype: they are amax / 448 rounded up, by 1/128 at most. A rule with
    `scale: float32` has amax / 448 itself, which the Hugging Face forms hold.

    Args:
        name: One of `ALGORITHMS`.
        group_size: Elements per group where `takes_group_size`; None: 128, for `8da4w` 256.

    Raises:
        UserError: Unknown name; suggests the nearest.
    """
    if name == "null":
        return None
    if name not in _NAMED:
        raise UserError(
            f"quantization algorithm {name!r} is unknown; {nearest_hint(name, ALGORITHMS)}"
        )
    weight, operand, recipe = _NAMED[name]
    if group_size is not None and takes_group_size(name):
        weight = replace(weight, granularity=PerGroup(group_size))
    return Algorithm(LinearScheme(name, weight, operand), recipe)


def named_scheme(name: str, *, group_size: int | None = None) -> LinearScheme | None:
    """The scheme of a named algorithm, without its recipe; `null` is None."""
    algorithm = named_algorithm(name, group_size=group_size)
    return None if algorithm is None else algorithm.scheme
