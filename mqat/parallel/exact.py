"""GEMMs whose result does not depend on the tensor-parallel size, for calibration.

Floating-point sums depend on their order, so TP 1 and TP 2 see activations that differ in the last
bits, and then calibrated scales do too. Here both causes are removed:

- Every GEMM is cut into `num_shards` shards of the parallel dimension, whatever the layout. A rank
  owns whole shards, so each shard is one GEMM of the same shape on every layout.
- Partial sums over the input dimension are added in float32 in the order of the shards. Over several
  ranks, each adds up a share of the tokens, for which it receives the partial sums of all shards.

    column-parallel  x [S, B, I]     w [O/tp, I]  ->  y [S, B, O/tp]   num_shards/tp shards of rows
    row-parallel     x [S, B, I/tp]  w [O, I/tp]  ->  y [S, B, O], zero but for this rank's tokens

The second is what Megatron then sums over ranks (or scatters by tokens): adding zeros is exact.

    all-to-all       [S B, num_shards/tp, O]  ->  [S B / tp, num_shards, O]
"""

import torch
import torch.distributed as dist
from torch import Tensor


def sharded_linear(x: Tensor, weight: Tensor, num_shards: int) -> Tensor:
    """`x @ weight.T` as `num_shards` GEMMs over equal shards of weight rows."""
    rows = x.reshape(-1, x.shape[-1])
    outputs = [rows @ shard.contiguous().t() for shard in weight.chunk(num_shards, dim=0)]
    return torch.cat(outputs, dim=-1).view(*x.shape[:-1], weight.shape[0])


def _share_of(rows: int, group: dist.ProcessGroup) -> list[int]:
    """Tokens that each rank adds up, in order; equal where sequence parallelism cuts them."""
    size = group.size()
    return [(rank + 1) * rows // size - rank * rows // size for rank in range(size)]


def _added_in_order(partials: list[Tensor]) -> Tensor:
    total = partials[0].float()
    total = total.clone() if total is partials[0] else total
    for partial in partials[1:]:
        total += partial
    return total


def ordered_linear(
    x: Tensor, weight: Tensor, shards_per_rank: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """`x @ weight.T` over the input features of all ranks, added in the same order on any layout.

    Args:
        x: Local input, shape [..., I/tp].
        weight: Local weight, shape [O, I/tp].
        shards_per_rank: Number of equal shards of input features on this rank.
        group: The tensor-parallel ranks, in the order of their input features.

    Returns:
        [..., O] in the dtype of x: the result for this rank's share of the tokens, zero for others;
        and a 0-d bool tensor that is true when that share is not finite.
    """
    rows = x.reshape(-1, x.shape[-1])
    x_shards, w_shards = (t.chunk(shards_per_rank, dim=1) for t in (rows, weight))
    partials = [
        x_shard.contiguous() @ w_shard.contiguous().t()
        for x_shard, w_shard in zip(x_shards, w_shards, strict=True)
    ]
    shape = (*x.shape[:-1], weight.shape[0])
    if group.size() == 1:
        total = _added_in_order(partials)
        return total.to(x.dtype).view(shape), ~total.sum().isfinite()
    shares = _share_of(len(rows), group)
    own, rank = shares[group.rank()], group.rank()
    sent = torch.stack(partials, dim=1)
    received = sent.new_empty(own * group.size(), *sent.shape[1:])
    dist.all_to_all_single(received, sent, [own] * group.size(), shares, group=group)
    by_rank = received.view(group.size(), own, shards_per_rank, sent.shape[-1])
    total = _added_in_order([shard for source in by_rank for shard in source.unbind(dim=1)])
    whole = sent.new_zeros(len(rows), weight.shape[0])
    first = sum(shares[:rank])
    whole[first : first + own] = total
    return whole.view(shape), ~total.sum().isfinite()
