"""Idle experts, which no or hardly any calibration token reached: what they get instead of statistics.

Their inputs take the largest scale of the layer's others: another token may reach them in training or
when served, and it clips that least. Their weights have maxima of their own, and recipes round them to
nearest, which needs no token. Fewer than `MIN_TOKENS` are hardly any, unless the layer's other experts
had as few.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.models.structure import split_name
from mqat.parallel.quantized_module import QuantizedModule
from mqat.parallel.reduce import all_reduce_fused_

# Maxima of fewer are too small for static inputs; other recipes need fewer or more (docs/quality.md).
MIN_TOKENS = 32


def idle_experts(modules: Mapping[str, QuantizedModule]) -> set[str]:
    """Names of this rank's idle expert modules among those that watched activations (a collective)."""
    seen, copies = {}, None
    for name, module in modules.items():
        observers = [q.observer for q in module.quantizers.values() if q.observer is not None]
        if module.expert_groups is not None and observers:
            seen[name], copies = torch.tensor([observers[0].tokens]), module.expert_groups.dp
            seen[name] = seen[name].to(observers[0].statistics.device)
    if copies is not None:
        all_reduce_fused_(list(seen.values()), dist.ReduceOp.SUM, copies)
    return unreached(modules, {name: int(count) for name, count in seen.items()})


def unreached(modules: Mapping[str, QuantizedModule], tokens: Mapping[str, int]) -> set[str]:
    """Names of expert modules with no or hardly any tokens, among others with more (a collective).

    An expert in a layer of which none was reached is not idle: nothing went through the layer.

    Args:
        modules: All of this rank.
        tokens: How many were seen, added over copies, by name; of experts alone.
    """
    most: dict[tuple[int, str], Tensor] = {}
    for name, count in tokens.items():
        place = _place(name)
        most[place] = torch.maximum(most.get(place, torch.zeros(1)), torch.tensor([float(count)]))
    most = _merged(modules, most)
    enough = {place: MIN_TOKENS if count >= MIN_TOKENS else 1 for place, count in most.items()}
    return {n for n, count in tokens.items() if count < enough[_place(n)] and most[_place(n)] > 0}


def substituted(
    modules: Mapping[str, QuantizedModule], idle: set[str], found: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What idle experts' quantizers of activations freeze, by name: the others' maximum (a collective).

    Args:
        modules: All of this rank.
        idle: `idle_experts`.
        found: Clipping points or ranges of the quantizers of others, by name.
    """
    largest: dict[tuple[int, str], Tensor] = {}
    quantizers: dict[str, tuple[int, str]] = {}
    for name, module in modules.items():
        if module.expert_groups is None:
            continue
        for kind, quantizer in module.quantizers.items():
            if kind == "weight" or quantizer.observer is None:
                continue
            layer, linear = _place(name)
            place = (layer, f"{linear}.{kind}")
            shape = (2, 1) if quantizer.scheme.is_asymmetric else (1,)
            own = found.get(quantizer.name, quantizer.observer.statistics.new_zeros(shape))
            largest[place] = torch.maximum(largest.get(place, own), own)
            if name in idle:
                quantizers[quantizer.name] = place
    merged = _merged(modules, largest)
    return {name: merged[place] for name, place in quantizers.items()}


def _place(name: str) -> tuple[int, str]:
    """Layer, and the name that the linear has in every expert."""
    layer, inner = split_name(name)
    return layer, inner.rpartition(".")[2]


def _merged(
    modules: Mapping[str, QuantizedModule], local: Mapping[tuple[int, str], Tensor]
) -> dict[tuple[int, str], Tensor]:
    """MAX over the ranks that hold the other experts of this stage's layers (a collective).

    By name: rules may leave all experts of a rank unquantized.
    """
    groups = [m.expert_groups for m in modules.values() if m.expert_groups is not None]
    if not groups or groups[0].ep.size() == 1:
        return dict(local)
    found: list[dict[tuple[int, str], Tensor]] = [{}] * groups[0].ep.size()
    own = {place: value.cpu() for place, value in local.items()}
    dist.all_gather_object(found, own, group=groups[0].ep)
    merged = dict(local)
    for place, value in local.items():
        for other in found:
            if place in other:
                merged[place] = torch.maximum(merged[place], other[place].to(value.device))
    return merged
