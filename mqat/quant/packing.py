"""Codes of 4 bits in bytes: pairs of rows as in TensorRT-LLM's INT4, or neighbours, and those back."""

import torch
from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """Pairs of adjacent output rows, the even one in the low nibble: int8 [O, I] -> int8 [O/2, I]."""
    is_matrix = codes.dtype == torch.int8 and codes.dim() == 2
    assert is_matrix and codes.shape[0] % 2 == 0, f"{codes.dtype} {tuple(codes.shape)}"
    assert not codes.numel() or -8 <= codes.amin() <= codes.amax() <= 7, "four bits hold -8..7"
    nibbles = codes.view(torch.uint8) & 0xF
    return (nibbles[0::2] | (nibbles[1::2] << 4)).view(torch.int8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Neighbours in a byte, the even one in the low nibble (FP4, NF4): uint8 [..., n] -> [..., n/2]."""
    assert codes.dtype == torch.uint8 and codes.shape[-1] % 2 == 0, f"{codes.dtype} {codes.shape}"
    assert not codes.numel() or codes.amax() <= 15, "four bits hold 0..15"
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 [..., n/2] -> uint8 [..., n]."""
    assert packed.dtype == torch.uint8, "shifts of signed bytes would extend the sign"
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
