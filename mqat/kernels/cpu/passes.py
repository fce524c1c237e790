"""Element-wise passes on a CPU that read and write memory once, where torch's take five to ten.

They compute the same codes, masks and roundings as the torch code beside each call, which is what runs
on CUDA, without a compiler, or after `set_enabled(False)`. Why not `torch.compile`: encoding and packing
the mask of 256 x 5632 numbers takes 3.1 ms there after 66 s of compiling, 1.1 ms in eager torch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from mqat.kernels.cpu.build import SUFFIXES, library

DTYPES = tuple(SUFFIXES)  # of floats


class _Grid(ctypes.Structure):
    """Mirrors `Grid` in kernels.cpp."""

    _fields_ = [
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("first", ctypes.c_float),
        ("last", ctypes.c_float),
        ("is_float", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Grid:
    """Codes `low` to `high`; gradients pass where first <= x / scale <= last.

    Attributes:
        low: Smallest code.
        high: Largest code.
        first: Smallest x / scale that passes gradients.
        last: Largest.
        is_float: E4M3 codes.
    """

    low: float
    high: float
    first: float
    last: float
    is_float: bool


@dataclass
class _Switch:
    is_on: bool = True


_switch = _Switch()


def set_enabled(is_on: bool) -> None:
    """Off: torch's own operations everywhere, for comparisons and for doubts."""
    _switch.is_on = is_on


def serves(*tensors: Tensor) -> bool:
    """Whether these tensors can be handed to the kernels."""
    return (
        _switch.is_on
        and not torch.compiler.is_compiling()
        and all(x.device.type == "cpu" and x.is_contiguous() for x in tensors)
        and library() is not None
    )


def serves_floats(*tensors: Tensor) -> bool:
    """The same, and all are of one float type that there are kernels for."""
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(x.dtype == dtype for x in tensors) and serves(*tensors)


def _call(name: str, dtype: torch.dtype, *arguments: object) -> None:
    passed = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    getattr(library(), f"mqat_{name}_{SUFFIXES[dtype]}")(*passed, torch.get_num_threads())


def _grid(grid: Grid) -> object:
    fields = (grid.low, grid.high, grid.first, grid.last, int(grid.is_float))
    return ctypes.byref(_Grid(*fields))


def _steps(scale: Tensor | None) -> Tensor | None:
    """As the kernels read them, whatever a caller's module was cast to."""
    return None if scale is None else scale.float().contiguous()


def _mask_like(x: Tensor) -> Tensor:
    return torch.empty(x.numel() // 8, dtype=torch.uint8, device=x.device)


def encode(
    x: Tensor, scale: Tensor, run: int, grid: Grid, *, zero: Tensor | None, with_mask: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Codes as int8 bits, packed mask, and a bool: is anything NaN.

    Args:
        x: Contiguous floats.
        scale: float32, one per `run` consecutive elements.
        run: Multiple of 8.
        grid: Of the format.
        zero: int32 zero points, shaped like `scale`.
        with_mask: Whether the mask is wanted.
    """
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    mask = _mask_like(x) if with_mask else None
    nan = torch.zeros(1, dtype=torch.int32, device=x.device)
    zero = None if zero is None else zero.int().contiguous()
    _call("encode", x.dtype, x, _steps(scale), zero, x.numel(), run, _grid(grid), codes, mask, nan)
    return codes, mask, nan.bool()


def fake_quantize(
    x: Tensor, scale: Tensor, run: int, grid: Grid, *, with_mask: bool
) -> tuple[Tensor, Tensor | None]:
    """Dequantized codes of an integer format in the dtype of `x`, and the packed mask."""
    values = torch.empty_like(x)
    mask = _mask_like(x) if with_mask else None
    _call("fake_quantize", x.dtype, x, _steps(scale), x.numel(), run, _grid(grid), values, mask)
    return values, mask


def decode(
    codes: Tensor,
    scale: Tensor | None,
    run: int,
    dtype: torch.dtype,
    *,
    zero: Tensor | None = None,
) -> Tensor:
    """`(codes - zero) * scale`, rounded once to `dtype`; int8 or E4M3 codes."""
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    is_float = int(codes.dtype != torch.int8)
    zero = None if zero is None else zero.int().contiguous()
    _call("decode", dtype, codes, is_float, _steps(scale), zero, codes.numel(), run, values)
    return values


def scale_product(
    product: Tensor, col_scale: Tensor, row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`product * row_scale[:, None] * col_scale`, [N, O]; `col_scale` is (1,) or (O,)."""
    names = {torch.int32: "ints", torch.float32: "floats", torch.bfloat16: "halves"}
    rows, cols = product.shape
    out = torch.empty(rows, cols, dtype=dtype, device=product.device)
    _call(
        f"scale_{names[product.dtype]}", dtype,
        product, rows, cols, _steps(col_scale), col_scale.numel(), _steps(row_scale), out,
    )  # fmt: skip
    return out


def apply_mask_(x: Tensor, mask: Tensor | None, scale: Tensor | None) -> None:
    """`x *= scale` where the bit is set, zero elsewhere."""
    _call("apply_mask", x.dtype, x, x.numel(), mask, _steps(scale))


def accumulate_(total: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor | None) -> None:
    """`total += x * scale` where the bit is set; `total` is float32."""
    _call("accumulate", x.dtype, x, x.numel(), mask, _steps(scale), total)


def swiglu(x: Tensor) -> Tensor:
    """`silu(gate) * up` of [..., gate | up]."""
    rows, cols = x.numel() // x.shape[-1], x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], cols, dtype=x.dtype, device=x.device)
    _call("swiglu", x.dtype, x, rows, cols, out)
    return out


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of `swiglu` for `x`."""
    out = torch.empty_like(x)
    _call("swiglu_backward", x.dtype, grad, x, x.numel() // x.shape[-1], x.shape[-1] // 2, out)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x / rms(x) * weight`, and 1 / rms(x) of each row in float32."""
    out = torch.empty_like(x)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _call("rms_norm", x.dtype, x, weight, rstd.numel(), x.shape[-1], eps, out, rstd)
    return out, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` for `x`, and in float32 for `weight`."""
    dx = torch.empty_like(x)
    dweight = torch.empty(x.shape[-1], dtype=torch.float32, device=x.device)
    _call(
        "rms_norm_backward", x.dtype, grad, x, weight, rstd, rstd.numel(), x.shape[-1], dx, dweight
    )
    return dx, dweight
