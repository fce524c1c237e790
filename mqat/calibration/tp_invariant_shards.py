"""A linear's weight as shards of rows of full width, the same on every tensor-parallel layout.

Searches over weights work shard by shard: a GEMM has the same shape whatever the layout, every group
of a row is whole, and what a shard contributes to a sum has its own slot in a tensor, so that adding
the ranks' tensors adds only zeros and is exact.

    column-parallel  [O/tp, I]  num_shards/tp shards of each part, no communication
    row-parallel     [O, I/tp]  columns gathered, then this rank's share of num_shards row shards
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from mqat.calibration.input_hessian import num_shards, shard_bounds
from mqat.parallel.linear import QuantizedLinear, QuantRowParallelLinear
from mqat.parallel.reduce import all_reduce_fused_


def row_shard_count(linear: QuantizedLinear) -> int:
    """Shards of the whole weight, over all ranks."""
    return num_shards(linear) * linear.parts


def row_shard_numbers(linear: QuantizedLinear) -> list[int]:
    """Global numbers of this rank's shards, in the order of `row_shards`."""
    shards, rank = num_shards(linear), linear.tp_group.rank()
    own = range(rank * linear.shards_per_rank, (rank + 1) * linear.shards_per_rank)
    return [part * shards + shard for part in range(linear.parts) for shard in own]


def row_shards(linear: QuantizedLinear) -> list[Tensor]:
    """This rank's shards, float32 [rows, I]; a collective for row-parallel weights."""
    weight = linear.weight.detach()
    if not isinstance(linear, QuantRowParallelLinear):
        shards = weight.chunk(linear.shards_per_rank * linear.parts)
        return [shard.float().contiguous() for shard in shards]
    whole = gather_from_tensor_model_parallel_region(weight, group=linear.tp_group)
    bounds = shard_bounds(whole.shape[0], num_shards(linear))
    return [
        whole[bounds[n] : bounds[n + 1]].float().contiguous() for n in row_shard_numbers(linear)
    ]


def of_all_shards(
    linears: Mapping[str, QuantizedLinear], local: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """float64 [..., this rank's shards] by linear -> [..., all shards]: one collective for all.

    All `linears` have the tensor-parallel group of the first.
    """
    found = {}
    for name, values in local.items():
        linear = linears[name]
        found[name] = values.new_zeros(*values.shape[:-1], row_shard_count(linear))
        found[name][..., row_shard_numbers(linear)] = values
    if found:
        group = next(iter(linears.values())).tp_group
        all_reduce_fused_(list(found.values()), dist.ReduceOp.SUM, group)
    return found


def local_from_shards(
    linear: QuantizedLinear, shards: Sequence[Tensor], *, per_column: bool
) -> Tensor:
    """Inverse of `row_shards` for anything with the shards' rows; a collective where they are cut.

    Args:
        linear: Whose layout it is.
        shards: [rows, ...] for each of this rank's shards.
        per_column: Whether dimension 1 is the width or groups of it, of which a row-parallel rank
            keeps its share; else all of it.

    Returns:
        The rows (and columns) that belong to this rank's weight.
    """
    joined = torch.cat(list(shards))
    if not isinstance(linear, QuantRowParallelLinear):
        return joined
    group = linear.tp_group
    bounds = shard_bounds(linear.weight.shape[0], num_shards(linear))
    first = row_shard_numbers(linear)[0]
    whole = joined.new_zeros(bounds[-1], *joined.shape[1:])
    # + 0: the sum with other ranks' zeros would turn -0.0 into 0.0, so do it everywhere.
    whole[bounds[first] : bounds[first + len(shards)]] = joined + 0
    all_reduce_fused_([whole], dist.ReduceOp.SUM, group)
    if not per_column:
        return whole
    return whole.chunk(group.size(), dim=1)[group.rank()].contiguous()
