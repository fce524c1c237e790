"""What a scheme makes of a tensor's range: the statistic it needs, and the steps it freezes from it."""

from __future__ import annotations

from torch import Tensor

from mqat.quant.functional import fake_quantize
from mqat.quant.scales import (
    compute_affine,
    compute_amax,
    compute_global_scale,
    compute_range,
    compute_scale,
)
from mqat.quant.scheme import TensorScheme


def statistic_of(x: Tensor, scheme: TensorScheme) -> Tensor:
    """What scales are made of: amax per group, or (2, ...) ranges; ranks merge it by MAX."""
    compute = compute_range if scheme.is_asymmetric else compute_amax
    return compute(x, scheme.granularity)


def compute_qparams(
    statistic: Tensor, scheme: TensorScheme, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale, and zero point where the scheme is asymmetric.

    Args:
        statistic: From `statistic_of`, merged over all ranks that hold part of a group.
        scheme: Whose format and grid of scales count.
        global_scale: float32 (1,), of two levels only.
    """
    if scheme.is_asymmetric:
        return compute_affine(statistic, scheme.format, scale_dtype=scheme.scale_dtype)
    scale = compute_scale(
        statistic, scheme.format, scale_dtype=scheme.scale_dtype, global_scale=global_scale
    )
    return scale, None


def rounded(
    x: Tensor,
    scheme: TensorScheme,
    statistic: Tensor | None = None,
    global_amax: Tensor | None = None,
) -> Tensor:
    """`x` on the grid of a scheme, in its dtype, without a gradient.

    Args:
        x: Float tensor, detached.
        scheme: How it is quantized.
        statistic: As from `statistic_of`; None: the tensor's own.
        global_amax: Largest |x| behind a two-level scale, float32 (1,); None: that of `statistic`.
    """
    statistic = statistic_of(x, scheme) if statistic is None else statistic
    global_scale = None
    if scheme.has_global_scale:
        amax = statistic.amax().reshape(1) if global_amax is None else global_amax
        global_scale = compute_global_scale(amax, scheme.format)
    scale, zero_point = compute_qparams(statistic, scheme, global_scale)
    return fake_quantize(x, scale, scheme.format, scheme.granularity, zero_point=zero_point)
