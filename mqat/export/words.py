"""Integer codes packed into 32-bit words, in the order of compressed-tensors."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Packs neighbouring columns: column `j` of a word in its bits `bits * j` and up, offset binary.

    int8 [O, I] of values that 4 or 8 bits hold in two's complement -> int32 [O, ceil(I * bits / 32)];
    the rest of the last word is zero.
    """
    is_matrix = codes.dtype == torch.int8 and codes.dim() == 2
    assert is_matrix and bits in (4, 8), f"{codes.dtype} {tuple(codes.shape)}, {bits} bits"
    half = 1 << (bits - 1)
    low, high = (int(end) for end in codes.aminmax()) if codes.numel() else (0, 0)
    assert -half <= low and high < half, f"codes span {low}..{high}, not {bits} bits"
    padding = -codes.shape[1] % (32 // bits)
    if padding:
        codes = F.pad(codes, (0, padding), value=-half)  # zeros, once half is added
    rows, cols = codes.shape
    flat = codes.reshape(-1)
    if bits == 8:  # flipping the highest bit adds 128
        packed = flat.view(torch.uint8) ^ 0x80
    else:
        pairs = (flat + half).view(torch.int16)  # even columns in the low bytes: no slow strides
        packed = (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)
    return packed.view(torch.int32).view(rows, cols * bits // 32)
