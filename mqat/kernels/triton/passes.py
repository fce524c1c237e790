"""The operators on CUDA: each reads and writes memory once, torch's code five to twenty times.

They compute the same codes, masks and roundings as `reference`, which serves what the kernels do not:
other dtypes, shapes and layouts, older GPUs, or everything where Triton is missing. RMSNorm has no
kernel here: models use torch's on CUDA (`specs/elementwise.py`).

Triton is imported at the first call with a CUDA tensor, not before: machines without a GPU need none of
it. Nothing here waits for the device or depends on what a tensor holds, so CUDA graphs can record it.
"""

import functools
import importlib
import logging
import math
import subprocess
from typing import Any

import torch
from torch import Tensor

from mqat.kernels import reference
from mqat.quant.formats import FORMATS, FP4_E2M1, FP8_E4M3
from mqat.quant.functional import gradient_range
from mqat.quant.granularity import PerGroup, PerTensor

_logger = logging.getLogger(__name__)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int8, torch.uint8)
_BYTES = 256  # of mask in a tile: 2048 elements
# Offsets of bytes of mask fit int32; a tile beyond the end may be counted from one.
_MOST_ELEMENTS = 8 * (2**31 - _BYTES)
_SIDE = 64  # of tiles that are rounded stochastically
_OLDEST = (8, 0)
_FP8_UNITS = (8, 9)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """NVIDIA's number of an architecture; (0, 0) of what is none."""
    if device.type != "cuda" or torch.version.cuda is None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


@functools.cache
def _is_served(device: torch.device) -> bool:
    """Whether kernels can run there; if not, one warning says why, what it costs and what to do."""
    cost = (
        "the passes around quantized GEMMs run in torch and move up to 20 times the memory "
        "(an INT8 linear then takes about twice the time of a bfloat16 one)"
    )
    if capability(device) < _OLDEST:
        _logger.warning(
            "%s: kernels need an NVIDIA GPU of compute capability 8.0 (A100) or newer; %s",
            torch.cuda.get_device_name(device),
            cost,
        )
        return False
    try:
        importlib.import_module("triton").runtime.driver.active.get_current_target()
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        _logger.warning(
            "Triton cannot be used (%s): %s. CUDA builds of torch for Linux bring it, otherwise "
            "`pip install triton`; it needs a C compiler such as gcc.",
            error,
            cost,
        )
        return False
    return True


@functools.cache
def has_fp8_units(device: torch.device) -> bool:
    """Whether FP8 is converted and multiplied there; if not, one warning says what to use instead."""
    if capability(device) >= _FP8_UNITS:
        return True
    _logger.warning(
        "%s has no FP8 units (compute capability 8.9 or newer has): FP8 codes are made by torch and "
        "multiplied in bfloat16, at more than twice the time of a bfloat16 linear. Use an INT8 "
        "algorithm there, such as int8 or int8_pc_pt.",
        torch.cuda.get_device_name(device),
    )
    return False


def _launch(kernel: str, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """A kernel of elementwise.py over all of `x`."""
    module = importlib.import_module("mqat.kernels.triton.elementwise")
    tiles = -(-x.numel() // (8 * _BYTES))
    with torch.cuda.device_of(x):
        getattr(module, kernel)[(tiles,)](
            *arguments, **constants, tile=_BYTES, enable_fp_fusion=False
        )


def _serves(*tensors: Tensor) -> bool:
    x = tensors[0]
    is_one_run = all(y.is_contiguous() for y in tensors)
    return is_one_run and 0 < x.numel() <= _MOST_ELEMENTS and _is_served(x.device)


def _bytes_of_run(shape: tuple[int, ...], granularity_name: str) -> int:
    """Bytes of mask that share a scale; 0 if it is not a whole number, the same everywhere."""
    granularity = reference.named_granularity(granularity_name)
    if isinstance(granularity, PerTensor):
        return -(-math.prod(shape) // 8)
    size = 0
    if isinstance(granularity, PerGroup):
        size = granularity.size if shape[-1] % granularity.size == 0 else 0
    elif granularity.scale_shape(shape) == shape[:-1]:
        size = shape[-1]
    return size // 8 if size % 8 == 0 else 0


def _is_per_tensor(granularity_name: str) -> bool:
    return isinstance(reference.named_granularity(granularity_name), PerTensor)


def _step(scale: Tensor | None) -> Tensor | None:
    """As kernels read scales, whatever a caller's module was cast to."""
    return None if scale is None else scale.float().contiguous()


def _zero(zero_point: Tensor | None) -> Tensor | None:
    return None if zero_point is None else zero_point.int().contiguous()


@functools.cache
def _code_range(
    format_name: str, ste_clip_range: float | None
) -> tuple[float, float, float, float]:
    """First and last code, and the range in which gradients pass."""
    fmt = FORMATS[format_name]
    passing = gradient_range(fmt, ste_clip_range, fmt.qmin, fmt.qmax)
    return float(fmt.qmin), float(fmt.qmax), float(passing[0]), float(passing[1])


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
    fmt, run = FORMATS[format_name], _bytes_of_run(tuple(x.shape), granularity_name)
    is_integer = not fmt.is_float and fmt.storage_dtype in _INTEGERS
    is_served = is_integer or (fmt == FP8_E4M3 and zero_point is None and has_fp8_units(x.device))
    if not (run and x.dtype in _FLOATS and _serves(x) and is_served):
        return reference.encode(
            x, scale, zero_point, format_name, granularity_name, ste_clip_range, with_mask
        )
    codes = torch.empty(x.shape, dtype=fmt.storage_dtype, device=x.device)
    mask = x.new_empty((x.numel() + 7) // 8 if with_mask else 0, dtype=torch.uint8)
    nan = torch.zeros((), dtype=torch.float32, device=x.device)
    _launch(
        "encode", x,
        x, _step(scale), _zero(zero_point), codes, mask if with_mask else None, nan, x.numel(), run,
        *_code_range(format_name, ste_clip_range),
        is_float=fmt.is_float, per_tensor=_is_per_tensor(granularity_name),
    )  # fmt: skip
    return codes, (scale + nan).to(scale.dtype), mask


def fake_quantize_with_mask(
    x: Tensor,
    scale: Tensor,
    format_name: str,
    granularity_name: str,
    ste_clip_range: float | None,
    with_mask: bool = True,
) -> tuple[Tensor, Tensor]:
    """`operators.fake_quantize_with_mask`, of integers, E4M3 and E2M1."""
    fmt, run = FORMATS[format_name], _bytes_of_run(tuple(x.shape), granularity_name)
    kinds = {FP8_E4M3.name: "e4m3", FP4_E2M1.name: "e2m1"}
    kind = kinds.get(format_name, "" if fmt.is_float else "integer")
    is_served = bool(kind) and (kind != "e4m3" or has_fp8_units(x.device))
    if not (run and x.dtype in _FLOATS and _serves(x) and is_served):
        return reference.fake_quantize_with_mask(
            x, scale, format_name, granularity_name, ste_clip_range, with_mask
        )
    values = torch.empty_like(x)
    mask = x.new_empty((x.numel() + 7) // 8 if with_mask else 0, dtype=torch.uint8)
    _launch(
        "fake_quantize", x,
        x, _step(scale), values, mask if with_mask else None, x.numel(), run,
        *_code_range(format_name, ste_clip_range), kind=kind,
        per_tensor=_is_per_tensor(granularity_name),
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
    run = _bytes_of_run(tuple(codes.shape), granularity_name) or (scale is None)
    is_float8 = codes.dtype == torch.float8_e4m3fn and zero_point is None
    is_served = codes.dtype in _INTEGERS or (is_float8 and has_fp8_units(codes.device))
    if not (run and dtype in _FLOATS and _serves(codes) and is_served):
        return reference.decode(codes, scale, zero_point, granularity_name, dtype)
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    _launch(
        "decode", codes,
        codes, _step(scale), _zero(zero_point) if scale is not None else None, values,
        codes.numel(), int(run), per_tensor=_is_per_tensor(granularity_name),
    )  # fmt: skip
    return values


def _row_bytes(x: Tensor, *others: Tensor) -> int:
    """Bytes of mask of a row that SwiGLU makes of [..., gate | up]; 0: no kernel serves it."""
    cols = x.shape[-1] // 2
    is_served = cols % 8 == 0 and x.dtype in _FLOATS and all(y.dtype == x.dtype for y in others)
    return cols // 8 if is_served and _serves(x, *others) else 0


def swiglu(x: Tensor) -> Tensor:
    """`reference.swiglu`."""
    row_bytes = _row_bytes(x)
    if not row_bytes:
        return reference.swiglu(x)
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _launch("swiglu", out, x, out, out.numel(), row_bytes)
    return out


def swiglu_encode(
    x: Tensor, scale: Tensor, format_name: str, ste_clip_range: float | None, with_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.swiglu_encode`, from the values of this backend's `swiglu`."""
    fmt, row_bytes = FORMATS[format_name], _row_bytes(x)
    is_integer = not fmt.is_float and fmt.storage_dtype in _INTEGERS
    if not (row_bytes and (is_integer or (fmt == FP8_E4M3 and has_fp8_units(x.device)))):
        return encode(swiglu(x), scale, None, format_name, "tensor", ste_clip_range, with_mask)
    codes = x.new_empty(*x.shape[:-1], x.shape[-1] // 2, dtype=fmt.storage_dtype)
    mask = x.new_empty(codes.numel() // 8 if with_mask else 0, dtype=torch.uint8)
    nan = torch.zeros((), dtype=torch.float32, device=x.device)
    _launch(
        "swiglu_encode", codes,
        x, _step(scale), codes, mask if with_mask else None, nan, codes.numel(), row_bytes,
        *_code_range(format_name, ste_clip_range), is_float=fmt.is_float,
    )  # fmt: skip
    return codes, (scale + nan).to(scale.dtype), mask


def swiglu_backward(grad: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """`reference.swiglu_backward`."""
    grad = grad.contiguous()
    row_bytes = _row_bytes(x, grad)
    if not row_bytes:
        return reference.swiglu_backward(grad, x, mask)
    out = torch.empty_like(x)
    _launch("swiglu_backward", grad, grad, x, mask, out, grad.numel(), row_bytes)
    return out


def _tiles(rows: int, cols: int, device: torch.device) -> dict[str, int]:
    """Of the integer GEMM: as large as registers allow without spilling, smaller for few rows."""
    if rows <= 64:
        tile_rows = max(16, 1 << (rows - 1).bit_length())
        return {
            "tile_rows": tile_rows,
            "tile_cols": 64,
            "tile_inner": 128,
            "num_warps": 4,
            "num_stages": 4,
        }
    # H100 and B200 multiply from shared memory, of which they have the 147 kB that this takes.
    if capability(device)[0] in (9, 10) and rows >= 1024 and cols >= 2048:
        return {
            "tile_rows": 128,
            "tile_cols": 256,
            "tile_inner": 128,
            "num_warps": 8,
            "num_stages": 3,
        }
    return {"tile_rows": 128, "tile_cols": 128, "tile_inner": 64, "num_warps": 8, "num_stages": 4}


def _int8_matmul(
    x: Tensor, w: Tensor, scale: Tensor, row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Scales and rounds sums before they leave the chip."""
    kernel = importlib.import_module("mqat.kernels.triton.int8_gemm").scaled_matmul
    (rows, inner), cols = x.shape, w.shape[0]
    tiles = _tiles(rows, cols, x.device)
    out = torch.empty(rows, cols, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        kernel[(-(-rows // tiles["tile_rows"]) * -(-cols // tiles["tile_cols"]),)](
            x.contiguous(), w.contiguous(), _step(scale), _step(row_scale), out, rows, cols, inner,
            per_tensor=scale.numel() == 1, is_whole=inner % tiles["tile_inner"] == 0, stack=8,
            enable_fp_fusion=False, **tiles,
        )  # fmt: skip
    return out


def _float8_matmul(
    x: Tensor, w: Tensor, scale: Tensor, row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Of a scale for all, or one for every row and column."""
    if row_scale is None and scale.numel() == 1:
        by_x, by_w = scale.float().view(1, 1), scale.new_ones(1, 1, dtype=torch.float32)
    else:
        rows = scale.new_ones(1) if row_scale is None else row_scale
        by_x = rows.float().expand(x.shape[0]).contiguous().view(-1, 1)
        by_w = scale.float().expand(w.shape[0]).contiguous().view(1, -1)
    # Without fast accumulation: partial sums are added in float32, as elsewhere.
    return torch._scaled_mm(
        x.contiguous(), w.contiguous().t(), by_x, by_w, out_dtype=dtype, use_fast_accum=False
    )


def scaled_matmul(
    x: Tensor, w: Tensor, scale: Tensor, row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`operators.scaled_matmul`; FP8 where `torch._scaled_mm` takes the shape and the dtype."""
    has_work = x.numel() > 0 and w.numel() > 0
    if x.dtype == torch.int8:
        if has_work and dtype in _FLOATS and _is_served(x.device):
            return _int8_matmul(x, w, scale, row_scale, dtype)
    elif has_work and dtype == torch.bfloat16 and has_fp8_units(x.device):
        if x.shape[1] % 16 == 0 and w.shape[0] % 16 == 0:
            return _float8_matmul(x, w, scale, row_scale, dtype)
    product = reference.product_of_codes(x, w, dtype, decode)
    return reference.scale_product(product, scale, row_scale, dtype)


def apply_mask_(x: Tensor, mask: Tensor | None, scale: Tensor | None) -> None:
    """`reference.apply_mask_`."""
    if mask is None and scale is None:
        return
    if not (x.dtype in _FLOATS and _serves(x)):
        reference.apply_mask_(x, mask, scale)
        return
    _launch("apply_mask", x, x, mask, _step(scale), x.numel())


def accumulate_(total: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor | None) -> None:
    """`reference.accumulate_`."""
    if not (x.dtype in _FLOATS and total.dtype == torch.float32 and _serves(x, total)):
        reference.accumulate_(total, x, mask, scale)
        return
    _launch("accumulate", x, total, x, mask, _step(scale), x.numel())


def _stochastic(
    x: Tensor, factor: Tensor | None, columns: Tensor, format_name: str, seed: int, *, by_row: bool
) -> tuple[Tensor, Tensor]:
    kernels = importlib.import_module("mqat.kernels.triton.stochastic")
    fmt, (rows, cols) = FORMATS[format_name], x.shape
    shape = (rows, cols) if by_row else (cols, rows)
    codes = torch.empty(shape, dtype=fmt.storage_dtype, device=x.device)
    largest = torch.zeros(shape[0], dtype=torch.int32, device=x.device)
    scale = torch.empty(shape[0], dtype=torch.float32, device=x.device)
    grid = (-(-rows // _SIDE), -(-cols // _SIDE))
    options = {"by_row": by_row, "side": _SIDE, "enable_fp_fusion": False}
    factor = _step(factor)
    with torch.cuda.device_of(x):
        kernels.find_largest[grid](x, factor, largest, rows, cols, **options)
        kernels.round_up_or_down[grid](
            x, factor, columns, largest, codes.view(torch.uint8), scale, rows, cols, seed,
            float(fmt.qmax), is_float=fmt.is_float, **options,
        )  # fmt: skip
    return codes, scale


def stochastic_rows(
    x: Tensor, factor: Tensor | None, columns: Tensor, format_name: str, seed: int
) -> tuple[Tensor, Tensor]:
    """`reference.stochastic_rows`."""
    if not (x.dtype in _FLOATS and _serves(x, columns)):
        return reference.stochastic_rows(x, factor, columns, format_name, seed)
    return _stochastic(x, factor, columns, format_name, seed, by_row=True)


def stochastic_columns(
    x: Tensor, factor: Tensor | None, columns: Tensor, format_name: str, seed: int
) -> tuple[Tensor, Tensor]:
    """`reference.stochastic_columns`."""
    if not (x.dtype in _FLOATS and _serves(x, columns)):
        return reference.stochastic_columns(x, factor, columns, format_name, seed)
    return _stochastic(x, factor, columns, format_name, seed, by_row=False)
