"""Files of a `torch_dist` checkpoint, written a tensor at a time: what Megatron-Core and NeMo load.

| file            | holds                                                                        |
|-----------------|------------------------------------------------------------------------------|
| `*.distcp`      | records, one after the other: what `torch.save` writes for a tensor          |
| `.metadata`     | shape and chunks of every tensor, and file, offset and length of each record |
| `metadata.json` | the name of the format                                                       |
| `common.pt`     | whatever is no tensor: nothing                                               |

The length of a record follows from shape and dtype, so that the index is known before a file exists.

Sources: torch `distributed/checkpoint/{metadata,filesystem}.py`; Megatron-Core
`dist_checkpointing/core.py` and `strategies/torch.py`.
"""

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mqat.export.stream import TensorPlan

FORMAT = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1,
    "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A chunk of a tensor of the checkpoint.

    Attributes:
        plan: The chunk, under the tensor's name.
        size: Of the whole tensor.
        offsets: Where the chunk begins in it.
    """

    plan: TensorPlan
    size: tuple[int, ...]
    offsets: tuple[int, ...]


def write_records(path: Path, plans: Sequence[TensorPlan]) -> None:
    """Writes a `.distcp` file of chunks in their order; holds one in memory.

    Raises:
        OSError: The disk is full, or the file cannot be written.
    """
    with path.open("wb") as file:
        for plan in plans:
            tensor = torch.cat([chunk.contiguous() for chunk in plan.chunks()])
            assert (tensor.dtype, tuple(tensor.shape)) == (plan.dtype, plan.shape), plan.name
            start = file.tell()
            try:
                torch.save(tensor, file)
            except RuntimeError as error:  # torch wraps what the file object raised
                raise OSError(str(error).splitlines()[0]) from error
            assert file.tell() - start == _record_bytes(plan.shape, plan.dtype), plan.name


def index(files: Mapping[str, Sequence[Record]]) -> bytes:
    """`.metadata` of a checkpoint: file name -> its records, in order."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, records in files.items():
        start = 0
        for record in records:
            plan = record.plan
            length = _record_bytes(plan.shape, plan.dtype)
            found = tensors.setdefault(
                plan.name,
                TensorStorageMetadata(TensorProperties(plan.dtype), torch.Size(record.size), []),
            )
            chunk = ChunkStorageMetadata(torch.Size(record.offsets), torch.Size(plan.shape))
            where = MetadataIndex(plan.name, record.offsets, len(found.chunks))
            found.chunks.append(chunk)
            places[where] = _StorageInfo(name, start, length)
            start += length
    about = Metadata(dict(tensors), storage_data=places, storage_meta=StorageMeta())
    return pickle.dumps(about)


def empty_common() -> bytes:
    """`common.pt` of a checkpoint that holds nothing but tensors."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    return buffer.getvalue()


class _Counter(io.RawIOBase):
    """A file that only counts."""

    def __init__(self) -> None:
        self.length = 0

    def write(self, data: Any) -> int:
        self.length += memoryview(data).nbytes
        return memoryview(data).nbytes

    def writable(self) -> bool:
        return True


@cache
def _record_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    counter = _Counter()
    torch.save(torch.empty(shape, dtype=dtype), counter)  # type: ignore[arg-type]
    return counter.length
