"""Global batches in a fixed order, cut into microbatches the same way on every layout.

The order depends on the seed and the epoch only, and the position is the number of consumed
samples: resuming at another data-parallel size continues with the very next sample.
"""

import torch
from torch import Tensor

from mqat.data.packing import PackedDataset, document_ends, positions_in_documents

Microbatch = dict[str, Tensor | None]


class Batches:
    """Microbatches of one data-parallel rank: of whole sequences, also under context parallelism.

    In each, `attention_mask` is None, or says where packed documents end (`packing.document_ends`);
    `loss_mask` says which labels count in the loss (answers of conversations, all of a text), and
    `token_mask`, bool [b, s], which inputs are more than padding or filler: those that a served
    model could meet, prompts included. None: all are.

    A global batch is cut into microbatches of consecutive samples; microbatch `m` goes to rank
    `m % dp_size`. So the same microbatches exist whatever `dp_size` is.

    Args:
        data: Packed sequences.
        global_batch_size: Samples per optimizer step.
        micro_batch_size: Samples per forward pass; divides global_batch_size / dp_size.
        dp_rank: This rank's position.
        dp_size: Data-parallel size.
        shuffle: A new permutation every epoch; otherwise file order.
        seed: Of the permutations.
    """

    def __init__(
        self,
        data: PackedDataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        shuffle: bool,
        seed: int,
    ) -> None:
        self.data = data
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.shuffle = shuffle
        self.seed = seed
        self._order: tuple[int, Tensor] | None = (
            None  # of the latest epoch; drawn once, not per step
        )

    def _sample_order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.data))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.data), generator=generator)
        return self._order[1]

    def _rows(self, consumed: int, count: int) -> Tensor:
        """Row numbers of the next `count` samples; epochs follow each other without a gap."""
        rows = []
        while count > 0:
            epoch, position = divmod(consumed, len(self.data))
            part = self._sample_order(epoch)[position : position + count]
            rows.append(part)
            consumed, count = consumed + len(part), count - len(part)
        return torch.cat(rows)

    def _microbatch(self, rows: Tensor, weights: Tensor) -> Microbatch:
        """Tensors of some rows; a row of weight 0 does not count in the loss."""
        tokens = self.data.tokens[rows].long()
        batch, length = tokens.shape[0], tokens.shape[1] - 1
        ends: Tensor | None = None
        positions = torch.arange(length).expand(batch, length)
        real = (weights > 0)[:, None].expand(batch, length)
        if self.data.segments is not None:
            segments = self.data.segments[rows]
            real = real & (segments >= 0)
            ends = document_ends(segments)
            positions = positions_in_documents(segments)
        return {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": self.data.loss_mask[rows].float() * weights[:, None],
            "position_ids": positions,
            "attention_mask": ends,
            "token_mask": None if bool(real.all()) else real,
        }

    def _split(self, rows: Tensor, weights: Tensor) -> list[Microbatch]:
        size = self.micro_batch_size
        starts = range(0, len(rows), size)[self.dp_rank :: self.dp_size]
        return [self._microbatch(rows[i : i + size], weights[i : i + size]) for i in starts]

    def microbatches(self, consumed: int) -> list[Microbatch]:
        """This rank's part of the global batch that starts after `consumed` samples."""
        rows = self._rows(consumed, self.global_batch_size)
        return self._split(rows, torch.ones(len(rows)))

    def first(self, count: int) -> list[list[Microbatch]]:
        """Steps over the first `count` samples in file order, starting again if there are fewer.

        A rank that has no part in a step gets an empty list of microbatches.
        """
        rows = torch.arange(count) % len(self.data)
        return self._steps(rows, torch.ones(count))

    def spread(self, count: int) -> list[list[Microbatch]]:
        """Steps over `count` samples evenly spread over the data; otherwise like `first`."""
        rows = torch.arange(count) * max(len(self.data), count) // count % len(self.data)
        return self._steps(rows, torch.ones(count))

    def epoch(self) -> list[list[Microbatch]]:
        """Steps that cover every sample once; the last batch is filled up with weight-0 samples."""
        count = len(self.data)
        padding = -count % self.global_batch_size
        rows = torch.cat([torch.arange(count), torch.zeros(padding, dtype=torch.long)])
        return self._steps(rows, torch.cat([torch.ones(count), torch.zeros(padding)]))

    def _steps(self, rows: Tensor, weights: Tensor) -> list[list[Microbatch]]:
        size = self.global_batch_size
        starts = range(0, len(rows), size)
        return [self._split(rows[i : i + size], weights[i : i + size]) for i in starts]

    def sample_tokens(self, *, rows: int, length: int) -> Tensor:
        """The beginnings of the first sequences, int64 [rows, length]."""
        index = torch.arange(rows) % len(self.data)
        return self.data.tokens[index, :length].long()
