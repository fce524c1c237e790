"""Gradients rounded stochastically to 8 bits, by row or by column: `reference.stochastic_*`.

One kernel finds the largest magnitude of every row or column, another rounds. Tiles are [side, side]
of x [rows, cols]; passes.py launches both without fused multiply-adds.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(x, factor, rows, cols, by_row: tl.constexpr, side: tl.constexpr):
    """Rows, columns, which elements exist, and `x * factor` in float32, 0 beyond the end."""
    row = tl.program_id(0) * side + tl.arange(0, side)
    col = tl.program_id(1) * side + tl.arange(0, side)
    is_element = (row < rows)[:, None] & (col < cols)[None, :]
    at = row.to(tl.int64)[:, None] * cols + col[None, :]
    value = tl.load(x + at, mask=is_element, other=0.0).to(tl.float32)
    if factor is not None:
        if by_row:
            value = value * tl.load(factor + col, mask=col < cols, other=0.0)[None, :]
        else:
            value = value * tl.load(factor + row, mask=row < rows, other=0.0)[:, None]
    return row, col, is_element, value


@triton.jit
def find_largest(x, factor, largest, rows, cols, by_row: tl.constexpr, side: tl.constexpr):
    """`largest`, int32 zeros, becomes the bits of maxima: without a sign ordered as floats, NaN last."""
    row, col, is_element, value = _tile(x, factor, rows, cols, by_row, side)
    bits = tl.where(is_element, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    if by_row:
        tl.atomic_max(largest + row, tl.max(bits, axis=1), mask=row < rows)
    else:
        tl.atomic_max(largest + col, tl.max(bits, axis=0), mask=col < cols)


@triton.jit
def _random_words(row, column, seed):
    """`reference._random_words`, uint32."""
    word = (row.to(tl.uint32)[:, None] * 0x9E3779B1 + column.to(tl.uint32)[None, :]) ^ seed
    word ^= word >> 16
    word *= 0x7FEB352D
    word ^= word >> 15
    word *= 0x846CA68B
    return word ^ (word >> 16)


@triton.jit(do_not_specialize=["seed"])
def round_up_or_down(
    x,
    factor,
    columns,
    largest,
    codes,
    scale,
    rows,
    cols,
    seed,
    high,
    is_float: tl.constexpr,
    by_row: tl.constexpr,
    side: tl.constexpr,
):
    """Codes as bytes, [rows, cols] or transposed [cols, rows], and scales, from the maxima."""
    row, col, is_element, value = _tile(x, factor, rows, cols, by_row, side)
    if by_row:
        line, is_line, across = row, row < rows, tl.program_id(1)
    else:
        line, is_line, across = col, col < cols, tl.program_id(0)
    amax = tl.load(largest + line, mask=is_line, other=0).to(tl.float32, bitcast=True)
    ratio = tl.div_rn(amax, tl.zeros_like(amax) + high)
    step = tl.where(ratio < 1.1754943508222875e-38, 1.1754943508222875e-38, ratio)  # NaN stays
    if across == 0:
        tl.store(scale + line, step, mask=is_line)
    if by_row:
        value = tl.div_rn(value, step[:, None])
    else:
        value = tl.div_rn(value, step[None, :])
    column = tl.load(columns + col, mask=col < cols, other=0)
    word = _random_words(row, column, seed.to(tl.uint32))
    uniform = (word >> 16).to(tl.float32) * 0.0000152587890625  # 2**-16
    if is_float:
        magnitude = tl.abs(value)
        size = tl.where(magnitude > high, high, magnitude)
        # 20 of 23 mantissa bits go, the exponent's bias from 127 to 7; subnormals are steps of 2**-9.
        normal = ((size.to(tl.uint32, bitcast=True) + (word >> 12)) >> 20) - 960
        subnormal = (size * 512 + uniform).to(tl.int32).to(tl.uint32)
        sign = (value.to(tl.uint32, bitcast=True) >> 24) & 0x80
        code = (tl.where(size < 0.015625, subnormal, normal) | sign).to(tl.uint8)
    else:
        nearby = tl.floor(value + uniform)
        limited = tl.where(nearby < -high, -high, tl.where(nearby > high, high, nearby))
        code = limited.to(tl.int32).to(tl.uint8)
    if by_row:
        at = row.to(tl.int64)[:, None] * cols + col[None, :]
    else:
        at = col.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(codes + at, code, mask=is_element)
