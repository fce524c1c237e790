"""What a quantized GEMM keeps of an operand: one byte of code and one bit of mask per element."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mqat.kernels.cpu import passes as native
from mqat.quant.formats import FP8_E4M3, QuantFormat
from mqat.quant.functional import dequantize, fake_quantize
from mqat.quant.granularity import Granularity, PerChannel, PerGroup, PerTensor, grouped_view

# Times eight bytes of 0 or 1: their bits, in the highest byte (no two partial products meet in a bit).
# A byte times the other: the same byte eight times, of which `_BITS` keeps a bit each.
_GATHER, _SPREAD = 0x0102040810204080, 0x0101010101010101
_BITS = 0x8040201008040201 - 2**64


def pack_mask(mask: Tensor) -> Tensor:
    """Eight bools in a byte; uint8, flat, padded with zeros. Bit i of byte j is element 8 j + i."""
    flat = F.pad(mask.reshape(-1).view(torch.uint8), (0, -mask.numel() % 8))
    return (flat.view(torch.int64) * _GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_mask`, as uint8 zeros and ones."""
    words = packed.to(torch.int64).mul_(_SPREAD).bitwise_and_(_BITS)
    return words.view(torch.uint8)[: math.prod(shape)].view(shape).clamp_max_(1)


def apply_mask_(x: Tensor, packed: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """Zeroes the elements of `x` whose bit is 0 and multiplies the others by `scale`, in place."""
    if x.numel() % 8 == 0 and native.serves_floats(x):
        native.apply_mask_(x, packed, scale)
        return x
    if scale is not None:
        x.mul_(scale)
    if packed is None:
        return x
    if not x.is_contiguous():
        return x.mul_(unpack_mask(packed, tuple(x.shape)))
    # Bits times one or zero give the same as the number times it, and are vectorized on CPUs, where a
    # product of different dtypes is not.
    bits = x.view(torch.int16) if x.element_size() == 2 else x
    bits.mul_(unpack_mask(packed, tuple(x.shape)).to(bits.dtype))
    return x


@dataclass(frozen=True)
class Encoded:
    """A quantized operand.

    Attributes:
        codes: In the format's storage dtype, shaped like the operand.
        scale: float32 step; NaN if the operand held NaN, which integer codes cannot say.
        mask: Packed bits, 1 where the operand was not clipped; None if not asked for.
    """

    codes: Tensor
    scale: Tensor
    mask: Tensor | None


def _passing(fmt: QuantFormat, ste_clip_range: float | None) -> tuple[float, float]:
    """Range of x / scale that passes gradients (as in `functional.fake_quantize`).

    Integers: values up to half a step beyond the last code count as not clipped.
    """
    slack = 0.0 if fmt.is_float else 0.5
    return (
        (fmt.qmin - slack, fmt.qmax + slack)
        if ste_clip_range is None
        else (-ste_clip_range, ste_clip_range)
    )


def inside_range(ratio: Tensor, fmt: QuantFormat, ste_clip_range: float | None = None) -> Tensor:
    """Bool: the straight-through estimator passes gradients here."""
    # Compared as floats: comparisons that write bools are not vectorized on CPUs.
    return ratio.clamp(*_passing(fmt, ste_clip_range)).eq_(ratio).bool()


def elements_per_scale(shape: tuple[int, ...], granularity: Granularity) -> int | None:
    """Consecutive elements that share a scale; None if that number differs within the tensor."""
    if isinstance(granularity, PerTensor):
        return math.prod(shape)
    if isinstance(granularity, PerGroup):
        return granularity.size if shape[-1] % granularity.size == 0 else None
    return shape[-1] if granularity.scale_shape(shape) == shape[:-1] else None


def _kernel_run(x: Tensor, fmt: QuantFormat, granularity: Granularity) -> int | None:
    """`elements_per_scale` if the native kernels serve this operand, else None."""
    is_known = fmt == FP8_E4M3 or (not fmt.levels and fmt.storage_dtype == torch.int8)
    run = elements_per_scale(tuple(x.shape), granularity)
    if run is None or run == 0 or run % 8 or not is_known or x.dtype not in native.DTYPES:
        return None
    return run if native.serves(x) else None


def _kernel_grid(fmt: QuantFormat, ste_clip_range: float | None) -> native.Grid:
    return native.Grid(fmt.qmin, fmt.qmax, *_passing(fmt, ste_clip_range), fmt.is_float)


# Elements of a weight at a time: the float32 temporaries of torch then stay in a CPU cache,
# and are not fetched from and returned to the system at every call.
_PIECE = 1 << 17


def _pieces(
    x: Tensor, scale: Tensor, granularity: Granularity
) -> list[tuple[Tensor, Tensor]] | None:
    """Row blocks of a large weight on a CPU with their scales; None: take it whole."""
    if x.device.type != "cpu" or x.dim() != 2 or x.numel() <= 2 * _PIECE:
        return None
    if not isinstance(granularity, PerTensor | PerChannel | PerGroup):
        return None
    rows = max(8, _PIECE // x.shape[1] // 8 * 8)  # whole bytes of mask
    if rows >= len(x):
        return None
    blocks = x.split(rows)
    is_one = isinstance(granularity, PerTensor)
    scales = [scale] * len(blocks) if is_one else scale.split(rows)
    return list(zip(blocks, scales, strict=True))


def dequantized_with_mask(
    x: Tensor,
    scale: Tensor,
    fmt: QuantFormat,
    granularity: Granularity,
    *,
    ste_clip_range: float | None,
) -> tuple[Tensor, Tensor]:
    """What `fake_quantize` gives, and its packed mask."""
    x = x.detach()
    run = None if fmt.is_float else _kernel_run(x, fmt, granularity)
    if run is not None:
        grid = _kernel_grid(fmt, ste_clip_range)
        values, mask = native.fake_quantize(x, scale, run, grid, with_mask=True)
        assert mask is not None, "asked for"
        return values, mask
    if pieces := _pieces(x, scale, granularity):
        done = [
            dequantized_with_mask(b, s, fmt, granularity, ste_clip_range=ste_clip_range)
            for b, s in pieces
        ]
        return torch.cat([values for values, _ in done]), torch.cat([mask for _, mask in done])
    groups, steps = grouped_view(x.float(), scale, granularity)
    mask = pack_mask(inside_range(groups / steps, fmt, ste_clip_range))
    return fake_quantize(x, scale, fmt, granularity), mask


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
    x = x.detach()
    run = _kernel_run(x, fmt, granularity)
    if run is not None:
        codes, mask, is_nan = native.encode(
            x, scale, run, _kernel_grid(fmt, ste_clip_range), zero=zero_point, with_mask=with_mask
        )
        return Encoded(codes.view(fmt.storage_dtype), torch.where(is_nan, torch.nan, scale), mask)
    if zero_point is None and (pieces := _pieces(x, scale, granularity)):
        options: dict[str, Any] = {"with_mask": with_mask, "ste_clip_range": ste_clip_range}
        done = [encode(block, steps, fmt, granularity, **options) for block, steps in pieces]
        is_nan = torch.stack([part.scale.isnan().any() for part in done]).any()
        masks = [part.mask for part in done if part.mask is not None]
        codes = torch.cat([part.codes.view(torch.uint8) for part in done])
        return Encoded(
            codes.view(fmt.storage_dtype),
            torch.where(is_nan, torch.nan, scale),
            torch.cat(masks) if with_mask else None,
        )
    groups, steps = grouped_view(x.float(), scale, granularity)
    ratio = groups / steps
    mask = pack_mask(inside_range(ratio, fmt, ste_clip_range)) if with_mask else None
    # amax is NaN if anything is; infinities clip to the last code.
    is_nan = ratio.amax().isnan() if ratio.numel() else scale.new_zeros((), dtype=torch.bool)
    marked = torch.where(is_nan, torch.nan, scale)
    if not fmt.is_float:
        ratio.round_()
    if zero_point is not None:
        ratio += grouped_view(x, zero_point, granularity)[1]
    codes = ratio.clamp_(fmt.qmin, fmt.qmax).to(fmt.storage_dtype).view(x.shape)
    return Encoded(codes, marked, mask)


def encode_input(x: Tensor, scale: Tensor, fmt: QuantFormat, *, with_mask: bool) -> Encoded:
    """`encode` with one scale, (1,), for the whole tensor."""
    return encode(x, scale, fmt, PerTensor(), with_mask=with_mask)


def decode_scaled(
    codes: Tensor,
    scale: Tensor,
    granularity: Granularity,
    dtype: torch.dtype,
    zero_point: Tensor | None = None,
) -> Tensor:
    """`functional.dequantize` of codes that are numbers."""
    run = elements_per_scale(tuple(codes.shape), granularity)
    is_known = codes.dtype in (torch.int8, torch.float8_e4m3fn) and dtype in native.DTYPES
    if is_known and run and native.serves(codes):
        return native.decode(codes, scale, run, dtype, zero=zero_point)
    return dequantize(codes, scale, granularity, dtype, zero_point=zero_point)
