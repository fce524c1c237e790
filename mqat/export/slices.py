"""Any slice of a dist-checkpoint tensor, without a process group, Megatron, or unpickling code.

A `torch_dist` checkpoint is an index (`.metadata`, a pickle) and files of concatenated `torch.save`
records, one per saved chunk. The index is read by an unpickler that knows only the index's own
classes, the records with `weights_only=True`; only chunks that overlap the request are read.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mqat.models.llama import LlamaConfig
from mqat.models.manifest import check_files, read_description
from mqat.quant.scheme import LinearScheme

_ALLOWED_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "torch.distributed.checkpoint.filesystem",
)
_ALLOWED_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
}


class _IndexUnpickler(pickle.Unpickler):
    """Refuses every class that is not part of a checkpoint index."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        allowed = module in _ALLOWED_MODULES or (module, name) in _ALLOWED_NAMES or is_dtype
        if not allowed or "." in name:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint index")
        return super().find_class(module, name)


class CheckpointReader:
    """Read-only view of a checkpoint; holds at most one chunk in memory.

    Attributes:
        description: Parsed `mqat.json`.
        model: Global sizes.
        layers: Global linear name -> scheme, quantized linears only.

    Args:
        path: Checkpoint directory.
        crc: Also compare every file's checksum, not only its size.

    Raises:
        ValueError: Incomplete, damaged, or not a checkpoint; names the file.
    """

    def __init__(self, path: Path, *, crc: bool = True) -> None:
        self.path = path
        self.description = read_description(path)
        check_files(path, self.description, crc=crc)
        self.model = LlamaConfig.from_dict(self.description["model"])
        quantization = self.description["quantization"] or {"layers": {}}
        self.layers = {
            name: LinearScheme.from_dict(scheme) for name, scheme in quantization["layers"].items()
        }
        try:
            with (path / ".metadata").open("rb") as file:
                index = _IndexUnpickler(file).load()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise ValueError(f"{path / '.metadata'}: not a checkpoint index ({error}).") from error
        self._tensors = {
            key: value for key, value in index.state_dict_metadata.items() if hasattr(value, "size")
        }
        self._records = {
            (where.fqn, tuple(where.offset)): info
            for where, info in index.storage_data.items()
            if where.offset is not None
        }
        self._last: tuple[tuple[str, tuple[int, ...]], Tensor] | None = None

    def has(self, key: str) -> bool:
        """Whether the checkpoint holds a tensor of this key."""
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape."""
        if key not in self._tensors:
            raise ValueError(f"{self.path}: tensor {key!r} is missing from the checkpoint.")
        return tuple(self._tensors[key].size)

    def read(self, key: str, region: Sequence[slice] = ()) -> Tensor:
        """A region of a tensor, in its stored dtype.

        Args:
            key: Name in the checkpoint.
            region: One slice per leading dimension (step 1); the rest is taken whole.
        """
        shape = self.shape(key)
        wanted = [
            range(size)[part]
            for size, part in zip(
                shape, [*region, *[slice(None)] * (len(shape) - len(region))], strict=True
            )
        ]
        result = torch.empty(
            [len(span) for span in wanted], dtype=self._tensors[key].properties.dtype
        )
        for chunk in self._tensors[key].chunks:
            into, source = [], []
            for span, offset, size in zip(wanted, chunk.offsets, chunk.sizes, strict=True):
                start, stop = max(span.start, offset), min(span.stop, offset + size)
                into.append(slice(start - span.start, max(stop, start) - span.start))
                source.append(slice(start - offset, max(stop, start) - offset))
            if all(part.stop > part.start for part in into):
                result[tuple(into)] = self._chunk(key, tuple(chunk.offsets))[tuple(source)]
        return result

    def _chunk(self, key: str, offset: tuple[int, ...]) -> Tensor:
        name = (key, offset)
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        record = self._records[name]
        file = self.path / record.relative_path
        try:
            with file.open("rb") as handle:
                handle.seek(record.offset)
                data = io.BytesIO(handle.read(record.length))
            tensor = torch.load(data, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{file}: record of {key!r} cannot be read ({error}).") from error
        self._last = (name, tensor)
        assert isinstance(tensor, Tensor)
        return tensor
