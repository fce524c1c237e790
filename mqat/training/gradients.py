"""Which gradients are not finite, before an optimizer step spreads them over the weights."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from mqat.models.structure import in_layer, is_in_layer, split_name


def global_name(model: Any, name: str) -> str:
    """A parameter's name with the layer's number in the whole model."""
    if not is_in_layer(name):
        return name
    local, rest = split_name(name)
    return in_layer(model.decoder.layers[local].layer_number - 1, rest)


def _position(name: str) -> tuple[int, str]:
    return split_name(name) if is_in_layer(name) else (-1, name)


def nonfinite_gradients(chunks: Sequence[Any]) -> list[str]:
    """Global names of parameters whose gradient holds NaN or infinity on any rank, by layer.

    A collective.

    Args:
        chunks: DDP-wrapped chunks of this rank, after their backward passes.
    """
    own = [
        global_name(chunk.module, name)
        for chunk in chunks
        for name, parameter in chunk.module.named_parameters()
        if parameter.requires_grad and not bool(torch.isfinite(parameter.main_grad).all())
    ]
    found: list[list[str]] = [own]
    if dist.get_world_size() > 1:
        found = [[]] * dist.get_world_size()
        dist.all_gather_object(found, own)
    return sorted({name for names in found for name in names}, key=_position)
