"""Integer codes packed into 32-bit words, in the order of compressed-tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Packs neighbouring columns: column `j` of a word in its bits `bits * j` and up, offset binary.

    Args:
        codes: int8 [O, I] with values that `bits` hold in two's complement.
        bits: 4 or 8.

    Returns:
        int32 [O, ceil(I * bits / 32)]; the rest of the last word is zero.

    Raises:
        ValueError: Another dtype, width, or a code that does not fit.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2 or bits not in (4, 8):
        raise ValueError(
            f"pack_words needs an int8 matrix and 4 or 8 bits, got {codes.dtype} "
            f"{tuple(codes.shape)} and {bits} bits."
        )
    half = 1 << (bits - 1)
    if codes.numel() and (int(codes.amin()) < -half or int(codes.amax()) >= half):
        raise ValueError(
            f"pack_words: codes span {int(codes.amin())}..{int(codes.amax())}, but {bits} bits hold "
            f"{-half}..{half - 1}."
        )
    unsigned = codes.view(torch.uint8) + half  # modulo 256
    unsigned = F.pad(unsigned, (0, -codes.shape[1] % (32 // bits)))
    if bits == 4:
        unsigned = (unsigned[:, 0::2] & 0xF) | (unsigned[:, 1::2] << 4)
    return unsigned.contiguous().view(torch.int32)
