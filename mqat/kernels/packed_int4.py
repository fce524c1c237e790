"""Groups of 4-bit integers at inference: one packed copy, for torch's kernel and for larger GEMMs.

`_weight_int4pack_mm_for_cpu` multiplies bfloat16 inputs with `(code - 8) * scale + zero`, scale and
zero in bfloat16 for each group. It is bound by the bytes of the weight, so it serves few tokens; for
many, the weight is decoded from the same bytes. A scale that bfloat16 does not hold is split into two
that it holds, and the kernel runs twice.

Packed layout, for whole blocks of 2 h rows (h = 32 with AVX-512, 16 with AVX2): uint8 [O / 2h, I, h],
row j of a block in the low and row j + h in the high nibble of byte j. It is probed, not assumed: where
a packed weight does not read back, the weight is not stored this way.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mqat.kernels.gemm import float_matmul
from mqat.kernels.stored import FloatProduct
from mqat.quant.formats import INT4, INT4_AMAX7_5, UINT4, QuantFormat

# Up to this many tokens the kernel is faster than decoding and a bfloat16 GEMM (measured).
KERNEL_ROWS = 64
GROUP_SIZES = (32, 64, 128, 256)
_CHUNK = 256  # rows decoded at a time: intermediate values stay in the cache
_MIDDLE = 8  # the code that the kernel takes for zero
_ROWS = 64  # rows are padded to whole blocks of any layout


@dataclass(frozen=True)
class PackedInt4(FloatProduct):
    """A weight [O, I] in half a byte each.

    Attributes:
        packed: uint8, as torch packs the codes of [O', I'], padded to whole blocks and groups.
        scale: [G, O'], float32 or, where that holds it, bfloat16.
        zero: [G, O'] in bfloat16, the code that means zero; None: it is 8 everywhere.
        pairs: Scale and offset of every group for the kernel, bfloat16 [G, O', 2]; two of them where
            bfloat16 does not hold the scale.
        group_size: Elements that share a scale.
        half: Rows between the nibbles of a byte.
        shape: (O, I).
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    pairs: tuple[Tensor, ...]
    group_size: int
    half: int
    shape: tuple[int, int]

    def decode(self, dtype: torch.dtype) -> Tensor:
        """As `FloatProduct.decode`; a view of the transpose."""
        return self._decode_padded(dtype).t()[: self.shape[0], : self.shape[1]]

    def _decode_padded(self, dtype: torch.dtype) -> Tensor:
        """The same, [I', O']."""
        num_groups, rows = self.scale.shape
        half, size = self.half, self.group_size
        blocks = self.packed.view(torch.uint8).view(-1, num_groups * size, half)
        weight = self.scale.new_empty(num_groups, size, rows // (2 * half), 2, half, dtype=dtype)
        # A product of bfloat16 numbers would be rounded to that on its way to another dtype.
        steps = self.scale if dtype == torch.bfloat16 else self.scale.float()
        scale = steps.view(num_groups, 1, -1, 2, half)
        zero = None if self.zero is None else self.zero.view(num_groups, 1, -1, 2, half)
        count = _CHUNK // (2 * half)
        for first in range(0, len(blocks), count):
            own = slice(first, first + count)
            pair = blocks[own].to(torch.int16)
            for part, codes in enumerate((pair & 0xF, pair >> 4)):
                # 0x4300 is 128 in bfloat16, whose last mantissa bit is then worth one.
                values = codes.bitwise_or_(0x4300).view(torch.bfloat16)
                by_group = values.view(-1, num_groups, size, half).permute(1, 2, 0, 3)
                if zero is None:
                    by_group.sub_(128 + _MIDDLE)
                else:
                    by_group.sub_(zero[:, :, own, part] + 128)
                torch.mul(by_group, scale[:, :, own, part], out=weight[:, :, own, part])
        return weight.view(num_groups * size, rows)

    def multiply(self, x_NI: Tensor) -> Tensor:  # noqa: N803
        """`x @ w.T` in the dtype of x."""
        padding = self.scale.shape[0] * self.group_size - self.shape[1]
        x = F.pad(x_NI, (0, padding)) if padding else x_NI.contiguous()
        if x.dtype == torch.bfloat16 and len(x) <= KERNEL_ROWS:
            kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
            product: Tensor = kernel(x, self.packed, self.group_size, self.pairs[0])
            for correction in self.pairs[1:]:
                product += kernel(x, self.packed, self.group_size, correction)
        else:
            product = float_matmul(x, self._decode_padded(x.dtype), x.dtype)
        # Contiguous: sums over ranks are written to what is returned.
        return product[:, : self.shape[0]].contiguous()


def _half(packed: Tensor, codes: Tensor) -> int | None:
    """Rows between the nibbles of a byte, if the packed codes read back."""
    rows, width = codes.shape
    for half in (32, 16):
        blocks = packed.view(torch.uint8).view(-1, width, half)
        both = torch.cat([blocks & 0xF, blocks >> 4], dim=-1)
        if torch.equal(both.transpose(1, 2).reshape(rows, width), codes):
            return half
    return None


def pack_for_kernel(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: QuantFormat, group_size: int
) -> PackedInt4 | None:
    """Stores codes [O, I] with scales and zero points [O, G] for the kernel.

    None for formats, group sizes and devices that it does not serve.
    """
    is_served = (
        codes.device.type == "cpu"
        and fmt in (INT4, INT4_AMAX7_5, UINT4)
        and group_size in GROUP_SIZES
    )
    if not is_served:
        return None
    (rows, width), num_groups = codes.shape, scale.shape[1]
    below = -rows % _ROWS
    unsigned = (codes.to(torch.int16) - int(fmt.qmin)).to(torch.uint8)
    padded = F.pad(unsigned, (0, num_groups * group_size - width, 0, below), value=_MIDDLE)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(padded.int(), 1)
    half = _half(packed, padded)
    if half is None:
        return None
    steps = F.pad(scale.t(), (0, below)).contiguous()
    coarse = steps.bfloat16()
    fine = (steps - coarse.float()).bfloat16()
    zero = None
    offset = torch.zeros_like(steps)
    if zero_point is not None:
        zero = F.pad(zero_point.t().float() - fmt.qmin, (0, below), value=_MIDDLE)
        offset = (_MIDDLE - zero) * steps
    pairs = [torch.stack([coarse, offset.bfloat16()], dim=-1)]
    rest = (offset - offset.bfloat16().float()).bfloat16()
    if bool(fine.any() | rest.any()):
        pairs.append(torch.stack([fine, rest], dim=-1))
    return PackedInt4(
        packed,
        steps if bool(fine.any()) else coarse,
        None if zero is None else zero.bfloat16().contiguous(),
        tuple(pairs),
        group_size,
        half,
        (rows, width),
    )
