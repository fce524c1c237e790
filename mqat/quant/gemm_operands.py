"""What a quantized GEMM keeps of an operand: one byte of code and one bit of mask per element."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mqat.quant.formats import QuantFormat
from mqat.quant.granularity import Granularity, PerTensor, grouped_view


def pack_mask(mask: Tensor) -> Tensor:
    """Eight bools in a byte; uint8, flat, padded with zeros.

    Bit `i` of byte `j` is element `i * n + j` of the flattened mask, `n` being the number of bytes: each
    bit position is then a contiguous eighth of the tensor, and shifts and products are vectorized.
    """
    flat = F.pad(mask.reshape(-1).view(torch.uint8), (0, -mask.numel() % 8))
    packed = torch.zeros(flat.numel() // 8, dtype=torch.uint8, device=mask.device)
    for position, plane in enumerate(flat.view(8, -1)):
        packed.bitwise_or_(plane.bitwise_left_shift(position))
    return packed


def _plane(packed: Tensor, position: int) -> Tensor:
    """One eighth of the mask, as zeros and ones."""
    return packed.bitwise_right_shift(position).bitwise_and_(1)


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_mask`, as uint8 zeros and ones."""
    flat = torch.cat([_plane(packed, position) for position in range(8)])
    return flat[: torch.Size(shape).numel()].view(shape)


def apply_mask_(x: Tensor, packed: Tensor) -> Tensor:
    """Zeroes the elements of `x` whose bit is 0, in place."""
    if x.numel() % 8 or not x.is_contiguous():
        return x.mul_(unpack_mask(packed, tuple(x.shape)))
    # Bits times one or zero give the same as the number times it, and are vectorized on CPUs, where a
    # product of different dtypes is not.
    is_half = x.element_size() == 2
    for position, eighth in enumerate((x.view(torch.int16) if is_half else x).view(8, -1)):
        eighth.mul_(_plane(packed, position).to(eighth.dtype))
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


def inside_range(ratio: Tensor, fmt: QuantFormat) -> Tensor:
    """Bool: the straight-through estimator passes gradients here (as in `functional.fake_quantize`).

    Integers: values up to half a step beyond the last code count as not clipped.
    """
    slack = 0.0 if fmt.is_float else 0.5
    # Compared as floats: comparisons that write bools are not vectorized on CPUs.
    return ratio.clamp(fmt.qmin - slack, fmt.qmax + slack).eq_(ratio).bool()


def mask_of(x: Tensor, scale: Tensor, fmt: QuantFormat, granularity: Granularity) -> Tensor:
    """Packed bits, 1 where `x` is not clipped."""
    groups, steps = grouped_view(x.detach().float(), scale, granularity)
    return pack_mask(inside_range(groups / steps, fmt))


def encode(
    x: Tensor, scale: Tensor, fmt: QuantFormat, granularity: Granularity, *, with_mask: bool
) -> Encoded:
    """Codes as `functional.quantize` computes them, and the mask, from one division.

    Nothing waits for the device.
    """
    groups, steps = grouped_view(x.detach().float(), scale, granularity)
    ratio = groups / steps
    mask = pack_mask(inside_range(ratio, fmt)) if with_mask else None
    # amax is NaN if anything is; infinities clip to the last code.
    is_nan = ratio.amax().isnan() if ratio.numel() else scale.new_zeros((), dtype=torch.bool)
    marked = torch.where(is_nan, torch.nan, scale)
    if not fmt.is_float:
        ratio.round_()
    codes = ratio.clamp_(fmt.qmin, fmt.qmax).to(fmt.storage_dtype).view(x.shape)
    return Encoded(codes, marked, mask)


def encode_input(x: Tensor, scale: Tensor, fmt: QuantFormat, *, with_mask: bool) -> Encoded:
    """`encode` with one scale, (1,), for the whole tensor."""
    return encode(x, scale, fmt, PerTensor(), with_mask=with_mask)
