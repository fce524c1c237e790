"""Quantization arithmetic on one tensor.

`scale` is always the dequantization step: x ~= q * scale. Codes are computed in float32 with a true
division and round-half-to-even, so they can be checked by hand and do not depend on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mqat.quant.formats import QuantFormat
from mqat.quant.granularity import Granularity, grouped_view


def compute_amax(x: Tensor, granularity: Granularity) -> Tensor:
    """Largest |x| of each quantization group, float32, shape `granularity.scale_shape(x.shape)`."""
    return granularity.amax(x)


def compute_scale(
    amax: Tensor,
    fmt: QuantFormat,
    *,
    scale_dtype: torch.dtype = torch.float32,
    eps: float = 2.0**-24,
) -> Tensor:
    """Dequantization step for a calibrated maximum, symmetric around zero.

    Args:
        amax: Largest |x| per group, float32. Must already be the maximum over every rank that holds
            part of the group; no rank can check that.
        fmt: Target format; only `fmt.max_value` is used.
        scale_dtype: float32, or bfloat16: rounded up to the next number that both bfloat16 and
            float16 hold, so that the copy a server keeps in either is the same number and nothing
            is clipped by the rounding. (float16 ends at 65504; export refuses larger scales.)
        eps: Smallest step returned, so that an all-zero group stays exactly zero.

    Returns:
        Scale, float32, shaped like `amax`, in units of x per code.

    Raises:
        ValueError: `amax` is not float32, or `scale_dtype` is neither of the two.

    Reference:
        Krishnamoorthi 2018, arXiv:1806.08342, section 2.2.
    """
    if amax.dtype != torch.float32:
        raise ValueError(f"amax must be float32, not {amax.dtype}.")
    scale = (amax / fmt.max_value).clamp_min(eps)
    if scale_dtype == torch.float32:
        return scale
    if scale_dtype != torch.bfloat16:
        raise ValueError(f"scale_dtype={scale_dtype}: only float32 and bfloat16 are supported.")
    # Positive floats order like their bits; bfloat16 is the upper half of the word.
    bfloat16_grid = ((scale.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    # Below 2**-17 float16 is the coarser of the two: its subnormals are multiples of 2**-24.
    float16_grid = (scale * 2.0**24).ceil() * 2.0**-24
    return torch.where(bfloat16_grid < 2.0**-17, float16_grid, bfloat16_grid)


def _round_codes_(ratio: Tensor, fmt: QuantFormat) -> Tensor:
    """`x / scale` -> codes, as float32 values, in place where the format allows."""
    if fmt.is_float:
        return ratio.clamp_(fmt.qmin, fmt.qmax).to(fmt.storage_dtype).float()
    return ratio.round_().clamp_(fmt.qmin, fmt.qmax)


def quantize(x: Tensor, scale: Tensor, fmt: QuantFormat, granularity: Granularity) -> Tensor:
    """Codes of `x` in `fmt.storage_dtype`, shaped like `x`."""
    groups, steps = grouped_view(x.detach().float(), scale, granularity)
    return _round_codes_(groups / steps, fmt).to(fmt.storage_dtype).view(x.shape)


def dequantize(
    codes: Tensor, scale: Tensor, granularity: Granularity, dtype: torch.dtype
) -> Tensor:
    """`codes * scale`, multiplied in float32 and rounded once to `dtype`."""
    groups, steps = grouped_view(codes.float(), scale, granularity)
    return (groups * steps).view(codes.shape).to(dtype)


def _quantize_dequantize_(ratio: Tensor, steps: Tensor, fmt: QuantFormat) -> Tensor:
    """`x / scale` -> what `dequantize` makes of its codes, float32; overwrites `ratio`."""
    values = _round_codes_(ratio, fmt).mul_(steps)
    # Small negative values round to -0.0, which integer codes cannot store; -0.0 + 0.0 is 0.0.
    return values if fmt.is_float else values.add_(0.0)


class _FakeQuantize(torch.autograd.Function):
    """Straight-through estimator: identity gradient where x was not clipped, zero where it was."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, fmt: QuantFormat, granularity: Granularity
    ) -> Tensor:
        groups, steps = grouped_view(x.float(), scale, granularity)
        ratio = groups / steps
        # Integers: values up to half a step beyond the last code count as not clipped.
        slack = 0.0 if fmt.is_float else 0.5
        # Compared as floats: comparisons that write bools are not vectorized on CPUs.
        inside = ratio.clamp(fmt.qmin - slack, fmt.qmax + slack).eq_(ratio).bool()
        ctx.save_for_backward(inside.view(x.shape))
        return _quantize_dequantize_(ratio, steps, fmt).view(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside.view(torch.uint8), None, None, None  # bytes multiply faster than bools


def fake_quantize(x: Tensor, scale: Tensor, fmt: QuantFormat, granularity: Granularity) -> Tensor:
    """`dequantize(quantize(x))` bit for bit, in the dtype of `x`, with a straight-through gradient.

    The scale is frozen and gets no gradient. One bool per element is saved for backward, nothing
    where no gradient is wanted. NaN stays NaN, although integer codes could not hold it.

    Reference:
        Bengio et al. 2013, arXiv:1308.3432; the clipped form is Jacob et al. 2018, arXiv:1712.05877.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        groups, steps = grouped_view(x.detach().float(), scale, granularity)
        return _quantize_dequantize_(groups / steps, steps, fmt).view(x.shape).to(x.dtype)
    result: Tensor = _FakeQuantize.apply(x, scale, fmt, granularity)  # type: ignore[no-untyped-call]
    return result
