"""Codes of 4 bits in bytes: pairs of rows as in TensorRT-LLM's INT4, or neighbours, and those back."""

import torch
from torch import Tensor

from mqat.errors import UserError


def pack_int4(codes: Tensor) -> Tensor:
    """Pairs of adjacent output rows, the even one in the low nibble: int8 [O, I] -> int8 [O/2, I].

    Raises:
        ValueError: Wrong dtype, an odd number of rows, or a code that four bits cannot hold.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[0] % 2:
        raise UserError(
            f"pack_int4 needs an int8 matrix with an even number of rows, got {codes.dtype} "
            f"{tuple(codes.shape)}."
        )
    if codes.numel() and (int(codes.amin()) < -8 or int(codes.amax()) > 7):
        raise UserError(
            f"pack_int4: codes span {int(codes.amin())}..{int(codes.amax())}, but four bits hold "
            "-8..7; quantize with the INT4 format."
        )
    nibbles = codes.view(torch.uint8) & 0xF
    return (nibbles[0::2] | (nibbles[1::2] << 4)).view(torch.int8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Neighbours in a byte, the even one in the low nibble (FP4, NF4): uint8 [..., n] -> [..., n/2].

    Raises:
        ValueError: Wrong dtype, odd n, or a code that four bits cannot hold.
    """
    if codes.dtype != torch.uint8 or codes.dim() < 1 or codes.shape[-1] % 2:
        raise UserError(
            f"pack_nibbles needs uint8 codes with an even last dimension, got {codes.dtype} "
            f"{tuple(codes.shape)}."
        )
    if codes.numel() and int(codes.amax()) > 15:
        raise UserError(f"pack_nibbles: code {int(codes.amax())}, but four bits hold 0..15.")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 [..., n/2] -> uint8 [..., n].

    Raises:
        ValueError: Wrong dtype (shifts of signed bytes would extend the sign).
    """
    if packed.dtype != torch.uint8:
        raise UserError(
            f"unpack_nibbles needs uint8, got {packed.dtype}; use `.view(torch.uint8)`."
        )
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
