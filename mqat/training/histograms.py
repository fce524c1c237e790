"""How large gradients are: for every parameter, how many elements of which power of two.

Counts are integers and add up exactly, so that a histogram is that of the whole parameter whatever the
layout. Experts of a layer have one histogram together.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from mqat.parallel.learned_scales import scale_rule
from mqat.runtime.groups import device, gathered
from mqat.training.gradients import global_name

LOWEST, HIGHEST = (
    -48,
    16,
)  # powers of two; what is smaller (zeros, too) or larger is in the outer bins
EDGES = tuple(float(power) for power in range(LOWEST, HIGHEST + 1))


def magnitudes(x: Tensor) -> Tensor:
    """Elements with LOWEST + i <= log2|x| < LOWEST + i + 1, int64 [HIGHEST - LOWEST] on x's device."""
    _, exponent = torch.frexp(x.detach().float())  # |x| is in [2^(e-1), 2^e); of 0, e is 0
    bins = (exponent.long() - 1 - LOWEST).clamp(0, len(EDGES) - 2)
    return torch.bincount(bins.masked_fill(x == 0, 0).flatten(), minlength=len(EDGES) - 1)


def gradient_histograms(chunks: Sequence[Any], optimizer: Any) -> dict[str, list[int]]:
    """Name of a parameter -> counts over all ranks (a collective), between backward and the step.

    After the distributed optimizer's reduction a data-parallel rank holds the sum of a part of each
    gradient; parts of all ranks together are the whole. What tensor-parallel ranks or two stages hold
    twice counts once.

    Args:
        chunks: DDP-wrapped chunks of this rank.
        optimizer: From `build_optimizer`, its gradients prepared.
    """
    own: dict[str, Tensor] = {}
    for chunk in chunks:
        for local, parameter in chunk.module.named_parameters():
            part = _part(parameter, optimizer)
            if part is None or not _counts_here(parameter):
                continue
            name = re.sub(r"local_experts\.\d+", "local_experts", global_name(chunk.module, local))
            counts = magnitudes(part)
            own[name] = own[name] + counts if name in own else counts
    names = sorted(set[str]().union(*gathered(set(own))))
    nothing = torch.zeros(len(EDGES) - 1, dtype=torch.int64, device=device())
    total = torch.stack([own.get(name, nothing) for name in names])
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def _part(parameter: torch.nn.Parameter, optimizer: Any) -> Tensor | None:
    """Of its gradient, what this rank's shard of the optimizer updates."""
    for part in optimizer.chained_optimizers:
        if parameter in part.model_param_gbuf_map:
            own = part._get_model_param_range_map(parameter)["param"]
            gradient: Tensor = getattr(parameter, "main_grad")  # noqa: B009  (Megatron's DDP adds it)
            return gradient.view(-1)[own.start : own.end]
    return None


def _counts_here(parameter: torch.nn.Parameter) -> bool:
    is_one_of_many = scale_rule(parameter) is not None  # learned scales differ in how they are cut
    return (
        not is_one_of_many
        and param_is_not_shared(parameter)
        and param_is_not_tensor_parallel_duplicate(parameter)
    )
