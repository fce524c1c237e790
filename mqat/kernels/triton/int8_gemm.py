"""The integer GEMM with its scales, `scaled_matmul` of int8 codes: int32 sums never leave the chip."""

import triton
import triton.language as tl


@triton.jit
def scaled_matmul(
    x,
    w,
    scale,
    row_scale,
    out,
    rows,
    cols,
    inner,
    per_tensor: tl.constexpr,
    is_whole: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_cols: tl.constexpr,
    tile_inner: tl.constexpr,
    stack: tl.constexpr,
):
    """`x @ w.T * row_scale[:, None] * scale`, rounded once to the dtype of `out` [rows, cols].

    Of int8 x [rows, inner] and w [cols, inner]; `is_whole`: `tile_inner` divides inner. `stack` tiles
    of rows are taken together, column by column: what they share stays in the L2 cache.
    """
    row_tiles, col_tiles = tl.cdiv(rows, tile_rows), tl.cdiv(cols, tile_cols)
    group = tl.program_id(0) // (stack * col_tiles)
    rows_in_group = tl.minimum(row_tiles - group * stack, stack)
    within = tl.program_id(0) % (stack * col_tiles)
    row = (group * stack + within % rows_in_group) * tile_rows + tl.arange(0, tile_rows)
    col = within // rows_in_group * tile_cols + tl.arange(0, tile_cols)
    # Rows and columns beyond the end are computed from others, and not stored.
    k = tl.arange(0, tile_inner)
    x_at = x + (row % rows).to(tl.int64)[:, None] * inner + k[None, :]
    w_at = w + (col % cols).to(tl.int64)[None, :] * inner + k[:, None]
    total = tl.zeros([tile_rows, tile_cols], tl.int32)
    for begin in range(0, inner, tile_inner):
        if is_whole:
            x_tile = tl.load(x_at)
            w_tile = tl.load(w_at)
        else:
            x_tile = tl.load(x_at, mask=k[None, :] < inner - begin, other=0)
            w_tile = tl.load(w_at, mask=k[:, None] < inner - begin, other=0)
        total = tl.dot(x_tile, w_tile, total)
        x_at += tile_inner
        w_at += tile_inner
    value = total.to(tl.float32)
    if row_scale is not None:
        value = value * tl.load(row_scale + row % rows)[:, None]
    if per_tensor:
        value = value * tl.load(scale)
    else:
        value = value * tl.load(scale + col % cols)[None, :]
    at = out + row.to(tl.int64)[:, None] * cols + col[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (col < cols)[None, :])
