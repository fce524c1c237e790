"""Changing tensors of an exported directory, for tests that something notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def rewrite(directory: Path, rank: int, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Applies `change` to the tensors of one rank file."""
    file = directory / f"rank{rank}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
