"""The passes around GEMMs as torch operators `mqat::*`: one signature each, a backend per device.

The dispatcher chooses by device, so fake tensors, `torch.compile` and tracing see each as one operator.
`reference` gives each its signature and says what it computes, and serves every device that
`_BACKENDS` has nothing else for; `fake` says what comes out of fake tensors. A backend is a namespace
with functions named and called alike; one that serves only some dtypes, shapes or layouts calls
`reference` for the others.

Formats and granularities travel by name (a schema knows no classes). Nothing here has a gradient: the
autograd functions of `parallel/` and `specs/` call these in both directions. Raw registration costs 5 us
a call, `torch.library.custom_op` 30: a training step makes dozens of calls a layer.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mqat.kernels import fake, reference
from mqat.kernels.cpu import passes as cpu_passes
from mqat.kernels.triton import passes as triton_passes
from mqat.quant.formats import QuantFormat
from mqat.quant.granularity import Granularity, PerTensor

# Dispatch key -> backend. CompositeExplicitAutograd: whatever has no other.
_BACKENDS = {
    "CompositeExplicitAutograd": reference,
    "CPU": cpu_passes,
    "CUDA": triton_passes,
}
_LIBRARY = torch.library.Library("mqat", "FRAGMENT")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _operator(function: _Function) -> _Function:
    """The operator of a `reference` function; a trailing `_`: its first tensor is changed."""
    name = function.__name__
    changed = list(inspect.signature(function).parameters)[: name.endswith("_")]
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=changed))
    for key, backend in _BACKENDS.items():
        if hasattr(backend, name):
            _LIBRARY.impl(name, getattr(backend, name), key)
    torch.library.register_fake(f"mqat::{name}", getattr(fake, name), lib=_LIBRARY)
    operator: _Function = getattr(torch.ops.mqat, name).default
    return operator


_encode = _operator(reference.encode)
_fake_quantize_with_mask = _operator(reference.fake_quantize_with_mask)
_decode = _operator(reference.decode)
_scaled_matmul = _operator(reference.scaled_matmul)
scale_product = _operator(reference.scale_product)
apply_mask_ = _operator(reference.apply_mask_)
accumulate_ = _operator(reference.accumulate_)
stochastic_rows = _operator(reference.stochastic_rows)
stochastic_columns = _operator(reference.stochastic_columns)
rms_norm = _operator(reference.rms_norm)
rms_norm_backward = _operator(reference.rms_norm_backward)
swiglu = _operator(reference.swiglu)
_swiglu_encode = _operator(reference.swiglu_encode)
swiglu_backward = _operator(reference.swiglu_backward)


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

    `with_mask`: a gradient will be masked, by `ste_clip_range` as in `functional.fake_quantize`. Codes
    of `fmt` are numbers; asymmetric ones have no mask here. Nothing waits for the device.
    """
    codes, marked, mask = _encode(
        x, scale, zero_point, fmt.name, str(granularity), ste_clip_range, with_mask
    )
    return Encoded(codes, marked, mask if with_mask else None)


def swiglu_encode(
    x: Tensor,
    scale: Tensor,
    fmt: QuantFormat,
    *,
    with_mask: bool,
    ste_clip_range: float | None = None,
) -> Encoded:
    """`encode(swiglu(x), scale, fmt, PerTensor())`, the same bits, of [..., gate | up].

    What `swiglu` returns is rounded to the dtype of `x`, but written nowhere.
    """
    codes, marked, mask = _swiglu_encode(x, scale, fmt.name, ste_clip_range, with_mask)
    return Encoded(codes, marked, mask if with_mask else None)


def fake_quantize_with_mask(
    x: Tensor,
    scale: Tensor,
    fmt: QuantFormat,
    granularity: Granularity,
    *,
    ste_clip_range: float | None,
    with_mask: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """What `functional.fake_quantize` gives, in the dtype of `x`, and the mask of `Encoded`."""
    values, mask = _fake_quantize_with_mask(
        x, scale, fmt.name, str(granularity), ste_clip_range, with_mask
    )
    return values, mask if with_mask else None


def decode(
    codes: Tensor,
    dtype: torch.dtype,
    *,
    scale: Tensor | None = None,
    granularity: Granularity = PerTensor(),  # noqa: B008
    zero_point: Tensor | None = None,
) -> Tensor:
    """`(codes - zero_point) * scale` of int8 or float8 codes, in float32 and rounded once to `dtype`.

    `scale` (float32) and `zero_point` (int32) as for `encode`; without a scale the codes' own values.
    """
    return _decode(codes, scale, zero_point, str(granularity), dtype)


def scaled_matmul(
    x_NI: Tensor,  # noqa: N803
    w_OI: Tensor,  # noqa: N803
    scale: Tensor,
    dtype: torch.dtype,
    *,
    row_scale: Tensor | None = None,
) -> Tensor:
    """`(x @ w.T) * scale` of codes, scaled in float32 and rounded once to `dtype`.

    Both are int8 or both float8. `scale`, float32 (1,) or (O,), is the product of the steps of both, or
    with `row_scale`, float32 (N,) of the rows of `x_NI`, that of `w_OI`.
    """
    return _scaled_matmul(x_NI, w_OI, scale, row_scale, dtype)
