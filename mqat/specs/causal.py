"""Causal attention of the documents and chunks that a rank holds: fused, memory linear in tokens.

Everything is made of one piece of work: queries that are the last of their keys. A document alone is
one; the rest of a document that begins in another chunk (context parallelism) has more keys than
queries. No mask of [queries, keys] numbers is stored, unless CUDA has neither flash nor memory-efficient
attention for these heads.

A sliding window, and scores under a cap, take `QUERY_BLOCK` queries at a time with the keys that these
may look at, so that work and memory grow with length times window.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from mqat.errors import UserError

QUERY_BLOCK = 512


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, dropout_p: float, scale: float
) -> Tensor:
    """`F.scaled_dot_product_attention`, causal without a mask, in a fused kernel for grouped heads too.

    On CUDA flash attention takes no mask, and memory-efficient attention no groups: torch would keep
    the scores, [b, heads, m, n] float32, for backward. Repeated keys and values are linear in n, and
    that path repeats them too.

    Args:
        q: [b, heads, m, d].
        k: [b, groups, n, d].
        v: Like `k`.
        attn_mask: As torch's.
        dropout_p: Of the attention's probabilities.
        scale: Of the scores.

    Returns:
        [b, heads, m, d].
    """
    repeats = q.shape[1] // k.shape[1]
    is_grouped = repeats > 1
    options: dict[str, Any] = {
        "attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": attn_mask is None, "scale": scale,
    }  # fmt: skip
    if is_grouped:
        choice = torch._fused_sdp_choice(q, k, v, **options, enable_gqa=True)
        if choice == SDPBackend.MATH.value:
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
            is_grouped = False
    return F.scaled_dot_product_attention(q, k, v, **options, enable_gqa=is_grouped)


def trailing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of queries [b, heads, m, d] that are the last m of n keys [b, groups, n, d].

    Args:
        q: The queries.
        k: The keys.
        v: Values, like `k`.
        dropout_p: Of the attention's probabilities.
        scale: Of the scores.
        window: Keys that a query looks at, its own included; None: all up to its own.
        softcap: c, where scores s become c tanh(s / c).
    """
    options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale}
    m, n = q.shape[2], k.shape[2]
    if softcap is None and (window is None or window >= n):
        return _plain_attention(q, k, v, **options)
    outputs, before = [], n - m
    for a in range(0, m, QUERY_BLOCK):
        b = min(a + QUERY_BLOCK, m)
        first = 0 if window is None else max(before + a - window + 1, 0)
        block = (q[:, :, a:b], *(x[:, :, first : before + b] for x in (k, v)))
        if softcap is None:
            outputs.append(_windowed_attention(*block, window=window, **options))
            continue
        seen = seen_keys(b - a, before + b - first, window, q.device)
        # Recomputed in the backward pass: the scores of all blocks would be [m, n].
        outputs.append(
            checkpoint(
                capped_attention, *block, seen, softcap=softcap, **options, use_reentrant=False,
                preserve_rng_state=dropout_p > 0,
            )
        )  # fmt: skip
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def seen_keys(m: int, n: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [m, n]: the keys that each of the last m of n tokens looks at."""
    places = torch.arange(n, device=device)
    distance = places[n - m :, None] - places
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, dropout_p: float, scale: float, softcap: float
) -> Tensor:
    """Attention whose scores are softcap tanh(scores / softcap), in float32; `seen`: bool [.., m, n]."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-2, -1)).float() * scale
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~seen, float("-inf"))
    return F.dropout(scores.softmax(dim=-1).to(q.dtype), dropout_p) @ v


def _windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, **options: Any
) -> Tensor:
    """As `_plain_attention` within a window: of the same line, `window` numbers let a query look."""
    m, n = q.shape[2], k.shape[2]
    line = q.new_full((m + n - 1,), float("-inf"))
    line[max(n - (window or n), 0) : n] = 0
    mask = line.as_strided((m, n), (1, 1))
    mask = mask.contiguous() if q.is_cuda else mask  # memory-efficient attention needs aligned rows
    return masked_attention(q.flip(2), k, v, attn_mask=mask, **options).flip(2)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """As `trailing_attention`, without window and cap.

    Torch's `is_causal` means the first m. CUDA's flash attention knows the other kind, CPUs' kernel
    only masks. With the queries backwards, query i of them may look at key j while i + j < n, so that
    the rows of the mask are windows of one line of m + n - 1 numbers.
    """
    m, n = q.shape[2], k.shape[2]
    if m == n:
        return masked_attention(q, k, v, attn_mask=None, **options)
    if q.is_cuda:
        return _lower_right_attention(q, k, v, **options)
    line = q.new_zeros(m + n - 1)
    line[n:] = float("-inf")
    mask = line.as_strided((m, n), (1, 1))
    return masked_attention(q.flip(2), k, v, attn_mask=mask, **options).flip(2)


def _lower_right_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The same through torch's lower-right mask, in name only where flash attention runs."""
    repeats, m, n = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    params = SDPAParams(q, k, v, None, options["dropout_p"], False, True)
    is_grouped = repeats > 1 and can_use_flash_attention(params)
    if repeats > 1 and not is_grouped:
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    mask = causal_lower_right(m, n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options, enable_gqa=is_grouped)


def _row_attention(
    q: Tensor, k: Tensor, v: Tensor, chunks: Sequence[tuple[int, int]], ends: Sequence[int],
    **options: Any,
) -> Tensor:  # fmt: skip
    """Of rows with the same documents, which end at `ends`, from 0 on."""
    outputs = []
    for own, (first, last) in zip(q.split([b - a for a, b in chunks], dim=2), chunks, strict=True):
        parts = [
            (a, min(b, last)) for a, b in pairwise(ends) if a < b and max(a, first) < min(b, last)
        ]
        begin = parts[0][0]
        # Split and not sliced: the gradients of slices would each be as large as the whole.
        queries = own.split([b - max(a, first) for a, b in parts], dim=2)
        keys, values = (x[:, :, begin:last].split([b - a for a, b in parts], dim=2) for x in (k, v))
        outputs += [
            trailing_attention(*part, **options) for part in zip(queries, keys, values, strict=True)
        ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunks: Sequence[tuple[int, int]],
    ends: Sequence[Sequence[int]] | None,
    **options: Any,
) -> Tensor:
    """Causal attention within documents, of some chunks of the sequence.

    Args:
        q: [b, heads, m, d], the chunks' queries one after the other.
        k: [b, groups, n, d] of the whole sequence.
        v: Like `k`.
        chunks: First and last + 1 token of each.
        ends: For each row, 0 and where its documents end, up to n; the last may be repeated. None: each
            row is one document.
        **options: Of `trailing_attention`.

    Returns:
        [b, heads, m, d].

    Raises:
        UserError: The documents are not those of these sequences.
    """
    n = k.shape[2]
    if ends is None and len(chunks) == 1:
        return trailing_attention(q, k, v, **options)
    if ends is None:
        return _row_attention(q, k, v, chunks, (0, n), **options)
    if len(ends) != q.shape[0] or any(
        row[0] != 0 or row[-1] != n or any(a > b for a, b in pairwise(row)) for row in ends
    ):
        raise UserError(
            f"attention_mask: the ends of the documents of {len(ends)} rows do not go from 0 to the "
            f"sequence length {n} in {q.shape[0]} rows; see mqat.data.packing.document_ends."
        )
    rows = zip(q.split(1), k.split(1), v.split(1), ends, strict=True)
    return torch.cat(
        [_row_attention(qs, ks, vs, chunks, own, **options) for qs, ks, vs, own in rows]
    )
