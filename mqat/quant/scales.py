"""From the range of a group of numbers to its quantization step, on any grid of scales.

`scale` is always the whole dequantization step, x ~= q * scale, also where servers store it as a
product: `block_scales` takes the two-level scales of NVFP4 apart again.

| `scale_dtype`     | grid of the step                               | rounding of amax / max_value   |
|-------------------|------------------------------------------------|--------------------------------|
| `float32`         | float32, 2**-126 and more                      | nearest                        |
| `bfloat16`        | numbers that bfloat16 and float16 both hold;   | up: nothing is clipped by it   |
|                   | below 2**-21 bfloat16's, 2**-126 and more      |                                |
| `float8_e8m0fnu`  | powers of two, 2**-127 to 2**127 (MX formats)  | by one of `EXPONENTS`          |
| `float8_e4m3fn`   | E4M3 times one global float32 scale (NVFP4)    | nearest E4M3, 2**-9 to 448     |

The last two may be smaller than `amax / max_value`; the largest elements then saturate.

How maxima become powers of two is left to servers. `emax` is the exponent of `max_value`; beside, what
a maximum of 7 becomes in E2M1, whose largest number is 6 = 1.5 * 2**2:

| exponent  | step                                             | 7       | used by                   |
|-----------|--------------------------------------------------|---------|---------------------------|
| `floor`   | 2**(floor(log2 amax) - emax)                     | 6       | OCP MX 1.0, section 6.3   |
| `nearest` | twice that where amax is as near to the next     | 4 * 2   | compressed-tensors, AITER |
|           | power of two as to what `floor` can hold         |         |                           |
| `ceil`    | twice that where `floor` cannot hold amax        | 4 * 2   | NVIDIA's conversions      |
"""

import math

import torch
from torch import Tensor

from mqat.quant.formats import QuantFormat
from mqat.quant.granularity import Granularity

# Names in configurations and checkpoints.
SCALE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
# How many of the mantissas between the largest of the format and 2 take the next exponent: as a share,
# and whether the first of them does.
_TAKE_NEXT = {"floor": (0.0, True), "nearest": (0.5, True), "ceil": (1.0, False)}
EXPONENTS = tuple(_TAKE_NEXT)
_E4M3_MAX, _E4M3_MIN = 448.0, 2.0**-9
# Normal; block scales of two levels, 2**-9 and more of the upper one, are normal too.
_SMALLEST, _SMALLEST_GLOBAL = 2.0**-126, 2.0**-117
# The step of an all-zero group: any would do, and float16 holds the second.
_OF_ZEROS = {torch.float32: _SMALLEST, torch.bfloat16: 2.0**-24}
# From here on float16's subnormals, multiples of 2**-24, are at most 1/8 coarser than bfloat16.
_LEAST_COMMON = 2.0**-21


def divide(x: Tensor, number: float) -> Tensor:
    """`x / number`, rounded once on every device.

    For a Python number, or a tensor without dimensions on the CPU, CUDA multiplies by the reciprocal:
    half of the results would differ from a CPU's.
    """
    return x / x.new_full((), number)


def compute_amax(x: Tensor, granularity: Granularity) -> Tensor:
    """Largest |x| of each quantization group, float32, shape `granularity.scale_shape(x.shape)`."""
    if x.device.type == "cuda":  # CPUs are ten times slower at it
        return granularity.largest(x.detach(), _largest_magnitude).float()
    magnitude = x.detach().abs()
    if x.dtype == torch.bfloat16:
        # Without a sign its bits are ordered as integers are, NaN last; CPUs compare those faster.
        return granularity.largest(magnitude.view(torch.int16)).view(torch.bfloat16).float()
    return granularity.largest(magnitude).float()


def _largest_magnitude(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The same by one kernel that reads x once, in the dtype of x."""
    return torch.linalg.vector_norm(x, math.inf, dim=dim)


def compute_range(x: Tensor, granularity: Granularity) -> Tensor:
    """Largest -x and largest x of each group, each at least 0, float32 (2, *scale shape).

    Both are maxima, so that ranges of parts merge by MAX like `compute_amax`.
    """
    x = x.detach()
    low, high = -granularity.largest(x, torch.amin), granularity.largest(x)
    return torch.stack([low, high]).clamp_min_(0).float()


def compute_global_scale(amax: Tensor, fmt: QuantFormat) -> Tensor:
    """Second-level scale of NVFP4, float32, under which the largest block scale is E4M3's 448.

    Args:
        amax: Largest |x| of the whole tensor (over all ranks), float32 (1,).
        fmt: Format of the elements; amax / (6 * 448) for E2M1.

    Reference:
        TensorRT-LLM and ModelOpt: `weight_scale_2`, and `input_scale` of activations.
    """
    return divide(amax, fmt.max_value * _E4M3_MAX).clamp_min(_SMALLEST_GLOBAL)


def compute_scale(
    amax: Tensor,
    fmt: QuantFormat,
    *,
    scale_dtype: torch.dtype = torch.float32,
    global_scale: Tensor | None = None,
    exponent: str = "floor",
) -> Tensor:
    """Dequantization step for a calibrated maximum, symmetric around zero.

    Args:
        amax: Largest |x| per group, float32. Must already be the maximum over every rank that holds
            part of the group; no rank can check that.
        fmt: Target format; only `fmt.max_value` is used.
        scale_dtype: Grid of the scales, by the table above. bfloat16 steps are also numbers of
            float16, so that the copy a server keeps in either is the same number, but for groups so
            near zero that float16 could not hold their steps. (Exports in float16 refuse those, and
            steps beyond 65504.)
        global_scale: float32 (1,), for `float8_e4m3fn` only.
        exponent: One of `EXPONENTS`, for `float8_e8m0fnu` only.

    Returns:
        Scale, float32, shaped like `amax`, in units of x per code; NaN where `amax` is not finite
        and the grid has no infinity.

    Reference:
        Krishnamoorthi 2018, arXiv:1806.08342, section 2.2; OCP Microscaling Formats 1.0, section 6.3.
    """
    assert amax.dtype == torch.float32, f"amax is {amax.dtype}, not float32"
    if scale_dtype == torch.float8_e8m0fnu:
        return _power_of_two(amax, fmt, exponent)
    if scale_dtype == torch.float8_e4m3fn:
        assert global_scale is not None, "E4M3 block scales stand under a global scale"
        ratio = (amax / (fmt.max_value * global_scale)).clamp(_E4M3_MIN, _E4M3_MAX)
        return ratio.to(torch.float8_e4m3fn).float() * global_scale
    return round_up(divide(amax, fmt.max_value), scale_dtype)


def compute_affine(
    extent: Tensor,
    fmt: QuantFormat,
    *,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Step and integer zero point that map [-low, high] onto all codes: x ~= (q - zero) * scale.

    Args:
        extent: float32 (2, ...) from `compute_range`: `low` and `high`, both at least 0, so that zero
            itself is always a code.
        fmt: Integer format.
        scale_dtype: float32 or bfloat16, as for `compute_scale`.

    Returns:
        `scale`, float32 (...), and `zero_point`, int32 (...), a code of `fmt`.

    Reference:
        Jacob et al. 2018, arXiv:1712.05877, section 2.1; torch.ao's and torchao's affine observers.
    """
    low, high = extent.unbind(0)
    scale = round_up(divide(high + low, fmt.qmax - fmt.qmin), scale_dtype)
    zero_point = (fmt.qmin + (low / scale).round()).clamp(fmt.qmin, fmt.qmax)
    return scale, zero_point.nan_to_num(0.0).to(torch.int32)  # where the scale is NaN, so is x


def block_scales(scale: Tensor, global_scale: Tensor) -> Tensor:
    """E4M3 block scales, as stored by servers, of steps from `compute_scale`.

    Exact: the step was an E4M3 number times `global_scale`, rounded at 24 bits, and E4M3 numbers are
    at least 2**-4 apart.
    """
    return (scale / global_scale).to(torch.float8_e4m3fn)


def round_up(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """`scale` on the float32 or bfloat16 grid of the table above, at least its smallest step."""
    assert scale_dtype in _OF_ZEROS, f"{scale_dtype} is no grid to round up to"
    scale = torch.where(scale <= 0, _OF_ZEROS[scale_dtype], scale.clamp_min(_SMALLEST))
    if scale_dtype == torch.float32:
        return scale
    # Positive floats order like their bits; bfloat16 is the upper half of the word.
    bfloat16_grid = ((scale.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    # Below 2**-17 float16 is the coarser of the two.
    float16_grid = (scale * 2.0**24).ceil() * 2.0**-24
    is_coarser = (scale >= _LEAST_COMMON) & (bfloat16_grid < 2.0**-17)
    return torch.where(is_coarser, float16_grid, bfloat16_grid)


def _power_of_two(amax: Tensor, fmt: QuantFormat, exponent: str) -> Tensor:
    """By the table of exponents above, kept in E8M0's range; NaN where `amax` is not finite.

    Read from amax's own bits, so it is exact: what is added to the mantissa carries into the exponent.
    Zero, and whatever is too small, gets 2**-127.
    """
    bits = amax.contiguous().view(torch.int32)
    share, with_first = _TAKE_NEXT[exponent]
    carries = int((2 - fmt.max_value / 2.0**fmt.max_exponent) * share * 2**23) - (not with_first)
    biased = ((bits + carries if carries else bits) >> 23) & 0xFF
    shifted = (biased - fmt.max_exponent).clamp(0, 254)
    subnormal = torch.full_like(shifted, 1 << 22)  # the bits of 2**-127
    step = torch.where(shifted > 0, shifted << 23, subnormal).view(torch.float32)
    return torch.where(amax < math.inf, step, torch.nan)
