"""Weights as the optimizer left them, where Megatron gathers them only when they are used."""

from typing import Any


def gather_parameters(model: Any) -> None:
    """DDP's overlapped gathers, now: before weights are read outside a forward pass.

    A collective of the data-parallel ranks under `overlap_param_gather`, nothing otherwise.

    Args:
        model: Chunk or list of chunks of this rank, with or without the DDP wrapper.
    """
    for chunk in model if isinstance(model, list | tuple) else [model]:
        settings = getattr(chunk, "ddp_config", None)
        if settings is not None and settings.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
