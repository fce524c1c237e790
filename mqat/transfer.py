"""From the host to a device, without waiting for it."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. On CUDA a tensor of the host is copied while the host goes on.

    That needs pinned memory, which torch's allocator reuses once the copy is done.
    """
    if device.type == "cuda" and x.device.type == "cpu" and torch.cuda.is_available():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
