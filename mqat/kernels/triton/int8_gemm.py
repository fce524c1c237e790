"""The integer GEMM with its scales, `scaled_matmul` of int8 codes: int32 sums never leave the chip.

Suffixes: N tokens, O output features, K input features; *_N, *_O, *_K of tiles.
"""

import triton
import triton.language as tl


@triton.jit
def scaled_matmul(
    x,
    w,
    scale,
    row_scale,
    out,
    N,
    O,
    K,
    PER_TENSOR: tl.constexpr,
    HAS_WHOLE_TILES: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`x [N, K] @ w [O, K].T * row_scale[:, None] * scale`, rounded once to the dtype of `out`.

    `GROUP` tiles of rows are taken together, column by column: what they share stays in the L2 cache.
    `HAS_WHOLE_TILES`: `TILE_K` divides K.
    """
    tiles_N, tiles_O = tl.cdiv(N, TILE_N), tl.cdiv(O, TILE_O)
    group = tl.program_id(0) // (GROUP * tiles_O)
    rows_in_group = tl.minimum(tiles_N - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_O)
    row = (group * GROUP + within % rows_in_group) * TILE_N + tl.arange(0, TILE_N)
    col = within // rows_in_group * TILE_O + tl.arange(0, TILE_O)
    # Rows and columns beyond the end are computed from others, and not stored.
    k = tl.arange(0, TILE_K)
    x_at = x + (row % N).to(tl.int64)[:, None] * K + k[None, :]
    w_at = w + (col % O).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros([TILE_N, TILE_O], tl.int32)
    for begin in range(0, K, TILE_K):
        if HAS_WHOLE_TILES:
            x_NK = tl.load(x_at)
            w_KO = tl.load(w_at)
        else:
            x_NK = tl.load(x_at, mask=k[None, :] < K - begin, other=0)
            w_KO = tl.load(w_at, mask=k[:, None] < K - begin, other=0)
        total = tl.dot(x_NK, w_KO, total)
        x_at += TILE_K
        w_at += TILE_K
    value = total.to(tl.float32)
    if row_scale is not None:
        value = value * tl.load(row_scale + row % N)[:, None]
    if PER_TENSOR:
        value = value * tl.load(scale)
    else:
        value = value * tl.load(scale + col % O)[None, :]
    at = out + row.to(tl.int64)[:, None] * O + col[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=(row < N)[:, None] & (col < O)[None, :])
