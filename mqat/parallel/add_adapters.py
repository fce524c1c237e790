"""Gives linears of a built model their adapters, and freezes everything else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mqat.errors import UserError
from mqat.models.adapters import Adapters
from mqat.parallel.linear import quantized_linears
from mqat.parallel.lora import Adapter
from mqat.parallel.quantized_module import unwrapped


def add_adapters_(model: Any, adapters: Adapters, *, seed: int = 0) -> None:
    """Adds untrained adapters; only they are trained from now on.

    Call it after the model is built and before DDP wraps it, so that only adapters have gradient buffers
    and optimizer state.

    Args:
        model: Chunk or list of chunks of this rank.
        adapters: Of the whole model; this rank makes those of its layers.
        seed: Of initial values and dropout, the same on all ranks.

    Raises:
        UserError: A linear is an expert's, has a quantized output, or trains its scales.
    """
    for chunk in unwrapped(model):
        chunk.requires_grad_(False)
        if chunk.pre_process and chunk.config.recompute_granularity is not None:
            chunk.embedding.register_forward_hook(_with_gradient)
    linears = quantized_linears(model)
    for name in (name for name in adapters.names if name in linears):
        linear = linears[name]
        if linear.expert_groups is not None:
            raise UserError(f"{name}: linears of experts have no adapters here.")
        if linear.output_quantizer is not None:
            raise UserError(
                f"{name}: its output is quantized, and an adapter would be added to that; leave one of "
                "them out."
            )
        if any(q.rule is not None for q in linear.quantizers.values()):
            raise UserError(
                f"{name}: only adapters are trained, so its scales must stay as calibrated."
            )
        linear.adapter = Adapter(linear, name, adapters, seed)


def _with_gradient(_: Any, __: Any, embedded: Tensor) -> Tensor:
    """What is recomputed gets gradients only where its input wants one; a frozen table's does not."""
    if torch.is_grad_enabled() and not embedded.requires_grad:
        return embedded.detach().requires_grad_()
    return embedded


def adapters_of(model: Any) -> dict[str, Adapter]:
    """Adapters of this rank by the global names of their linears."""
    linears = quantized_linears(model)
    return {name: x.adapter for name, x in linears.items() if x.adapter is not None}


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Inside, the model computes as if it had none."""
    taken = [(x, x.adapter) for x in quantized_linears(model).values() if x.adapter is not None]
    try:
        for linear, _ in taken:
            linear.adapter = None
        yield
    finally:
        for linear, adapter in taken:
            linear.adapter = adapter


def merge_adapters_(model: Any) -> None:
    """Adds every adapter to its weight, with the bits that were quantized, and takes it away."""
    for name, linear in quantized_linears(model).items():
        if linear.adapter is None:
            continue
        if linear.packed_weight is not None:
            raise UserError(f"{name}: is stored packed, so that nothing can be merged into it.")
        with torch.no_grad():
            linear.weight.copy_(linear.adapter.merged(linear.weight))
        linear.adapter = None
