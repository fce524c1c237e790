"""Rounding of weights and inputs as servers' kernels do it: in lines of its own, on purpose.

Nothing here comes from `mqat.quant`, so that a mistake there cannot hide.

| input             | step of x                                                                   |
|-------------------|-----------------------------------------------------------------------------|
| `static int8`     | one frozen number, codes -128..127                                          |
| `static fp8`      | one frozen number, E4M3                                                     |
| `token int8`      | amax of each token / 127, codes -128..127                                   |
| `token uint8`     | (max - min) of each token / 255, with a zero point                          |
| `token fp8`       | amax of each token / 448                                                    |
| `block fp4`       | E4M3 of amax of each 16 channels / (6 global), times the global one          |
"""

import math

import torch
from torch import Tensor

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# Smallest and largest code of a weight, by the name of its integer format.
_RANGES = {
    "int8": (-127, 127), "int8_loader": (-128, 127), "int4": (-8, 7), "int4_even": (-8, 7),
    "uint4": (0, 15),
}  # fmt: skip
_TINY = 2.0**-126  # smallest step, so that zeros stay zeros


def fp4_codes(ratio: Tensor) -> Tensor:
    """Nearest E2M1 codes 0..15 of `ratio`, ties to the even mantissa; bit 3 is the sign."""
    magnitude = ratio.abs().clamp(max=6.0)
    middles = (_E2M1[1:] + _E2M1[:-1]) / 2
    index = torch.bucketize(magnitude, middles)  # the lower one in ties
    is_tie = (magnitude[..., None] == middles).any(dim=-1)
    index = index + (is_tie & (index % 2 == 1)).long()
    return (index + 8 * torch.signbit(ratio)).to(torch.uint8)


def fp4_values(codes: Tensor) -> Tensor:
    """E2M1 numbers of codes, float32."""
    return torch.cat([_E2M1, -_E2M1])[codes.long()]


def expand(scale: Tensor, granularity: str, width: int) -> Tensor:
    """Scales (1,), [O] or [O, G] in a shape that broadcasts over [O, width]."""
    if granularity.startswith("group:"):
        size = int(granularity.removeprefix("group:"))
        return scale.repeat_interleave(size, dim=1)[:, :width]
    return scale[:, None] if granularity == "channel" else scale


def quantize_weight(
    weight: Tensor, scale: Tensor, granularity: str, fmt: str, zero_point: Tensor | None = None
) -> Tensor:
    """Codes of weight / scale, rounded to nearest, ties to even.

    Of float32 [O, I] and what was frozen, with the names of checkpoints. Codes are int8, of unsigned
    formats moved to -8..7; float8 for FP8; for FP4 uint8, one code in a byte.
    """
    width = weight.shape[1]
    ratio = weight / expand(scale, granularity, width)
    if fmt == "fp8_e4m3":
        return ratio.clamp(-448, 448).to(torch.float8_e4m3fn)
    if fmt == "fp4_e2m1":
        return fp4_codes(ratio)
    low, high = _RANGES[fmt]
    codes = ratio.round()
    if zero_point is not None:
        codes += expand(zero_point, granularity, width)
    middle = (high + 1) // 2 if low == 0 else 0
    return (codes.clamp(low, high) - middle).to(torch.int8)


def _blocks_of_16(x: Tensor, above: Tensor) -> Tensor:
    blocks = x.unflatten(-1, (-1, 16))
    ratio = blocks.abs().amax(dim=-1, keepdim=True) / (6 * above)
    step = ratio.clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float() * above
    return (fp4_values(fp4_codes(blocks / step)) * step).flatten(-2)


def w4a8_range_scale(scale: Tensor) -> Tensor:
    """The power of two that brings INT4 codes up to 8 of a whole trained weight below 448, (1,)."""
    return torch.tensor([2.0 ** math.ceil(math.log2(float(8 * scale.max() / 448)))])


def quantize_input(x: Tensor, kind: str | None, step: Tensor | None = None) -> Tensor:
    """float32 [..., I] on the grid of a kind of the table above; None: unquantized.

    `step` is the frozen number, of `block fp4` the global scale; x of a row-parallel linear is a rank's.
    """
    if kind is None:
        return x
    if kind == "token uint8":
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        width = ((high - low) / 255).clamp_min(_TINY)
        zero = (-128 + (-low / width).round()).clamp(-128, 127)
        return ((x / width + zero).round().clamp(-128, 127) - zero) * width
    if kind.startswith("token"):
        top = 127 if kind == "token int8" else 448
        step = (x.abs().amax(-1, keepdim=True) / top).clamp_min(_TINY)
    assert step is not None, f"{kind} has a frozen number"
    if kind == "block fp4":
        return _blocks_of_16(x, step)
    ratio = x / step
    if kind.endswith("fp8"):
        return ratio.clamp(-448, 448).to(torch.float8_e4m3fn).float() * step
    return ratio.round().clamp(-128, 127) * step
