"""Scales of experts that no calibration token reached: their inputs take the largest of the others'.

Their weights have maxima of their own, and recipes round them to nearest. Another token may reach them
in training or when served, and the largest scale of the layer clips it least.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.models.structure import split_name
from mqat.parallel.quantized_module import QuantizedModule


def idle_experts(modules: Mapping[str, QuantizedModule]) -> set[str]:
    """Names of this rank's expert modules that watched activations, after merging, and saw none."""
    watched = {}
    for name, module in modules.items():
        observers = [q.observer for q in module.quantizers.values() if q.observer is not None]
        if module.expert_groups is not None and observers:
            watched[name] = bool(observers[0].statistics[2])
    return unreached(modules, watched)


def unreached(modules: Mapping[str, QuantizedModule], watched: Mapping[str, bool]) -> set[str]:
    """Names of expert modules without tokens, among others that had some (a collective).

    An expert in a layer of which none was reached is not idle: nothing went through the layer.

    Args:
        modules: All of this rank.
        watched: Whether a token was seen, merged over copies and parts, by name; of experts alone.
    """
    seen: dict[tuple[int, str], bool] = {}
    for name, was in watched.items():
        seen[_place(name)] = seen.get(_place(name), False) or was
    reached = _merged(modules, {place: torch.ones(1) * was for place, was in seen.items()})
    return {name for name, was in watched.items() if not was and bool(reached[_place(name)])}


def substituted(
    modules: Mapping[str, QuantizedModule], idle: set[str], found: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What idle experts' quantizers of activations freeze, by name: the others' maximum (a collective).

    Args:
        modules: All of this rank.
        idle: `idle_experts`.
        found: Clipping points or ranges of quantizers that saw tokens, by name.
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
