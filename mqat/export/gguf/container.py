"""GGUF files, version 3, written a tensor at a time (ggml's `docs/gguf.md`).

| part      | holds                                                                            |
|-----------|----------------------------------------------------------------------------------|
| header    | magic, version, how many tensors and keys                                        |
| keys      | name, type and value of each                                                     |
| tensors   | name, sizes (innermost first), type, and where its data begin behind the padding |
| data      | of each tensor in that order, each padded to a multiple of 32 bytes              |
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mqat.export.stream import TensorPlan

_ALIGNMENT = 32
ELEMENTS = 32  # of a block
# ggml's numbers of types that are no blocks.
_PLAIN = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class Block:
    """A type of ggml that stores `ELEMENTS` neighbours of a row together.

    Attributes:
        number: ggml's.
        num_bytes: Of a block.
        file_type: llama.cpp's number of files that consist of it.
    """

    number: int
    num_bytes: int
    file_type: int


Q4_0, Q4_1, Q8_0 = Block(2, 18, 2), Block(3, 20, 3), Block(8, 34, 7)
# Of files without blocks.
FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}


@dataclass(frozen=True)
class BlockPlan(TensorPlan):
    """A tensor of blocks: uint8 [rows, bytes of a row]."""

    block: Block = Q8_0


def write_gguf(path: Path, plans: Sequence[TensorPlan], keys: Mapping[str, Any]) -> None:
    """Writes a file; of its tensors it holds one chunk in memory.

    Args:
        path: Of the file.
        plans: Matrices [out, in] and vectors, in the order of the file.
        keys: Booleans, integers (uint32), numbers (float32), texts, lists of texts or integers (int32).

    Raises:
        OSError: The disk is full, or the file cannot be written.
    """
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(plans), len(keys)))
    for key, value in keys.items():
        head += _string(key) + _value(value)
    offset = 0
    for plan in plans:
        sizes = tuple(reversed(_elements(plan)))
        number = plan.block.number if isinstance(plan, BlockPlan) else _PLAIN[plan.dtype]
        head += _string(plan.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        head += struct.pack("<IQ", number, offset)
        offset += plan.num_bytes + -plan.num_bytes % _ALIGNMENT
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % _ALIGNMENT))
        for plan in plans:
            written = 0
            for chunk in plan.chunks():
                written += file.write(chunk.contiguous().view(torch.uint8).numpy().data)
            assert written == plan.num_bytes, f"{plan.name}: {written} bytes of {plan.num_bytes}"
            file.write(bytes(-written % _ALIGNMENT))


def _elements(plan: TensorPlan) -> tuple[int, ...]:
    """The shape without blocks."""
    if not isinstance(plan, BlockPlan):
        return plan.shape
    rows, row_bytes = plan.shape
    return rows, row_bytes // plan.block.num_bytes * ELEMENTS


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Type and value of a key."""
    if isinstance(value, list):
        is_text = not value or isinstance(value[0], str)  # a vocabulary may have no merges
        items = map(_string, value) if is_text else (struct.pack("<i", item) for item in value)
        kind = _STRING if is_text else _INT32
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(items)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    return struct.pack("<I", _STRING) + _string(value)
