"""Cross entropy over a vocabulary that is cut over tensor-parallel ranks, some tokens at a time.

Megatron's keeps a softmax `[tokens, vocabulary]` in float32 for backward. Here float32 exists for a
chunk of tokens alone, and what is kept is the gradient, in the logits' dtype. Two small collectives a
chunk: maxima, then sums. `divergence.py` computes it beside a divergence from the same parts.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.parallel.reduce import all_reduce_fused_

# Elements of a chunk on a rank: 64 MiB in float32; a few such tensors exist at a time.
CHUNK_ELEMENTS = 1 << 24
OUTSIDE = float("-inf")  # logit of a column that takes no probability


def chunks(count: int, columns: int) -> Iterator[tuple[int, int]]:
    """First row and the one behind the last, of chunks of rows of `columns` elements."""
    rows = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, count, rows):
        yield start, min(start + rows, count)


def is_padding(columns: int, vocab_size: int, group: dist.ProcessGroup, like: Tensor) -> Tensor:
    """Which of this rank's columns, bool [columns], are behind the vocabulary's end."""
    real = vocab_size - group.rank() * columns
    return torch.arange(columns, device=like.device) >= real


def _place(labels: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Which labels [n] are among this rank's columns, and a column for each [n, 1]."""
    is_own = (labels >= 0) & (labels < columns)
    return is_own, labels.clamp(0, columns - 1)[:, None]


def entropy_parts(s: Tensor, top: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits [n, V/tp], their maxima over all ranks [n], and labels counted from the first column.

    Returns:
        exp(s - top); this rank's summands of its sum over the vocabulary and of the label's logit.
    """
    is_own, column = _place(labels, s.shape[1])
    chosen = torch.where(is_own, s.gather(1, column)[:, 0], 0.0)
    exp_s = (s - top[:, None]).exp_()
    return exp_s, exp_s.sum(1), chosen


def entropy_slope_(exp_s: Tensor, total: Tensor, labels: Tensor, share: float) -> Tensor:
    """Makes `exp_s` the gradient of `share` times the cross entropy; `total`: its sum over all ranks."""
    is_own, column = _place(labels, exp_s.shape[1])
    exp_s.mul_((share / total)[:, None])
    mine = torch.where(is_own, -share, 0.0)[:, None]
    return exp_s.scatter_add_(1, column, mine.to(exp_s.dtype))


def chunked_cross_entropy(
    logits: Tensor, labels: Tensor, *, vocab_size: int, group: dist.ProcessGroup
) -> Tensor:
    """Cross entropy of every token, float32 [n].

    Args:
        logits: [n, Vp/tp] of this rank's columns, of any float dtype.
        labels: Next tokens [n].
        vocab_size: Without padding: columns from here on take no probability.
        group: Tensor-parallel ranks.
    """
    losses: Tensor = _CrossEntropy.apply(logits, labels, vocab_size, group)
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, group: dist.ProcessGroup
    ) -> Tensor:
        count, columns = logits.shape
        padding = is_padding(columns, vocab_size, group, logits)
        losses = logits.new_empty(count, dtype=torch.float32)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start, stop in chunks(count, columns):
            s = logits[start:stop].float().masked_fill(padding, OUTSIDE)
            own = labels[start:stop] - group.rank() * columns
            top = s.amax(1)
            all_reduce_fused_([top], dist.ReduceOp.MAX, group)
            exp_s, total, chosen = entropy_parts(s, top, own)
            sums = torch.stack([total, chosen])
            all_reduce_fused_([sums], dist.ReduceOp.SUM, group)
            losses[start:stop] = sums[0].log() + top - sums[1]
            if gradient is not None:
                gradient[start:stop] = entropy_slope_(exp_s, sums[0], own, 1.0)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.unsqueeze(1).to(gradient.dtype), None, None, None
