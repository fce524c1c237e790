"""From the range of a tensor to the tensors that calibration freezes: scales and zero points."""

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


def frozen_qparams(
    statistic: Tensor, scheme: TensorScheme, global_amax: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of `TensorScheme.frozen_shapes`: what calibration fixes and checkpoints hold.

    Args:
        statistic: As for `compute_qparams`.
        scheme: Of the tensor.
        global_amax: Largest |x| of the whole tensor, float32 (1,), of two levels only; None: that of
            `statistic`.
    """
    frozen: dict[str, Tensor] = {}
    if scheme.has_global_scale:
        amax = statistic.amax().reshape(1) if global_amax is None else global_amax
        frozen["global_scale"] = compute_global_scale(amax, scheme.format)
    if not scheme.is_dynamic:
        frozen["scale"], zero_point = compute_qparams(statistic, scheme, frozen.get("global_scale"))
        if zero_point is not None:
            frozen["zero_point"] = zero_point
    return frozen


def rounded(
    x: Tensor,
    scheme: TensorScheme,
    statistic: Tensor | None = None,
    global_amax: Tensor | None = None,
) -> Tensor:
    """`x` on the grid of a static scheme, in its dtype, without a gradient.

    Args:
        x: Float tensor, detached.
        scheme: How it is quantized.
        statistic: As from `statistic_of`; None: the tensor's own.
        global_amax: As for `frozen_qparams`.
    """
    statistic = statistic_of(x, scheme) if statistic is None else statistic
    frozen = frozen_qparams(statistic, scheme, global_amax)
    zero_point = frozen.get("zero_point")
    return fake_quantize(
        x, frozen["scale"], scheme.format, scheme.granularity, zero_point=zero_point
    )
