"""The operators on a CPU: each reads and writes memory once, where torch's code takes five to ten times.

They compute the same codes, masks and roundings as `reference`, which serves what the compiled library
does not: other dtypes, shapes and layouts, or everything where there is no C++ compiler. Why not
`torch.compile`: encoding and packing the mask of 256 x 5632 numbers takes 3.1 ms there after 66 s of
compiling, 1.1 ms in eager torch.
"""

import ctypes
import functools
import math

import torch
from torch import Tensor

from mqat.kernels import reference
from mqat.kernels.cpu.build import SUFFIXES, library
from mqat.quant.formats import FORMATS, FP8_E4M3
from mqat.quant.functional import gradient_range
from mqat.quant.granularity import PerGroup, PerTensor

_PRODUCTS = {torch.int32: "ints", torch.float32: "floats", torch.bfloat16: "halves"}
_CODES = (torch.int8, torch.float8_e4m3fn)


class _CodeRange(ctypes.Structure):
    """Mirrors `CodeRange` in kernels.cpp."""

    _fields_ = [
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("first", ctypes.c_float),
        ("last", ctypes.c_float),
        ("is_float", ctypes.c_int32),
    ]


def _serves(*tensors: Tensor | None) -> bool:
    return all(x is None or x.is_contiguous() for x in tensors) and library() is not None


def _serves_floats(x: Tensor, *others: Tensor) -> bool:
    """All of one float type that the library knows."""
    return x.dtype in SUFFIXES and all(y.dtype == x.dtype for y in others) and _serves(x, *others)


def _call(name: str, dtype: torch.dtype, *arguments: object) -> None:
    passed = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    getattr(library(), f"mqat_{name}_{SUFFIXES[dtype]}")(*passed, torch.get_num_threads())


def _float32(scale: Tensor | None) -> Tensor | None:
    """As the library reads scales, whatever a caller's module was cast to."""
    return None if scale is None else scale.float().contiguous()


def _int32(zero_point: Tensor | None) -> Tensor | None:
    return None if zero_point is None else zero_point.int().contiguous()


def _run(shape: tuple[int, ...], granularity_name: str) -> int:
    """Consecutive elements that share a scale; 0 if that number differs within the tensor."""
    granularity = reference.named_granularity(granularity_name)
    if isinstance(granularity, PerTensor):
        return math.prod(shape)
    if isinstance(granularity, PerGroup):
        return granularity.size if shape[-1] % granularity.size == 0 else 0
    return shape[-1] if granularity.scale_shape(shape) == shape[:-1] else 0


def _encodable_run(x: Tensor, format_name: str, granularity_name: str) -> int:
    """The same, 0 also where the library cannot encode: a byte of mask belongs to one scale."""
    fmt, run = FORMATS[format_name], _run(tuple(x.shape), granularity_name)
    is_known = fmt == FP8_E4M3 or (not fmt.levels and fmt.storage_dtype == torch.int8)
    return run if is_known and run % 8 == 0 and _serves_floats(x) else 0


@functools.cache
def _code_range(format_name: str, ste_clip_range: float | None) -> _CodeRange:
    fmt = FORMATS[format_name]
    passing = gradient_range(fmt, ste_clip_range, fmt.qmin, fmt.qmax)
    return _CodeRange(fmt.qmin, fmt.qmax, *passing, int(fmt.is_float))


def encode(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format_name: str,
    granularity_name: str,
    ste_clip_range: float | None,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`operators.encode`; the mask is empty where none is asked for."""
    run = _encodable_run(x, format_name, granularity_name)
    if not run:
        return reference.encode(
            x, scale, zero_point, format_name, granularity_name, ste_clip_range, with_mask
        )
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    mask = torch.empty(x.numel() // 8 if with_mask else 0, dtype=torch.uint8, device=x.device)
    nan = torch.zeros(1, dtype=torch.int32, device=x.device)
    _call(
        "encode", x.dtype, x, _float32(scale), _int32(zero_point), x.numel(), run,
        ctypes.byref(_code_range(format_name, ste_clip_range)), codes, mask if with_mask else None, nan,
    )  # fmt: skip
    marked = torch.where(nan.bool(), torch.nan, scale)
    return codes.view(FORMATS[format_name].storage_dtype), marked, mask


def fake_quantize_with_mask(
    x: Tensor,
    scale: Tensor,
    format_name: str,
    granularity_name: str,
    ste_clip_range: float | None,
    with_mask: bool = True,
) -> tuple[Tensor, Tensor]:
    """`operators.fake_quantize_with_mask`, of integer formats."""
    run = _encodable_run(x, format_name, granularity_name)
    if not run or FORMATS[format_name].is_float:
        return reference.fake_quantize_with_mask(
            x, scale, format_name, granularity_name, ste_clip_range, with_mask
        )
    values = torch.empty_like(x)
    mask = torch.empty(x.numel() // 8 if with_mask else 0, dtype=torch.uint8, device=x.device)
    code_range = ctypes.byref(_code_range(format_name, ste_clip_range))
    _call(
        "fake_quantize", x.dtype, x, _float32(scale), x.numel(), run, code_range, values,
        mask if with_mask else None,
    )  # fmt: skip
    return values, mask


def decode(
    codes: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    granularity_name: str,
    dtype: torch.dtype,
) -> Tensor:
    """`operators.decode`."""
    run = _run(tuple(codes.shape), granularity_name)
    if not (run and dtype in SUFFIXES and codes.dtype in _CODES and _serves(codes)):
        return reference.decode(codes, scale, zero_point, granularity_name, dtype)
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    is_float = int(codes.dtype != torch.int8)
    _call(
        "decode", dtype, codes, is_float, _float32(scale), _int32(zero_point), codes.numel(), run, values
    )  # fmt: skip
    return values


def scale_product(
    product: Tensor, col_scale: Tensor, row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`reference.scale_product`."""
    if not (dtype in SUFFIXES and product.dtype in _PRODUCTS and _serves(product)):
        return reference.scale_product(product, col_scale, row_scale, dtype)
    rows, cols = product.shape
    out = torch.empty(rows, cols, dtype=dtype, device=product.device)
    _call(
        f"scale_{_PRODUCTS[product.dtype]}", dtype,
        product, rows, cols, _float32(col_scale), col_scale.numel(), _float32(row_scale), out,
    )  # fmt: skip
    return out


def scaled_matmul(
    x: Tensor, w: Tensor, scale: Tensor, row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`operators.scaled_matmul`: torch's GEMM between these passes."""
    return scale_product(reference.product_of_codes(x, w, dtype, decode), scale, row_scale, dtype)


def apply_mask_(x: Tensor, mask: Tensor | None, scale: Tensor | None) -> None:
    """`reference.apply_mask_`."""
    if x.numel() % 8 or not _serves_floats(x):
        return reference.apply_mask_(x, mask, scale)
    _call("apply_mask", x.dtype, x, x.numel(), mask, _float32(scale))


def accumulate_(total: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor | None) -> None:
    """`reference.accumulate_`."""
    if x.numel() % 8 or not (_serves_floats(x) and _serves(total)):
        return reference.accumulate_(total, x, mask, scale)
    _call("accumulate", x.dtype, x, x.numel(), mask, _float32(scale), total)


def _stochastic(
    name: str, x: Tensor, factor: Tensor | None, columns: Tensor, format_name: str, seed: int
) -> tuple[Tensor, Tensor]:
    fmt, is_by_row = FORMATS[format_name], name == "stochastic_rows"
    rows, cols = x.shape
    shape = (rows, cols) if is_by_row else (cols, rows)
    codes = torch.empty(shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(shape[0], dtype=torch.float32, device=x.device)
    _call(
        name, x.dtype, x, _float32(factor), columns, rows, cols, seed, int(fmt.is_float), fmt.qmax,
        codes, scale,
    )  # fmt: skip
    return codes.view(fmt.storage_dtype), scale


def stochastic_rows(
    x: Tensor, factor: Tensor | None, columns: Tensor, format_name: str, seed: int
) -> tuple[Tensor, Tensor]:
    """`reference.stochastic_rows`."""
    if not (_serves_floats(x) and _serves(columns)):
        return reference.stochastic_rows(x, factor, columns, format_name, seed)
    factor = x.new_ones(x.shape[1], dtype=torch.float32) if factor is None else factor
    return _stochastic("stochastic_rows", x, factor, columns, format_name, seed)


def stochastic_columns(
    x: Tensor, factor: Tensor | None, columns: Tensor, format_name: str, seed: int
) -> tuple[Tensor, Tensor]:
    """`reference.stochastic_columns`."""
    if not (_serves_floats(x) and _serves(columns)):
        return reference.stochastic_columns(x, factor, columns, format_name, seed)
    return _stochastic("stochastic_columns", x, factor, columns, format_name, seed)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.rms_norm`.

    Heads of a fused projection lie apart or not, depending on how many a rank has: results do not.
    """
    x = x.contiguous()
    if not _serves_floats(x, weight):
        return reference.rms_norm(x, weight, eps)
    out = torch.empty_like(x)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _call("rms_norm", x.dtype, x, weight, rstd.numel(), x.shape[-1], eps, out, rstd)
    return out, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.rms_norm_backward`."""
    grad, x = grad.contiguous(), x.contiguous()
    if not _serves_floats(x, weight, grad):
        return reference.rms_norm_backward(grad, x, weight, rstd)
    dx = torch.empty_like(x)
    dweight = torch.empty(x.shape[-1], dtype=torch.float32, device=x.device)
    _call(
        "rms_norm_backward", x.dtype, grad, x, weight, rstd, rstd.numel(), x.shape[-1], dx, dweight
    )
    return dx, dweight


def swiglu(x: Tensor) -> Tensor:
    """`reference.swiglu`."""
    if not _serves_floats(x):
        return reference.swiglu(x)
    rows, cols = x.numel() // x.shape[-1], x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], cols, dtype=x.dtype, device=x.device)
    _call("swiglu", x.dtype, x, rows, cols, out)
    return out


def swiglu_encode(
    x: Tensor, scale: Tensor, format_name: str, ste_clip_range: float | None, with_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.swiglu_encode`, from the values of this backend's `swiglu`."""
    cols = x.shape[-1] // 2
    if cols % 8 or not _encodable_run(x, format_name, "tensor"):
        return encode(swiglu(x), scale, None, format_name, "tensor", ste_clip_range, with_mask)
    codes = torch.empty(*x.shape[:-1], cols, dtype=torch.int8, device=x.device)
    mask = torch.empty(codes.numel() // 8 if with_mask else 0, dtype=torch.uint8, device=x.device)
    nan = torch.zeros(1, dtype=torch.int32, device=x.device)
    _call(
        "swiglu_encode", x.dtype, x, _float32(scale), x.numel() // x.shape[-1], cols,
        ctypes.byref(_code_range(format_name, ste_clip_range)), codes, mask if with_mask else None, nan,
    )  # fmt: skip
    marked = torch.where(nan.bool(), torch.nan, scale)
    return codes.view(FORMATS[format_name].storage_dtype), marked, mask


def swiglu_backward(grad: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """`reference.swiglu_backward`."""
    cols = x.shape[-1] // 2
    if not _serves_floats(x, grad):
        return reference.swiglu_backward(grad, x, mask)
    if mask is not None and cols % 8:  # rows share bytes of the mask
        grad = grad.clone()
        apply_mask_(grad, mask, None)
        mask = None
    out = torch.empty_like(x)
    _call("swiglu_backward", x.dtype, grad, x, mask, x.numel() // x.shape[-1], cols, out)
    return out
