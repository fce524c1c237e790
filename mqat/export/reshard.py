"""Which rows and columns of a checkpoint tensor an inference rank needs. Pure arithmetic.

Checkpoint tensors are global and know nothing of the training layout, so this is the only place
where a parallel layout enters the export. Row order of the fused weights:

    checkpoint qkv   per query group: its query heads, its key head, its value head
    TensorRT-LLM qkv all query heads of the rank, then its key heads, then its value heads
    checkpoint fc1   all gate rows, then all up rows
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mqat.models.decoder import DecoderConfig

Rows = list[slice]

# Enough to keep the arithmetic vectorized, few enough to stay in the cache.
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class InferenceRank:
    """Position of one rank file: `rank = pp_rank * tp + tp_rank`."""

    tp_rank: int
    tp: int
    pp_rank: int
    pp: int

    def layers(self, model: DecoderConfig) -> range:
        """Global numbers of the layers of this stage; the file numbers them from zero."""
        per_stage = model.num_layers // self.pp
        return range(self.pp_rank * per_stage, (self.pp_rank + 1) * per_stage)

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the final norm and the head."""
        return self.pp_rank == self.pp - 1


def key_value_heads(model: DecoderConfig, rank: InferenceRank) -> range:
    """Key/value heads of a rank; with more ranks than heads, each head has several copies."""
    heads = model.num_query_groups
    if rank.tp > heads:
        head = rank.tp_rank // (rank.tp // heads)
        return range(head, head + 1)
    per_rank = heads // rank.tp
    return range(rank.tp_rank * per_rank, (rank.tp_rank + 1) * per_rank)


def query_rows(model: DecoderConfig, rank: InferenceRank) -> Rows:
    """Checkpoint rows of this rank's query heads, in order."""
    d = model.head_dim
    per_group = model.num_attention_heads // model.num_query_groups
    per_rank = model.num_attention_heads // rank.tp
    rows = []
    for head in range(rank.tp_rank * per_rank, (rank.tp_rank + 1) * per_rank):
        start = (head // per_group * (per_group + 2) + head % per_group) * d
        rows.append(slice(start, start + d))
    return rows


def _head_rows(model: DecoderConfig, rank: InferenceRank, part: int) -> Rows:
    d = model.head_dim
    per_group = model.num_attention_heads // model.num_query_groups
    starts = [
        (group * (per_group + 2) + per_group + part) * d for group in key_value_heads(model, rank)
    ]
    return [slice(start, start + d) for start in starts]


def key_rows(model: DecoderConfig, rank: InferenceRank) -> Rows:
    """Checkpoint rows of this rank's key heads."""
    return _head_rows(model, rank, 0)


def value_rows(model: DecoderConfig, rank: InferenceRank) -> Rows:
    """Checkpoint rows of this rank's value heads."""
    return _head_rows(model, rank, 1)


def qkv_rows(model: DecoderConfig, rank: InferenceRank) -> Rows:
    """Checkpoint rows of this rank's fused qkv, in TensorRT-LLM's order."""
    return [*query_rows(model, rank), *key_rows(model, rank), *value_rows(model, rank)]


def even_part(size: int, rank: InferenceRank) -> slice:
    """This rank's share of a dimension that TP divides."""
    share = size // rank.tp
    return slice(rank.tp_rank * share, (rank.tp_rank + 1) * share)


def gate_rows(model: DecoderConfig, rank: InferenceRank) -> Rows:
    """Checkpoint rows of this rank's gate (activated) branch."""
    return [even_part(model.intermediate_size, rank)]


def up_rows(model: DecoderConfig, rank: InferenceRank) -> Rows:
    """Checkpoint rows of this rank's up (linear) branch."""
    part = even_part(model.intermediate_size, rank)
    shift = model.intermediate_size
    return [slice(part.start + shift, part.stop + shift)]


def vocab_rows(model: DecoderConfig, rank: InferenceRank) -> tuple[slice, int]:
    """Real rows of this rank's part of a vocabulary table, and how many zero rows follow them."""
    share = -(-model.vocab_size // rank.tp)
    start = min(rank.tp_rank * share, model.vocab_size)
    stop = min(start + share, model.vocab_size)
    return slice(start, stop), share - (stop - start)


def row_blocks(rows: Rows, width: int) -> Iterator[Rows]:
    """Cuts rows of `width` elements into consecutive blocks; all but the last have an even length.

    A tensor is read, converted and written one such block at a time.
    """
    limit = max(_BLOCK_ELEMENTS // max(width, 1) // 2 * 2, 2)
    block: Rows = []
    room = limit
    for part in rows:
        start = part.start
        while start < part.stop:
            taken = min(room, part.stop - start)
            block.append(slice(start, start + taken))
            start, room = start + taken, room - taken
            if room == 0:
                yield block
                block, room = [], limit
    if block:
        yield block


def count(rows: Rows) -> int:
    """Number of rows."""
    return sum(part.stop - part.start for part in rows)
