"""Context parallelism: which tokens of a sequence a rank holds, and how it gets those of the others.

A sequence is cut into 2 CP chunks; rank r holds the chunks r and 2 CP - 1 - r, so that causal attention
is as much work everywhere (Megatron-Core `utils.get_batch_on_this_cp_rank`). S tokens, m = S / CP:

    own_tokens       [.., S, ..] on every rank  ->  [.., m, ..] of this rank
    whole_sequence   [m, ..] of each rank       ->  [S, ..]   all-gather; backward reduce-scatter (SUM)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from mqat.errors import UserError
from mqat.parallel.quantized_module import unwrapped


def own_chunks(group: dist.ProcessGroup) -> tuple[int, int]:
    """Numbers of this rank's chunks, of 2 CP; the order in which it holds them."""
    return group.rank(), 2 * group.size() - 1 - group.rank()


def own_tokens(x: Tensor, group: dist.ProcessGroup, *, dim: int = 1) -> Tensor:
    """This rank's part of whole sequences along `dim`.

    Raises:
        UserError: The sequence cannot be cut into equal chunks.
    """
    length, count = x.shape[dim], 2 * group.size()
    if length % count:
        raise UserError(
            f"sequences of {length} tokens cannot be cut into 2 x context_parallel_size={group.size()} "
            f"chunks; use a multiple of {count}, such as {length + -length % count}."
        )
    chunks = x.chunk(count, dim)
    return torch.cat([chunks[number] for number in own_chunks(group)], dim)


def whole_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All tokens in the order of the sequence, along dimension 0; differentiable."""
    gathered = gather_from_sequence_parallel_region(x, group=group)
    size = group.size()
    chunks = gathered.chunk(2 * size)  # 0, 2 CP - 1, 1, 2 CP - 2, ...
    order = [2 * n if n < size else 2 * (2 * size - 1 - n) + 1 for n in range(2 * size)]
    return torch.cat([chunks[position] for position in order])


@contextmanager
def whole_sequences(chunks: Any) -> Iterator[None]:
    """Inside, each rank computes with whole sequences, as without context parallelism.

    For passes without gradients, where context-parallel ranks are as good as data-parallel ones: GEMMs
    have the same shapes on every layout, which exact calibration needs, and no rank waits for another.
    Sets what Megatron's rotary embedding and core attentions (Transformer Engine's too) read in their
    forward passes: `cp_group`, and their configuration's `context_parallel_size`.
    """
    models = unwrapped(chunks)
    if all(model.config.context_parallel_size == 1 for model in models):
        yield
        return
    sizes = [model.config.context_parallel_size for model in models]
    readers = [
        (module, module.cp_group)
        for model in models
        for module in model.modules()
        if module is not model and getattr(module, "cp_group", None) is not None
    ]
    try:
        for model in models:
            model.config.context_parallel_size = 1
        for module, _ in readers:
            module.cp_group = None
            _forget_positions(module)
        yield
    finally:
        for model, size in zip(models, sizes, strict=True):
            model.config.context_parallel_size = size
        for module, group in readers:
            module.cp_group = group
            _forget_positions(module)


def _forget_positions(module: Any) -> None:
    """Rotary embeddings keep results by length, whatever part of the sequence they are of."""
    forget = getattr(type(module).forward, "cache_clear", None)
    if forget is not None:
        forget()
