"""Codes of 4 or 2 bits in bytes, and back: row pairs as in TensorRT-LLM's INT4, or neighbours."""

import torch
from torch import Tensor

from mqat.errors import UserError


def pack_int4(codes: Tensor) -> Tensor:
    """Packs pairs of adjacent output rows: the even row in the low nibble, two's complement.

    Args:
        codes: int8 [O, I] with values in -8..7; O must be even.

    Returns:
        int8 [O/2, I].

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


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of `pack_int4`: int8 [O/2, I] -> int8 [O, I].

    Raises:
        ValueError: Wrong dtype (shifts of unsigned bytes would lose the sign).
    """
    if packed.dtype != torch.int8:
        raise UserError(f"unpack_int4 needs int8, got {packed.dtype}; use `.view(torch.int8)`.")
    low = (packed << 4) >> 4  # arithmetic shifts of int8 extend the sign
    high = packed >> 4
    return torch.stack([low, high], dim=1).flatten(0, 1)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Packs neighbours along the last dimension: the even one in the low nibble (FP4, NF4).

    Args:
        codes: uint8 [..., n] with values in 0..15; n must be even.

    Returns:
        uint8 [..., n/2].

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


def pack_2bit(codes: Tensor) -> Tensor:
    """Packs four neighbours along the last dimension: the first in the lowest two bits.

    Args:
        codes: uint8 [..., n] with values in 0..3 (indices of INT2_ELASTIC's levels; ternary codes
            plus one); n must be a multiple of four.

    Returns:
        uint8 [..., n/4].

    Raises:
        ValueError: Wrong dtype or n, or a code that two bits cannot hold.
    """
    if codes.dtype != torch.uint8 or codes.dim() < 1 or codes.shape[-1] % 4:
        raise UserError(
            f"pack_2bit needs uint8 codes with a last dimension divisible by four, got "
            f"{codes.dtype} {tuple(codes.shape)}."
        )
    if codes.numel() and int(codes.amax()) > 3:
        raise UserError(f"pack_2bit: code {int(codes.amax())}, but two bits hold 0..3.")
    pairs = codes[..., 0::2] | (codes[..., 1::2] << 2)
    return pairs[..., 0::2] | (pairs[..., 1::2] << 4)


def unpack_2bit(packed: Tensor) -> Tensor:
    """Inverse of `pack_2bit`: uint8 [..., n/4] -> uint8 [..., n].

    Raises:
        ValueError: Wrong dtype.
    """
    if packed.dtype != torch.uint8:
        raise UserError(f"unpack_2bit needs uint8, got {packed.dtype}; use `.view(torch.uint8)`.")
    return torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)
