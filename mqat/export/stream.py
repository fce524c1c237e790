"""Safetensors files written tensor by tensor, in chunks of rows: memory does not grow with the model.

The bytes are those of the `safetensors` package: an 8-byte little-endian header length, a JSON header
padded with spaces to a multiple of 8, then the data in the order of the header, which is by dtype
(widest first, so that everything is aligned) and then by name.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Name in the header, in the order in which the package sorts dtypes.
_DTYPES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_ORDER = {dtype: position for position, dtype in enumerate(_DTYPES)}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor of a file before it exists.

    Attributes:
        dtype: Of every chunk.
        shape: Of the whole tensor.
        chunks: Produces the tensor's rows in order, some at a time; may be called again.
        name: In the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Tensor]]
    name: str = ""

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, plans: Sequence[TensorPlan]) -> None:
    """Writes a whole file of tensors, given in any order; holds one chunk in memory.

    Raises:
        OSError: The disk is full, or the file cannot be written.
    """
    ordered = sorted(plans, key=lambda plan: (_ORDER[plan.dtype], plan.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for plan in ordered:
        start, end = end, end + plan.num_bytes
        header[plan.name] = {
            "dtype": _DTYPES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [start, end],
        }
    assert len(header) == len(ordered) + 1, f"{path}: two tensors of one name"
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        _write_all(file.write, len(text).to_bytes(8, "little") + text)
        for plan in ordered:
            written = 0
            for chunk in plan.chunks():
                assert chunk.dtype == plan.dtype, f"{plan.name}: chunk is {chunk.dtype}"
                data = chunk.contiguous().reshape(-1).view(torch.uint8).numpy()
                _write_all(file.write, data.data)
                written += len(data)
            assert written == plan.num_bytes, f"{plan.name}: {written} of {plan.num_bytes} bytes"


def _write_all(write: Callable[[memoryview], int | None], data: bytes | memoryview) -> None:
    """One system call may write less than asked (2 GiB at most on Linux)."""
    rest = memoryview(data)
    while rest:
        rest = rest[write(rest) or 0 :]
