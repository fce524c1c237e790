"""Every operator of `operators.py` in torch: any device and dtype, and what other backends must equal.

The signatures are the operators' (`operators.py` reads schemas from the annotations).
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mqat.kernels.gemm import compute_dtype, int8_matmul
from mqat.quant.formats import FORMATS, QuantFormat
from mqat.quant.functional import gradient_range, quantize_dequantize_
from mqat.quant.granularity import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    granularity_from_str,
    grouped_view,
)

named_granularity = functools.cache(granularity_from_str)

# Times eight bytes of 0 or 1: their bits, in the highest byte (no two partial products meet in a bit).
# A byte times the other: the same byte eight times, of which `_BITS` keeps a bit each.
_GATHER, _SPREAD = 0x0102040810204080, 0x0101010101010101
_BITS = 0x8040201008040201 - 2**64
_WORD = 0xFFFFFFFF
# Elements of a weight at a time: the float32 temporaries then stay in a CPU cache, and are not fetched
# from and returned to the system at every call.
_CACHED = 1 << 17


def pack_mask(mask: Tensor) -> Tensor:
    """Eight bools in a byte; uint8, flat, padded with zeros. Bit i of byte j is element 8 j + i."""
    flat = F.pad(mask.reshape(-1).view(torch.uint8), (0, -mask.numel() % 8))
    return (flat.view(torch.int64) * _GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_mask`, as uint8 zeros and ones."""
    words = packed.to(torch.int64).mul_(_SPREAD).bitwise_and_(_BITS)
    return words.view(torch.uint8)[: math.prod(shape)].view(shape).clamp_max_(1)


def _packed_gradient_mask(ratio: Tensor, fmt: QuantFormat, ste_clip_range: float | None) -> Tensor:
    # Compared as floats: comparisons that write bools are not vectorized on CPUs.
    return pack_mask(
        ratio.clamp(*gradient_range(fmt, ste_clip_range, fmt.qmin, fmt.qmax)).eq_(ratio).bool()
    )


def _by_rows(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    x: Tensor,
    scale: Tensor,
    granularity: Granularity,
) -> tuple[Tensor, ...]:
    """`function(x, scale)`; for a large weight on a CPU a few rows at a time, results concatenated."""
    if x.device.type == "cpu" and x.dim() == 2 and x.numel() > 2 * _CACHED:
        rows = max(8, _CACHED // x.shape[1] // 8 * 8)  # whole bytes of mask
        if rows < len(x) and isinstance(granularity, PerTensor | PerChannel | PerGroup):
            pieces = x.split(rows)
            is_one = isinstance(granularity, PerTensor)
            scales = [scale] * len(pieces) if is_one else scale.split(rows)
            done = [function(*piece) for piece in zip(pieces, scales, strict=True)]
            return tuple(torch.cat(results) for results in zip(*done, strict=True))
    return function(x, scale)


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
    fmt, granularity = FORMATS[format_name], named_granularity(granularity_name)
    if zero_point is not None:
        zero = grouped_view(x, zero_point, granularity)[1]

    def encoded(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups, scales = grouped_view(x.float(), scale, granularity)
        ratio = groups / scales
        mask = x.new_empty(0, dtype=torch.uint8)
        if with_mask:
            mask = _packed_gradient_mask(ratio, fmt, ste_clip_range)
        # amax is NaN if anything is; infinities clip to the last code.
        is_nan = ratio.amax().isnan() if ratio.numel() else scale.new_zeros((), dtype=torch.bool)
        if not fmt.is_float:
            ratio.round_()
        if zero_point is not None:
            ratio += zero
        codes = ratio.clamp_(fmt.qmin, fmt.qmax).to(fmt.storage_dtype).view(x.shape)
        return codes.view(torch.uint8), is_nan.reshape(1), mask

    if zero_point is None:
        codes, is_nan, mask = _by_rows(encoded, x, scale, granularity)
    else:
        codes, is_nan, mask = encoded(x, scale)
    return codes.view(fmt.storage_dtype), torch.where(is_nan.any(), torch.nan, scale), mask


def fake_quantize_with_mask(
    x: Tensor,
    scale: Tensor,
    format_name: str,
    granularity_name: str,
    ste_clip_range: float | None,
    with_mask: bool = True,
) -> tuple[Tensor, Tensor]:
    """`operators.fake_quantize_with_mask`; the mask is empty where none is asked for."""
    fmt, granularity = FORMATS[format_name], named_granularity(granularity_name)

    def quantized(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        groups, scales = grouped_view(x.float(), scale, granularity)
        ratio = groups / scales
        mask = x.new_empty(0, dtype=torch.uint8)
        if with_mask:
            mask = _packed_gradient_mask(ratio, fmt, ste_clip_range)
        values = quantize_dequantize_(ratio, scales, fmt, fmt.qmin, fmt.qmax)
        return values.view(x.shape).to(x.dtype), mask

    values, mask = _by_rows(quantized, x, scale, granularity)
    return values, mask


def _widened(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes that are numbers, exactly, in a float dtype; a new tensor.

    CPUs (alone) convert float8 element by element, 20 times slower than this: E4M3's sign, exponent and
    mantissa are moved to their places in a wider float, and 2**120 makes up for the exponent bias
    (127 - 7). Subnormals come out right; the NaN code does not (`encode` marks NaN in the scale).
    """
    is_slow = codes.dtype == torch.float8_e4m3fn and codes.device.type == "cpu"
    if not is_slow or dtype not in (torch.float32, torch.bfloat16):
        return codes.to(dtype, copy=True)
    word, shift = (torch.int32, 20) if dtype == torch.float32 else (torch.int16, 4)
    sign_exponent_mantissa = (-0x80 << (shift + 4)) | (0x7F << shift)
    bits = codes.view(torch.int8).to(word)
    return (
        bits.bitwise_left_shift_(shift)
        .bitwise_and_(sign_exponent_mantissa)
        .view(dtype)
        .mul_(2.0**120)
    )


def decode(
    codes: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    granularity_name: str,
    dtype: torch.dtype,
) -> Tensor:
    """`operators.decode`."""
    if scale is None:
        return _widened(codes, dtype)
    granularity = named_granularity(granularity_name)
    groups, scales = grouped_view(_widened(codes, torch.float32), scale, granularity)
    if zero_point is not None:
        groups = groups - grouped_view(codes, zero_point, granularity)[1]
    return (groups * scales).view(codes.shape).to(dtype)


def scale_product(
    product: Tensor, col_scale: Tensor, row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`product * row_scale[:, None] * col_scale` in float32, rounded once to `dtype`; [N, O].

    Of int32, float32 or bfloat16 [N, O], float32 (1,) or (O,), and float32 (N,) or None for ones.
    """
    if row_scale is None:
        return (product * col_scale.float()).to(dtype)
    return (product * row_scale.float()[:, None]).mul_(col_scale).to(dtype)


def product_of_codes(
    x: Tensor, w: Tensor, dtype: torch.dtype, decode: Callable[..., Tensor]
) -> Tensor:
    """`x @ w.T` of codes [N, I] and [O, I] before the scales, by a backend's `decode` of float8."""
    if x.dtype == torch.int8:
        return int8_matmul(x, w)
    # Where bfloat16 is native its GEMM rounds the sum once more than `operators.scaled_matmul` promises.
    wide = compute_dtype(dtype, x.device)
    return decode(x, None, None, "tensor", wide) @ decode(w, None, None, "tensor", wide).t()


def scaled_matmul(
    x: Tensor, w: Tensor, scale: Tensor, row_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`operators.scaled_matmul`."""
    return scale_product(product_of_codes(x, w, dtype, decode), scale, row_scale, dtype)


def apply_mask_(x: Tensor, mask: Tensor | None, scale: Tensor | None) -> None:
    """Zeroes `x` where the bit is 0, multiplies it by `scale`, float32 (1,), elsewhere."""
    if scale is not None:
        x.mul_(scale)
    if mask is None:
        return
    # Bits times one or zero: NaN and infinity become zero, too, and CPUs vectorize it, but no product of
    # different dtypes.
    bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    bits.mul_(unpack_mask(mask, tuple(x.shape)).to(bits.dtype))


def accumulate_(total: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor | None) -> None:
    """`total += x * scale` where the bit is 1, in float32; `total` is float32 and shaped like `x`."""
    added = x.to(torch.float32, copy=True)
    apply_mask_(added, mask, scale)
    total.add_(added)


def _random_words(rows: int, columns: Tensor, seed: int) -> Tensor:
    """Uniform 32-bit numbers [rows, O] as int64: hashes of the row, the column's number and the seed.

    The finalizer is Wellons' `lowbias32`; rows are spread by the golden ratio. What it depends on is
    where an element is in the whole matrix, not how that is cut or in which order it is visited.
    """
    row = torch.arange(rows, device=columns.device)[:, None]
    word = (row * 0x9E3779B1 + columns.long()).bitwise_and_(_WORD).bitwise_xor_(seed)
    word ^= word >> 16
    word.mul_(0x7FEB352D).bitwise_and_(_WORD)
    word ^= word >> 15
    word.mul_(0x846CA68B).bitwise_and_(_WORD)  # wraps in int64, which leaves the low bits right
    word ^= word >> 16
    return word


def _rounded_up_or_down(ratio: Tensor, words: Tensor, fmt: QuantFormat) -> Tensor:
    """Codes of one of the two neighbours of |ratio| <= fmt.max_value; the expectation is `ratio`.

    16 random bits for a fixed step and 20 for E4M3's mantissa: what is on the grid stays as it is.
    """
    uniform = (words >> 16).float() * 2.0**-16
    if not fmt.is_float:
        codes = (ratio + uniform).floor_().clamp_(fmt.qmin, fmt.qmax)
        return codes.to(fmt.storage_dtype)
    size = ratio.abs().clamp_(max=fmt.qmax)
    # As `to_e4m3` in cpu/kernels.cpp: 20 of 23 mantissa bits go, the exponent's bias from 127 to 7.
    normal = ((size.view(torch.int32).long() + (words >> 12)) >> 20) - (120 << 3)
    subnormal = (size * 512 + uniform).floor_().long()
    codes = torch.where(size < 2.0**-6, subnormal, normal) | (ratio.signbit().long() << 7)
    return codes.to(torch.uint8).view(fmt.storage_dtype)


def _stochastic(
    values: Tensor, columns: Tensor, fmt: QuantFormat, seed: int, dim: int
) -> tuple[Tensor, Tensor]:
    amax = values.abs().amax(dim=dim, keepdim=True)
    scale = (amax / fmt.qmax).clamp_(min=torch.finfo(torch.float32).tiny)
    codes = _rounded_up_or_down(values / scale, _random_words(values.shape[0], columns, seed), fmt)
    return codes, scale.flatten()


def stochastic_rows(
    x: Tensor, factor: Tensor | None, columns: Tensor, format_name: str, seed: int
) -> tuple[Tensor, Tensor]:
    """Codes [N, O] of `x * factor` with a scale for every row, float32 (N,), rounded without bias.

    `x` is [N, O], `factor` float32 (O,) or None for ones, `columns` int32 (O,): numbers of the columns
    in the whole matrix; `seed` has 32 bits. A scale is the row's maximum by the largest code (INT8's
    or E4M3's); not finite where a row is not.
    """
    values = x.float() if factor is None else x.float() * factor
    return _stochastic(values, columns, FORMATS[format_name], seed, dim=1)


def stochastic_columns(
    x: Tensor, factor: Tensor | None, columns: Tensor, format_name: str, seed: int
) -> tuple[Tensor, Tensor]:
    """Likewise of `x * factor[:, None]` with a scale for every column; codes [O, N], transposed.

    `factor` is float32 (N,) or None; scales are (O,).
    """
    values = x.float() if factor is None else x.float() * factor[:, None]
    codes, scale = _stochastic(values, columns, FORMATS[format_name], seed, dim=0)
    return codes.t().contiguous(), scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x / rms(x) * weight` over the last dimension, and 1 / rms(x) of each row in float32."""
    rstd = (x.float().square().mean(dim=-1) + eps).rsqrt()
    return F.rms_norm(x, weight.shape, weight, eps), rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` for `x`, in its dtype, and for `weight`, in float32."""
    normed, scaled = x.float() * rstd[..., None], grad.float() * weight.float()
    shift = normed * (scaled * normed).mean(dim=-1, keepdim=True)
    dweight = (grad.float() * normed).reshape(-1, x.shape[-1]).sum(dim=0)
    return ((scaled - shift) * rstd[..., None]).to(x.dtype), dweight


def swiglu(x: Tensor) -> Tensor:
    """`silu(gate) * up` of [..., gate | up]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_encode(
    x: Tensor, scale: Tensor, format_name: str, ste_clip_range: float | None, with_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`operators.swiglu_encode`; the mask is empty where none is asked for."""
    return encode(swiglu(x), scale, None, format_name, "tensor", ste_clip_range, with_mask)


def swiglu_backward(grad: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Gradient of `swiglu` for `x`, from `grad` where its bit in the mask is 1 and 0 elsewhere."""
    if mask is not None:
        grad = grad.clone()
        apply_mask_(grad, mask, None)
    gate, up = x.chunk(2, dim=-1)
    dgate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat([dgate, grad * F.silu(gate)], dim=-1)
