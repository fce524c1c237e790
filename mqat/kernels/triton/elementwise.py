"""Element-wise passes around quantized GEMMs, each in one read and one write; launched by passes.py.

Tiles are [tile, 8]: a row is a byte of mask, bit i of byte j being element 8 j + i. Steps are shared by
whole bytes, `run` bytes each (`per_tensor`: all). Whoever launches these turns fused multiply-adds off:
each operation rounds as torch's does. Offsets of bytes fit int32, those of elements need not.
"""

import triton
import triton.language as tl

# Added to and subtracted from |v| < 2**22: the nearest integer, ties to even.
_TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def _clamped(v, low, high):
    """NaN stays NaN."""
    return tl.where(v < low, low, tl.where(v > high, high, v))


@triton.jit
def _rounded(v):
    """To integers; no negative zero comes out, as no integer code has one."""
    return (v + _TO_INTEGER) - _TO_INTEGER


@triton.jit
def _rounded_e2m1(v):
    """Of |v| <= 6: steps of 1/2 below 2, 1 below 4, then 2."""
    magnitude = tl.abs(v)
    unit = tl.where(magnitude < 4, tl.where(magnitude < 2, 0.5, 1.0), 2.0)
    inverse = tl.where(magnitude < 4, tl.where(magnitude < 2, 2.0, 1.0), 0.5)
    value = _rounded(v * inverse) * unit
    return tl.where(value == 0, v * 0.0, value)  # E2M1 has a negative zero


@triton.jit
def _tile(n, tile: tl.constexpr):
    """Indices of bytes and which exist; where the elements begin, their offsets, and which exist."""
    byte = tl.program_id(0) * tile + tl.arange(0, tile)
    begin = tl.program_id(0).to(tl.int64) * (tile * 8)
    at = tl.arange(0, tile)[:, None] * 8 + tl.arange(0, 8)[None, :]
    count = tl.minimum(n - begin, tile * 8).to(tl.int32)
    return byte, tl.arange(0, tile) * 8 < count, begin, at, at < count


@triton.jit
def _per_byte(values, byte, is_byte, run, per_tensor: tl.constexpr):
    """A step or zero point for every row of a tile."""
    if per_tensor:
        value = tl.load(values)
    else:
        value = tl.load(values + byte // run, mask=is_byte, other=1)[:, None]
    return value


@triton.jit
def _store_mask(mask, byte, is_byte, ratio, is_element, first, last):
    passes = (ratio >= first) & (ratio <= last) & is_element
    bits = tl.sum(passes.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    tl.store(mask + byte, bits.to(tl.uint8), mask=is_byte)


@triton.jit
def _mark_nan(nan, byte, ratio, is_element):
    has_nan = tl.max(((ratio != ratio) & is_element).to(tl.int32), axis=1) != 0
    tl.store(nan + tl.zeros_like(byte), float("nan"), mask=has_nan)


@triton.jit
def _kept(mask, byte, is_byte):
    """Mask bytes of a tile, 255 beyond the end."""
    return tl.load(mask + byte, mask=is_byte, other=255).to(tl.int32)


@triton.jit
def _is_set(bits):
    return ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def encode(
    x,
    scale,
    zero,
    codes,
    mask,
    nan,
    n,
    run,
    low,
    high,
    first,
    last,
    is_float: tl.constexpr,
    per_tensor: tl.constexpr,
    tile: tl.constexpr,
):
    """`reference.encode`; `nan`, one float32 of 0, becomes NaN if the operand holds one."""
    byte, is_byte, begin, at, is_element = _tile(n, tile)
    value = tl.load(x + begin + at, mask=is_element, other=0.0).to(tl.float32)
    ratio = tl.div_rn(value, _per_byte(scale, byte, is_byte, run, per_tensor))
    if mask is not None:
        _store_mask(mask, byte, is_byte, ratio, is_element, first, last)
    _mark_nan(nan, byte, ratio, is_element)
    if is_float:
        code = _clamped(ratio, low, high).to(codes.dtype.element_ty)
    else:
        shift = 0.0
        if zero is not None:
            shift = _per_byte(zero, byte, is_byte, run, per_tensor).to(tl.float32)
        nearest = _rounded(_clamped(ratio, low - shift, high - shift)) + shift
        code = nearest.to(tl.int32).to(codes.dtype.element_ty)
    tl.store(codes + begin + at, code, mask=is_element)


@triton.jit
def fake_quantize(
    x,
    scale,
    out,
    mask,
    n,
    run,
    low,
    high,
    first,
    last,
    kind: tl.constexpr,
    per_tensor: tl.constexpr,
    tile: tl.constexpr,
):
    """`reference.fake_quantize_with_mask` of integers, E2M1 or E4M3."""
    byte, is_byte, begin, at, is_element = _tile(n, tile)
    value = tl.load(x + begin + at, mask=is_element, other=0.0).to(tl.float32)
    step = _per_byte(scale, byte, is_byte, run, per_tensor)
    ratio = tl.div_rn(value, step)
    if mask is not None:
        _store_mask(mask, byte, is_byte, ratio, is_element, first, last)
    limited = _clamped(ratio, low, high)
    if kind == "e4m3":
        nearest = limited.to(tl.float8e4nv).to(tl.float32)
    elif kind == "e2m1":
        nearest = _rounded_e2m1(limited)
    else:
        nearest = _rounded(limited)
    tl.store(out + begin + at, (nearest * step).to(out.dtype.element_ty), mask=is_element)


@triton.jit
def decode(
    codes,
    scale,
    zero,
    out,
    n,
    run,
    per_tensor: tl.constexpr,
    tile: tl.constexpr,
):
    """`reference.decode`."""
    byte, is_byte, begin, at, is_element = _tile(n, tile)
    value = tl.load(codes + begin + at, mask=is_element)
    if zero is not None:
        value = value.to(tl.int32) - _per_byte(zero, byte, is_byte, run, per_tensor)
    value = value.to(tl.float32)
    if scale is not None:
        value = value * _per_byte(scale, byte, is_byte, run, per_tensor)
    tl.store(out + begin + at, value.to(out.dtype.element_ty), mask=is_element)


@triton.jit
def apply_mask(x, mask, scale, n, tile: tl.constexpr):
    """`reference.apply_mask_`; a tile in which nothing was clipped or scaled is left alone."""
    byte, is_byte, begin, at, is_element = _tile(n, tile)
    bits = tl.full([tile], 255, tl.int32)
    if mask is not None:
        bits = _kept(mask, byte, is_byte)
    if (scale is not None) or tl.min(bits) != 255:
        value = tl.load(x + begin + at, mask=is_element)
        if scale is not None:
            value = (value.to(tl.float32) * tl.load(scale)).to(x.dtype.element_ty)
        kept = tl.where(_is_set(bits), value, tl.zeros_like(value))
        tl.store(x + begin + at, kept, mask=is_element)


@triton.jit
def accumulate(total, x, mask, scale, n, tile: tl.constexpr):
    """`reference.accumulate_`."""
    byte, is_byte, begin, at, is_element = _tile(n, tile)
    value = tl.load(x + begin + at, mask=is_element).to(tl.float32)
    if scale is not None:
        value = value * tl.load(scale)
    if mask is not None:
        value = tl.where(_is_set(_kept(mask, byte, is_byte)), value, 0.0)
    sum_ = tl.load(total + begin + at, mask=is_element) + value
    tl.store(total + begin + at, sum_, mask=is_element)


@triton.jit
def _exponential(v):
    """Of clamped |v| < 2**7, as cpu/kernels.cpp has it: the same bits, relative error below 2**-22."""
    x = _clamped(v, -87.0, 88.0)
    k = _rounded(x * 1.44269504)
    r = (x - k * 0.693359375) + k * 2.12194440e-4
    p = r * 1.3888889e-3 + 8.3333333e-3
    p = p * r + 4.1666667e-2
    p = p * r + 1.6666667e-1
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return p * ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _gated(x, n, row_bytes, tile: tl.constexpr):
    """A tile of n activated elements: bytes, elements, where their gates are, gates, ups, silu(gates).

    Rows of x are [gate | up], `row_bytes` times 8 elements each, so eight elements are of one row.
    """
    byte, is_byte, begin, at, is_element = _tile(n, tile)
    gates = begin + at + ((byte // row_bytes).to(tl.int64) * row_bytes * 8)[:, None]
    gate = tl.load(x + gates, mask=is_element, other=0.0).to(tl.float32)
    up = tl.load(x + gates + row_bytes * 8, mask=is_element, other=0.0).to(tl.float32)
    silu = tl.div_rn(gate, 1.0 + _exponential(-gate)).to(x.dtype.element_ty).to(tl.float32)
    return byte, is_byte, begin + at, is_element, gates, gate, up, silu


@triton.jit
def swiglu(x, out, n, row_bytes, tile: tl.constexpr):
    """`reference.swiglu`."""
    _, _, at, is_element, _, _, up, silu = _gated(x, n, row_bytes, tile)
    tl.store(out + at, (silu * up).to(out.dtype.element_ty), mask=is_element)


@triton.jit
def swiglu_encode(
    x,
    scale,
    codes,
    mask,
    nan,
    n,
    row_bytes,
    low,
    high,
    first,
    last,
    is_float: tl.constexpr,
    tile: tl.constexpr,
):
    """`reference.swiglu_encode`: `swiglu`, then `encode` of one step."""
    byte, is_byte, at, is_element, _, _, up, silu = _gated(x, n, row_bytes, tile)
    value = (silu * up).to(x.dtype.element_ty).to(tl.float32)
    ratio = tl.div_rn(value, tl.load(scale))
    if mask is not None:
        _store_mask(mask, byte, is_byte, ratio, is_element, first, last)
    _mark_nan(nan, byte, ratio, is_element)
    if is_float:
        code = _clamped(ratio, low, high).to(codes.dtype.element_ty)
    else:
        code = _rounded(_clamped(ratio, low, high)).to(tl.int32).to(codes.dtype.element_ty)
    tl.store(codes + at, code, mask=is_element)


@triton.jit
def swiglu_backward(grad, x, mask, out, n, row_bytes, tile: tl.constexpr):
    """`reference.swiglu_backward`."""
    byte, is_byte, at, is_element, gates, gate, up, silu = _gated(x, n, row_bytes, tile)
    upstream = tl.load(grad + at, mask=is_element, other=0.0).to(tl.float32)
    if mask is not None:
        upstream = tl.where(_is_set(_kept(mask, byte, is_byte)), upstream, 0.0)
    tl.store(out + gates + row_bytes * 8, (upstream * silu).to(x.dtype.element_ty), mask=is_element)
    sigmoid = tl.div_rn(tl.full(gate.shape, 1.0, tl.float32), 1.0 + _exponential(-gate))
    dsilu = (upstream * up).to(x.dtype.element_ty).to(tl.float32)
    dgate = dsilu * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(out + gates, dgate.to(x.dtype.element_ty), mask=is_element)
