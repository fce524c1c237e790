"""What backward needs of activations waits in host memory between the two passes.

Parameters stay where they are, and so do codes of weights, which a step's microbatches share
(`quantized_step` holds them, not autograd). Copies are started as a tensor is saved, into pinned memory,
and waited for when backward asks for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Smaller ones are not worth a copy each.
SMALLEST_BYTES = 1 << 20


@contextmanager
def offloaded_activations(
    *, is_enabled: bool, smallest: int = SMALLEST_BYTES, device_type: str = "cuda"
) -> Iterator[None]:
    """Tensors that are saved for backward inside are moved to the host, and back when they are needed.

    Args:
        is_enabled: Otherwise nothing happens.
        smallest: Bytes of a tensor that is moved.
        device_type: Of the tensors that are moved.
    """
    if not is_enabled:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(_pack(smallest, device_type), _unpack):
        yield


def _pack(
    smallest: int, device_type: str
) -> Callable[[Tensor], Tensor | tuple[torch.device, Tensor]]:
    def pack(saved: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        stays = isinstance(saved, torch.nn.Parameter) or saved.nbytes < smallest
        if stays or saved.device.type != device_type:
            return saved
        host = torch.empty(
            saved.size(), dtype=saved.dtype, layout=saved.layout, pin_memory=saved.is_cuda
        )
        return saved.device, host.copy_(saved, non_blocking=True)

    return pack


def _unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    # On the stream that the copy to the host was started on, so behind it.
    return host.to(device, non_blocking=host.is_pinned())
