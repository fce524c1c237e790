"""Really quantized NF4 weights for frozen backbones: packed bytes, dequantized on use.

Blocks of 64 consecutive elements share an absolute maximum. Double quantization keeps these maxima
in 8 bits as well: less their mean, in INT8 with one float32 step per 256 of them. That is
4 + 8/64 + 32/(64 * 256) = 4.127 bits per weight, or 4.5 without.

After QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3), which uses an 8-bit float in the
second quantization; integers of one step per block are at most half of 1/127 of its range off.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mqat.errors import UserError
from mqat.kernels.stored import FloatProduct, Stored
from mqat.quant.formats import INT8, NF4
from mqat.quant.functional import dequantize, quantize
from mqat.quant.granularity import PerGroup
from mqat.quant.packing import pack_nibbles, unpack_nibbles
from mqat.quant.scales import compute_amax, compute_scale

BLOCK = 64
SCALE_BLOCK = 256


@dataclass(frozen=True)
class DoubleScales(Stored):
    """Block maxima in 8 bits.

    Attributes:
        codes: int8 (blocks,).
        steps: float32 (ceil(blocks / 256),).
        mean: float32 (), added back after dequantizing.
    """

    codes: Tensor
    steps: Tensor
    mean: Tensor

    def values(self) -> Tensor:
        """The maxima that codes stand for, float32 (blocks,); never below zero."""
        granularity = PerGroup(SCALE_BLOCK)
        offset = dequantize(self.codes[None], self.steps[None], granularity, torch.float32)
        return (offset[0] + self.mean).clamp_min(0.0)


@dataclass(frozen=True)
class Nf4Weight(FloatProduct):
    """A weight in NF4.

    Attributes:
        packed: uint8 (ceil(blocks * 64 / 2),): two codes per byte, the first in the low nibble.
        scales: Maximum of every block of 64 elements in row-major order, float32 or doubly quantized.
        shape: Of the weight; the last block is padded with zeros if 64 does not divide its size.
    """

    packed: Tensor
    scales: Tensor | DoubleScales
    shape: tuple[int, ...]

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight that is computed with: level * maximum in float32, rounded once to `dtype`."""
        scale = self.scales if isinstance(self.scales, Tensor) else self.scales.values()
        codes = unpack_nibbles(self.packed).view(-1, BLOCK)
        values = dequantize(codes, scale[:, None], PerGroup(BLOCK), dtype, fmt=NF4)
        return values.view(-1)[: torch.Size(self.shape).numel()].view(self.shape)


def nf4_quantize(weight: Tensor, *, double: bool = True) -> Nf4Weight:
    """Packs a weight of any shape; codes are chosen for the maxima that will be used to dequantize.

    `double`: these are quantized, too.

    Raises:
        UserError: The weight holds NaN or infinity, or nothing.
    """
    if weight.numel() == 0 or not bool(weight.isfinite().all()):
        raise UserError(f"nf4_quantize: weight {tuple(weight.shape)} is empty or not finite.")
    flat = weight.detach().float().reshape(-1)
    blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    amax = compute_amax(blocks, PerGroup(BLOCK))[:, 0]
    scales = _double_quantize(amax) if double else amax
    used = scales if isinstance(scales, Tensor) else scales.values()
    # A block whose maximum became zero holds zeros, whatever its codes.
    divisor = torch.where(used > 0, used, 1.0)
    codes = quantize(blocks, divisor[:, None], NF4, PerGroup(BLOCK))
    return Nf4Weight(pack_nibbles(codes.view(-1)), scales, tuple(weight.shape))


def _double_quantize(amax: Tensor) -> DoubleScales:
    mean = amax.mean()
    granularity = PerGroup(SCALE_BLOCK)
    offset = (amax - mean)[None]
    steps = compute_scale(compute_amax(offset, granularity), INT8)
    return DoubleScales(quantize(offset, steps, INT8, granularity)[0], steps[0], mean)
