"""The passes around GEMMs as torch operators `mqat::*`: one signature each, a backend per device.

The dispatcher chooses by device, so fake tensors, `torch.compile` and tracing see each as one operator.
`reference` serves every device that `_BACKENDS` has nothing else for, and says of fake tensors what
comes out. A backend is a namespace with functions named and called as the schemas below; one that serves
only some dtypes, shapes or layouts calls `reference` for the others.

Formats and granularities travel by name (a schema knows no classes). Nothing here has a gradient: the
autograd functions of `parallel/` and `specs/` call these in both directions. Raw registration costs 5 us
a call, `torch.library.custom_op` 30: a training step makes dozens of calls a layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mqat.kernels import reference
from mqat.kernels.cpu import passes
from mqat.quant.formats import QuantFormat
from mqat.quant.granularity import Granularity, PerTensor

_SCHEMAS = (
    "encode(Tensor x, Tensor scale, Tensor? zero_point, str format_name, str granularity_name, "
    "float? ste_clip_range, bool with_mask) -> (Tensor, Tensor, Tensor)",
    "fake_quantize_with_mask(Tensor x, Tensor scale, str format_name, str granularity_name, "
    "float? ste_clip_range) -> (Tensor, Tensor)",
    "decode(Tensor codes, Tensor? scale, Tensor? zero_point, str granularity_name, "
    "ScalarType dtype) -> Tensor",
    "scale_product(Tensor product, Tensor col_scale, Tensor? row_scale, ScalarType dtype) -> Tensor",
    "apply_mask_(Tensor(a!) x, Tensor? mask, Tensor? scale) -> ()",
    "accumulate_(Tensor(a!) total, Tensor x, Tensor? mask, Tensor? scale) -> ()",
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    "swiglu(Tensor x) -> Tensor",
    "swiglu_backward(Tensor grad, Tensor x) -> Tensor",
)
# Dispatch key -> backend. CompositeExplicitAutograd: whatever has no other, fake tensors among it.
_BACKENDS = {"CompositeExplicitAutograd": reference, "CPU": passes}

_LIBRARY = torch.library.Library("mqat", "FRAGMENT")
for _schema in _SCHEMAS:
    _name = _LIBRARY.define(_schema)
    for _key, _backend in _BACKENDS.items():
        _LIBRARY.impl(_name, getattr(_backend, _name), _key)
_OPS = torch.ops.mqat


@dataclass(frozen=True)
class Encoded:
    """A quantized operand: one byte of code and one bit of mask per element.

    Attributes:
        codes: In the format's storage dtype, shaped like the operand.
        scale: As given; NaN if the operand held NaN, which integer codes cannot say.
        mask: uint8, flat; bit i of byte j is 1 where element 8 j + i was not clipped. None if not
            asked for.
    """

    codes: Tensor
    scale: Tensor
    mask: Tensor | None


def encode(
    x: Tensor,
    scale: Tensor,
    fmt: QuantFormat,
    granularity: Granularity,
    *,
    with_mask: bool,
    zero_point: Tensor | None = None,
    ste_clip_range: float | None = None,
) -> Encoded:
    """Codes as `functional.quantize` computes them, and the mask, from one division.

    Nothing waits for the device.

    Args:
        x: Float operand.
        scale: As for `functional.quantize`, and `zero_point`.
        fmt: A format whose codes are numbers.
        granularity: Which elements share a scale.
        with_mask: Whether a gradient will be masked.
        zero_point: Of asymmetric formats, which have no mask here.
        ste_clip_range: As for `functional.fake_quantize`.
    """
    codes, marked, mask = _OPS.encode.default(
        x, scale, zero_point, fmt.name, str(granularity), ste_clip_range, with_mask
    )
    return Encoded(codes, marked, mask if with_mask else None)


def fake_quantize_with_mask(
    x: Tensor,
    scale: Tensor,
    fmt: QuantFormat,
    granularity: Granularity,
    *,
    ste_clip_range: float | None,
) -> tuple[Tensor, Tensor]:
    """What `functional.fake_quantize` gives, in the dtype of `x`, and the mask of `Encoded`."""
    values, mask = _OPS.fake_quantize_with_mask.default(
        x, scale, fmt.name, str(granularity), ste_clip_range
    )
    return values, mask


def decode(
    codes: Tensor,
    dtype: torch.dtype,
    *,
    scale: Tensor | None = None,
    granularity: Granularity = PerTensor(),  # noqa: B008
    zero_point: Tensor | None = None,
) -> Tensor:
    """`(codes - zero_point) * scale`, multiplied in float32 and rounded once to `dtype`.

    Args:
        codes: int8 or float8.
        dtype: Of the result.
        scale: float32, as for `encode`; None gives the codes' own values.
        granularity: Of `scale`.
        zero_point: int32, shaped like `scale`.
    """
    result: Tensor = _OPS.decode.default(codes, scale, zero_point, str(granularity), dtype)
    return result


def scale_product(
    product: Tensor, col_scale: Tensor, row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`product * row_scale[:, None] * col_scale` in float32, rounded once to `dtype`; [N, O].

    Args:
        product: int32, float32 or bfloat16 [N, O].
        col_scale: float32 (1,) or (O,).
        row_scale: float32 (N,), or None for ones.
        dtype: Of the result.
    """
    result: Tensor = _OPS.scale_product.default(product, col_scale, row_scale, dtype)
    return result


def apply_mask_(x: Tensor, mask: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """Zeroes `x` where the bit is 0, multiplies it by `scale`, float32 (1,), elsewhere; returns `x`."""
    _OPS.apply_mask_.default(x, mask, scale)
    return x


def accumulate_(total: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor | None) -> None:
    """`total += x * scale` where the bit is 1, in float32; `total` is float32 and shaped like `x`."""
    _OPS.accumulate_.default(total, x, mask, scale)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x / rms(x) * weight` over the last dimension, and 1 / rms(x) of each row in float32."""
    out, rstd = _OPS.rms_norm.default(x, weight, eps)
    return out, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` for `x`, in its dtype, and for `weight`, in float32."""
    dx, dweight = _OPS.rms_norm_backward.default(grad, x, weight, rstd)
    return dx, dweight


def swiglu(x: Tensor) -> Tensor:
    """`silu(gate) * up` of [..., gate | up]."""
    result: Tensor = _OPS.swiglu.default(x)
    return result


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of `swiglu` for `x`."""
    result: Tensor = _OPS.swiglu_backward.default(grad, x)
    return result
