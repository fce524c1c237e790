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
    """Scale, and zero point where the scheme is asymmetric; two levels need the upper, float32 (1,).

    The statistic (`statistic_of`) is merged over all ranks that hold part of a group.
    """
    if scheme.is_asymmetric:
        return compute_affine(statistic, scheme.format, scale_dtype=scheme.scale_dtype)
    scale = compute_scale(
        statistic,
        scheme.format,
        scale_dtype=scheme.scale_dtype,
        global_scale=global_scale,
        exponent=scheme.exponent,
    )
    return scale, None


def frozen_qparams(
    statistic: Tensor, scheme: TensorScheme, global_amax: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of `TensorScheme.frozen_shapes`: what calibration fixes and checkpoints hold.

    Of two levels, `global_amax` is the largest |x| of the whole tensor, float32 (1,); None: that of
    `statistic`, which is as for `compute_qparams`.
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
    """A detached `x` on the grid of a static scheme, in its dtype; by default of its own statistic."""
    statistic = statistic_of(x, scheme) if statistic is None else statistic
    frozen = frozen_qparams(statistic, scheme, global_amax)
    zero_point = frozen.get("zero_point")
    return fake_quantize(
        x, frozen["scale"], scheme.format, scheme.granularity, zero_point=zero_point
    )
