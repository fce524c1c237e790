"""Quantization arithmetic on one tensor.

`scale` is always the dequantization step: x ~= q * scale, or (q - zero_point) * scale with a zero
point. Codes are computed in float32 with a true division and round-half-to-even, so they can be
checked by hand and do not depend on the device. Values beyond the last code saturate, infinities
too; NaN stays NaN in fake quantization, although not every code could hold it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mqat.quant.formats import FP4_E2M1, QuantFormat
from mqat.quant.granularity import Granularity, grouped_view
from mqat.transfer import to_device

Limit = Any  # a float, or a tensor that broadcasts


def _levels(fmt: QuantFormat, device: torch.device) -> Tensor:
    return to_device(torch.tensor(fmt.levels, dtype=torch.float32), device)


def _round_e2m1_(ratio: Tensor) -> Tensor:
    """Nearest E2M1 number, ties to the even mantissa; the step is 1/2 below 2, 1 below 4, then 2."""
    ratio.clamp_(FP4_E2M1.qmin, FP4_E2M1.qmax)
    magnitude = ratio.abs()
    unit = torch.where(magnitude < 4, torch.where(magnitude < 2, 0.5, 1.0), 2.0)
    return ratio.div_(unit).round_().mul_(unit)


def _nearest_level(ratio: Tensor, fmt: QuantFormat) -> Tensor:
    """Index of the nearest of ascending levels, the lower one in ties (as bitsandbytes decides)."""
    levels = _levels(fmt, ratio.device).double()
    middle = ((levels[1:] + levels[:-1]) / 2).float()
    return torch.bucketize(ratio.contiguous(), middle)


def round_values_(ratio: Tensor, fmt: QuantFormat, low: Limit, high: Limit) -> Tensor:
    """`x / scale` -> the nearest value of the format, float32, in place where it allows.

    `low` and `high` are the range of the format, less the zero point if there is one.
    """
    if not fmt.is_float:
        return torch.clamp(ratio.round_(), low, high, out=ratio)
    if fmt == FP4_E2M1:
        return _round_e2m1_(ratio)
    if fmt.levels:
        nearest = _levels(fmt, ratio.device)[_nearest_level(ratio, fmt)]
        return torch.where(ratio.isnan(), ratio, nearest)
    return ratio.clamp_(fmt.qmin, fmt.qmax).to(fmt.storage_dtype).float()


def _to_codes(values: Tensor, fmt: QuantFormat) -> Tensor:
    """Values of the format -> codes in its storage dtype."""
    if fmt == FP4_E2M1:
        twice = values.abs().mul_(2).nan_to_num_(0.0).long()  # 0 1 2 3 4 6 8 12 -> 0 .. 7
        index = twice - (twice > 5).long() - (twice > 7).long() - 3 * (twice > 11).long()
        return (index + 8 * values.signbit()).to(torch.uint8)
    return (_nearest_level(values, fmt) if fmt.levels else values).to(fmt.storage_dtype)


def _limits(
    x: Tensor, fmt: QuantFormat, granularity: Granularity, zero_point: Tensor | None
) -> tuple[Limit, Limit]:
    """Range of codes less the zero point, broadcasting against `grouped_view(x, ...)`."""
    if zero_point is None:
        return fmt.qmin, fmt.qmax
    _, zero = grouped_view(x, zero_point, granularity)
    return fmt.qmin - zero.float(), fmt.qmax - zero.float()


def quantize(
    x: Tensor,
    scale: Tensor,
    fmt: QuantFormat,
    granularity: Granularity,
    *,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Codes of `x` in `fmt.storage_dtype`, shaped like `x`; `zero_point` is shaped like `scale`."""
    values = x.detach().float()
    groups, steps = grouped_view(values, scale, granularity)
    low, high = _limits(values, fmt, granularity, zero_point)
    is_copy = values.dtype != x.dtype and groups.data_ptr() == values.data_ptr()
    ratio = groups.div_(steps) if is_copy else groups / steps
    if fmt.storage_dtype.is_floating_point:  # the cast rounds; casting back would cost the most
        return ratio.clamp_(fmt.qmin, fmt.qmax).to(fmt.storage_dtype).view(x.shape)
    values = round_values_(ratio, fmt, low, high)
    if zero_point is not None:
        values += fmt.qmin - low  # the zero point, broadcast
    return _to_codes(values, fmt).view(x.shape)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    granularity: Granularity,
    dtype: torch.dtype,
    *,
    zero_point: Tensor | None = None,
    fmt: QuantFormat | None = None,
) -> Tensor:
    """`(codes - zero_point) * scale`, multiplied in float32 and rounded once to `dtype`.

    `fmt` is needed for formats whose codes are indices of levels.
    """
    values = _levels(fmt, codes.device)[codes.int()] if fmt and fmt.levels else codes.float()
    groups, steps = grouped_view(values, scale, granularity)
    if zero_point is not None:
        groups = groups - grouped_view(values, zero_point, granularity)[1]
    return (groups * steps).view(codes.shape).to(dtype)


def quantize_dequantize_(
    ratio: Tensor, steps: Tensor, fmt: QuantFormat, low: Limit, high: Limit
) -> Tensor:
    """`x / scale` -> what `dequantize` makes of its codes, float32; overwrites `ratio`."""
    values = round_values_(ratio, fmt, low, high).mul_(steps)
    # Small negative values round to -0.0, which integer codes cannot store; -0.0 + 0.0 is 0.0.
    return values if fmt.is_float else values.add_(0.0)


def gradient_range(
    fmt: QuantFormat, ste_clip_range: float | None, low: Limit, high: Limit
) -> tuple[Limit, Limit]:
    """Range of `x / scale` that passes gradients; `low` and `high` as for `round_values_`.

    Integers: values up to half a step beyond the last code count as not clipped.
    """
    if ste_clip_range is not None:
        return -ste_clip_range, ste_clip_range
    slack = 0.0 if fmt.is_float else 0.5
    return low - slack, high + slack


def _divided(
    x: Tensor,
    scale: Tensor,
    fmt: QuantFormat,
    granularity: Granularity,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor, Limit, Limit]:
    """`x / scale` and the steps, both float32 in shapes that broadcast, and the limits of codes."""
    values = x.detach().float()
    groups, steps = grouped_view(values, scale, granularity)
    return groups / steps, steps, *_limits(values, fmt, granularity, zero_point)


class _FakeQuantize(torch.autograd.Function):
    """Straight-through estimator: identity gradient where x was not clipped, zero where it was."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        fmt: QuantFormat,
        granularity: Granularity,
        zero_point: Tensor | None,
        ste_clip_range: float | None,
    ) -> Tensor:
        ratio, steps, low, high = _divided(x, scale, fmt, granularity, zero_point)
        ctx.is_masked = ste_clip_range is None or math.isfinite(ste_clip_range)
        if ctx.is_masked:
            # Compared as floats: comparisons that write bools are not vectorized on CPUs.
            passing = gradient_range(fmt, ste_clip_range, low, high)
            inside = torch.clamp(ratio, *passing).eq_(ratio).bool()
            ctx.save_for_backward(inside.view(x.shape))
        return quantize_dequantize_(ratio, steps, fmt, low, high).view(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        if ctx.is_masked:
            (inside,) = ctx.saved_tensors
            grad = grad * inside.view(torch.uint8)  # bytes multiply faster than bools
        return grad, None, None, None, None, None


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    fmt: QuantFormat,
    granularity: Granularity,
    *,
    zero_point: Tensor | None = None,
    ste_clip_range: float | None = None,
) -> Tensor:
    """`dequantize(quantize(x))` bit for bit, in the dtype of `x`, with a straight-through gradient.

    The scale gets no gradient. One bool per element is saved for backward, nothing where no gradient
    is wanted or nothing counts as clipped.

    `ste_clip_range` is the largest |x / scale| that lets the gradient pass; None: the range of the
    format (half a step more for integers); infinity: everything.

    Reference:
        Bengio et al. 2013, arXiv:1308.3432; the clipped form is Jacob et al. 2018, arXiv:1712.05877.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        ratio, steps, low, high = _divided(x, scale, fmt, granularity, zero_point)
        return quantize_dequantize_(ratio, steps, fmt, low, high).view(x.shape).to(x.dtype)
    result: Tensor = _FakeQuantize.apply(x, scale, fmt, granularity, zero_point, ste_clip_range)  # type: ignore[no-untyped-call]
    return result
