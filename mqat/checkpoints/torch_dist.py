"""Any slice of a `torch_dist` tensor, without a process group, Megatron, or unpickling code.

A `torch_dist` checkpoint is an index (`.metadata`, a pickle) and files of concatenated `torch.save`
records, one per saved chunk. The index is read by an unpickler that knows only the index's own
classes; of the records (`records.py`) only what overlaps the request is touched.
"""

import io
import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mqat.checkpoints.folder import Folder
from mqat.checkpoints.records import MappedFile
from mqat.errors import UserError

INDEX = ".metadata"
# Data classes only: a module's other names would let an index call what the module imports.
_INDEX_CLASSES = {
    "pathlib": {"PosixPath"},  # where it was saved, if that was given as a Path
    "pathlib._local": {"PosixPath"},  # the same in Python 3.13
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}


class _Entry:
    """Stands for any object of an index, with what it holds.

    A pickle can set attributes of every class that it names, so none gets the real one.
    """

    members: frozenset[str] = frozenset()
    offset: Any = None  # of a `MetadataIndex` without one

    def __init__(self, *_: Any) -> None:
        """Takes whatever the object was made of: the parts of a path, the value of a member."""

    def __setstate__(self, state: Any) -> None:
        """Takes what the object held; `TensorProperties` has a tuple that begins with the dtype."""
        self.__dict__.update({"dtype": state[0]} if isinstance(state, tuple) else state)


def _enum_member(owner: Any, name: str) -> Any:
    """`getattr` of an enumeration's members: so Python 3.11.0 to 3.11.3 pickle them."""
    if not (isinstance(owner, type) and issubclass(owner, _Entry) and name in owner.members):
        raise pickle.UnpicklingError(f"{owner}.{name} does not belong in a checkpoint index")
    return owner()


class _IndexUnpickler(pickle.Unpickler):
    """Refuses every class that is not part of a checkpoint index."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return partial(_enum_member)
        if module == "torch" and (
            name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return getattr(torch, name)  # in C: their attributes cannot be set
        if name not in _INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint index")
        real = super().find_class(module, name) if module.startswith("torch.") else None
        members = frozenset(getattr(real, "__members__", ()))
        return type(name, (_Entry,), {"members": members})


def _read_index(folder: Folder) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Tensor metadata by key, and where each (key, offset) chunk is stored."""
    content = folder.read(INDEX)
    try:
        index = _IndexUnpickler(io.BytesIO(content)).load()
        tensors = {
            key: value
            for key, value in index.state_dict_metadata.items()
            if hasattr(value, "chunks")
        }
        records = {  # () of what is no tensor
            (where.fqn, tuple(where.offset or ())): info
            for where, info in index.storage_data.items()
        }
    except Exception as error:  # damaged pickles raise nearly anything
        raise UserError(f"{folder.path / INDEX}: not a checkpoint index ({error}).") from error
    return tensors, records


@dataclass(frozen=True)
class _Overlaps:
    """Shape of a region, and for each chunk that reaches into it: its place there, its own part."""

    shape: list[int]
    parts: list[tuple[Any, tuple[slice, ...], tuple[slice, ...]]]


class ChunkedTensors(ABC):
    """Tensors of which files hold chunks; a region is put together from those that reach into it.

    Attributes:
        path: For messages.

    Args:
        path: As above.
        tensors: By key: `size`, `properties.dtype`, and `chunks` with their `offsets` and `sizes`.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Any]) -> None:
        self.path = path
        self._tensors = dict(tensors)

    @abstractmethod
    def _chunk(self, key: str, chunk: Any) -> Tensor:
        """The chunk's elements, not to be changed."""

    def keys(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._tensors)

    def has(self, key: str) -> bool:
        """Whether the checkpoint holds a tensor of this key."""
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape."""
        if key not in self._tensors:
            raise UserError(f"{self.path}: tensor {key!r} is missing from the checkpoint.")
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype."""
        self.shape(key)
        stored: torch.dtype = self._tensors[key].properties.dtype
        return stored

    def read(self, key: str, region: Sequence[slice] = ()) -> Tensor:
        """A region of a tensor, in its stored dtype.

        Args:
            key: Name in the checkpoint.
            region: One slice per leading dimension (step 1); the rest is taken whole.

        Raises:
            ValueError: The tensor is missing, or its record cannot be read or is incomplete.
        """
        found = self._overlaps(key, region)
        result = torch.empty(found.shape, dtype=self.dtype(key))
        missing = result.numel()
        for chunk, into, source in found.parts:
            target = result[into]
            target.copy_(self._chunk(key, chunk)[source])
            missing -= target.numel()
        if missing:
            raise UserError(f"{self.path}: the chunks of {key!r} do not cover the tensor.")
        return result

    def view(self, key: str, region: Sequence[slice] = ()) -> Tensor:
        """As `read`, but where one chunk holds the region, it is not copied: do not change it."""
        found = self._overlaps(key, region)
        if len(found.parts) == 1:
            chunk, _, source = found.parts[0]
            part = self._chunk(key, chunk)[source]
            if list(part.shape) == found.shape:
                return part
        return self.read(key, region)

    def _overlaps(self, key: str, region: Sequence[slice]) -> _Overlaps:
        shape = self.shape(key)
        everything = [slice(None)] * (len(shape) - len(region))
        wanted = [
            range(size)[part] for size, part in zip(shape, [*region, *everything], strict=True)
        ]
        parts = []
        for chunk in self._tensors[key].chunks:
            into, source = [], []
            for span, offset, size in zip(wanted, chunk.offsets, chunk.sizes, strict=True):
                start, stop = max(span.start, offset), min(span.stop, offset + size)
                if stop <= start:
                    break
                into.append(slice(start - span.start, stop - span.start))
                source.append(slice(start - offset, stop - offset))
            else:
                parts.append((chunk, tuple(into), tuple(source)))
        return _Overlaps([len(span) for span in wanted], parts)


class TorchDist(ChunkedTensors):
    """The tensors of a `torch_dist` checkpoint; its files are mapped, not loaded.

    Args:
        folder: With `.metadata` and the files that it names.

    Raises:
        UserError: No index there, or a damaged one.
    """

    def __init__(self, folder: Folder) -> None:
        tensors, self._records = _read_index(folder)
        super().__init__(folder.path, tensors)
        self._folder = folder
        self._files: dict[Path, MappedFile] = {}
        self._chunks: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def load_object(self, key: str) -> Any:
        """What is stored under a key and is no tensor; None: nothing.

        Raises:
            Exception: Of nearly any type, if the record is damaged or would run code.
        """
        record = self._records.get((key, ()))
        if record is None or key in self._tensors:
            return None
        place = self._folder.place(str(record.relative_path))
        return MappedFile(place.file).load(place.start + record.offset, record.length)

    def _chunk(self, key: str, chunk: Any) -> Tensor:
        where = (key, tuple(chunk.offsets))
        if where in self._chunks:
            return self._chunks[where]
        if where not in self._records:
            raise UserError(f"{self.path}: no record of {key!r} at offset {where[1]}.")
        record = self._records[where]
        name = str(record.relative_path)
        place = self._folder.place(name)
        try:
            if place.file not in self._files:
                self._files[place.file] = MappedFile(place.file)
            if record.offset + record.length > place.length:
                raise UserError("cut off")
            tensor = self._files[place.file].tensor(place.start + record.offset, record.length)
            if tensor.shape != chunk.sizes:
                raise UserError(f"not a tensor of shape {tuple(chunk.sizes)}")
        except Exception as error:  # as for the index
            raise UserError(
                f"{self.path / name}: record of {key!r} cannot be read ({error})."
            ) from error
        self._chunks[where] = tensor
        return tensor
