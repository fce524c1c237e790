"""Which rows and columns of a checkpoint tensor an inference rank needs. Pure arithmetic.

Checkpoint tensors are global and know nothing of the training layout, so this is the only place
where a parallel layout enters the export. In which order a fused weight holds its parts is the
table's to say (`models/structure.py`); here is which share of a part a rank owns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mqat.models.decoder import DecoderConfig
from mqat.models.structure import Axis, Linear

Rows = list[slice]

# Enough to keep the arithmetic vectorized, few enough to stay in the cache.
_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class InferenceRank:
    """Position of one rank file: `rank = pp_rank * tp + tp_rank`."""

    tp_rank: int = 0
    tp: int = 1
    pp_rank: int = 0
    pp: int = 1

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


def owned(model: DecoderConfig, axis: Axis, rank: InferenceRank) -> slice:
    """A rank's share of an axis that TP cuts.

    With more ranks than key/value heads, each head is copied to `tp / heads` consecutive ranks.
    """
    heads, size = model.num_query_groups, model.size(axis)
    if axis == "key_value" and rank.tp > heads:
        head = rank.tp_rank // (rank.tp // heads)
        return slice(head * model.head_dim, (head + 1) * model.head_dim)
    share = size // rank.tp
    return slice(rank.tp_rank * share, (rank.tp_rank + 1) * share)


def linear_rows(
    model: DecoderConfig, linear: Linear, parts: Sequence[int], rank: InferenceRank
) -> Rows:
    """Checkpoint rows of a rank's share of some parts of a fused weight, part after part."""
    rows: Rows = []
    for number in parts:
        axis = linear.parts[number].rows
        is_cut = linear.parallel == "column"
        wanted = owned(model, axis, rank) if is_cut else slice(0, model.size(axis))
        rows += linear.fused_rows(model, number, wanted)
    return rows


def linear_columns(model: DecoderConfig, linear: Linear, rank: InferenceRank) -> slice:
    """Checkpoint columns of a rank's weight."""
    is_cut = linear.parallel == "row"
    return owned(model, linear.columns, rank) if is_cut else slice(0, model.size(linear.columns))


def table_rows(size: int, rank: InferenceRank) -> tuple[slice, int]:
    """Real rows of this rank's share of a table, and how many zero rows follow them."""
    share = -(-size // rank.tp)
    start = min(rank.tp_rank * share, size)
    stop = min(start + share, size)
    return slice(start, stop), share - (stop - start)


def row_chunks(rows: Rows, width: int) -> Iterator[Rows]:
    """Cuts rows of `width` elements into consecutive chunks; all but the last have an even length.

    A tensor is read, converted and written one such chunk at a time.
    """
    limit = max(_CHUNK_ELEMENTS // max(width, 1) // 2 * 2, 2)
    chunk: Rows = []
    room = limit
    for span in rows:
        start = span.start
        while start < span.stop:
            taken = min(room, span.stop - start)
            chunk.append(slice(start, start + taken))
            start, room = start + taken, room - taken
            if room == 0:
                yield chunk
                chunk, room = [], limit
    if chunk:
        yield chunk


def count(rows: Rows) -> int:
    """Number of rows."""
    return sum(span.stop - span.start for span in rows)
