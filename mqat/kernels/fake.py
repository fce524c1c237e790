"""What every operator of `operators.py` returns of fake tensors: shape, dtype, layout and device.

So tracing sees each operator as one, on any device, and no backend is built or imported for it. The
functions are named and called like those of `reference`.
"""

import torch
from torch import Tensor

from mqat.quant.formats import FORMATS


def _mask_of(x: Tensor) -> Tensor:
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def encode(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format_name: str,
    granularity_name: str,
    ste_clip_range: float | None,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.encode`."""
    codes = torch.empty_like(x, dtype=FORMATS[format_name].storage_dtype)
    mask = _mask_of(x) if with_mask else x.new_empty(0, dtype=torch.uint8)
    return codes, torch.empty_like(scale), mask


def fake_quantize_with_mask(
    x: Tensor,
    scale: Tensor,
    format_name: str,
    granularity_name: str,
    ste_clip_range: float | None,
    with_mask: bool = True,
) -> tuple[Tensor, Tensor]:
    """`reference.fake_quantize_with_mask`."""
    return torch.empty_like(x), _mask_of(x) if with_mask else x.new_empty(0, dtype=torch.uint8)


def decode(
    codes: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    granularity_name: str,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.decode`."""
    return torch.empty_like(codes, dtype=dtype)


def scale_product(
    product: Tensor, col_scale: Tensor, row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`reference.scale_product`."""
    return torch.empty_like(product, dtype=dtype)


def scaled_matmul(
    x: Tensor, w: Tensor, scale: Tensor, row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`reference.scaled_matmul`."""
    return x.new_empty(x.shape[0], w.shape[0], dtype=dtype)


def apply_mask_(x: Tensor, mask: Tensor | None, scale: Tensor | None) -> None:
    """`reference.apply_mask_`."""


def accumulate_(total: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor | None) -> None:
    """`reference.accumulate_`."""


def stochastic_rows(
    x: Tensor, factor: Tensor | None, columns: Tensor, format_name: str, seed: int
) -> tuple[Tensor, Tensor]:
    """`reference.stochastic_rows`."""
    codes = x.new_empty(x.shape, dtype=FORMATS[format_name].storage_dtype)
    return codes, x.new_empty(x.shape[0], dtype=torch.float32)


def stochastic_columns(
    x: Tensor, factor: Tensor | None, columns: Tensor, format_name: str, seed: int
) -> tuple[Tensor, Tensor]:
    """`reference.stochastic_columns`."""
    codes = x.new_empty(x.shape[1], x.shape[0], dtype=FORMATS[format_name].storage_dtype)
    return codes, x.new_empty(x.shape[1], dtype=torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.rms_norm`."""
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.rms_norm_backward`."""
    return torch.empty_like(x), x.new_empty(x.shape[-1], dtype=torch.float32)


def swiglu(x: Tensor) -> Tensor:
    """`reference.swiglu`."""
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def swiglu_encode(
    x: Tensor, scale: Tensor, format_name: str, ste_clip_range: float | None, with_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.swiglu_encode`."""
    return encode(swiglu(x), scale, None, format_name, "tensor", ste_clip_range, with_mask)


def swiglu_backward(grad: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """`reference.swiglu_backward`."""
    return x.new_empty(x.shape)
