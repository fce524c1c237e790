"""Any slice of a dist-checkpoint tensor, without a process group, Megatron, or unpickling code.

A `torch_dist` checkpoint is an index (`.metadata`, a pickle) and files of concatenated `torch.save`
records, one per saved chunk. The index is read by an unpickler that knows only the index's own
classes; of the records (`records.py`) only what overlaps the request is touched.
"""

import enum
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mqat.checkpoints.manifest import DESCRIPTION, Checksums, check_files, read_description
from mqat.checkpoints.records import MappedFile
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import (
    Scheme,
    kv_cache_schemes,
    linear_schemes,
    scheme_from_dict,
    table_schemes,
)
from mqat.models.structure import TABLES, is_table_key, quantizer_key, split_name

# Data classes only: a module's other names would let an index call what the module imports.
_INDEX_CLASSES = {
    "pathlib": {"PosixPath"},  # where it was saved, if that was given as a Path
    "pathlib._local": {"PosixPath"},  # the same in Python 3.13
    "torch": {"Size"},
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
# Before the names of what is not the model's: the optimizer's state.
_TRAINING = "optimizer."


def _enum_member(owner: Any, name: str) -> Any:
    """`getattr` of an enumeration's members: so Python 3.11.0 to 3.11.3 pickle them."""
    if not (isinstance(owner, enum.EnumMeta) and name in owner.__members__):
        raise pickle.UnpicklingError(f"{owner}.{name} does not belong in a checkpoint index")
    return owner[name]


class _IndexUnpickler(pickle.Unpickler):
    """Refuses every class that is not part of a checkpoint index."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint index")
        return super().find_class(module, name)


def _read_index(file: Path) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Tensor metadata by key, and where each (key, offset) chunk is stored."""
    try:
        with file.open("rb") as handle:
            index = _IndexUnpickler(handle).load()
        tensors = {
            key: value
            for key, value in index.state_dict_metadata.items()
            if hasattr(value, "chunks")
        }
        records = {
            (where.fqn, tuple(where.offset)): info
            for where, info in index.storage_data.items()
            if where.offset is not None
        }
    except Exception as error:  # damaged pickles raise nearly anything
        raise UserError(f"{file}: not a checkpoint index ({error}).") from error
    return tensors, records


@dataclass(frozen=True)
class _Overlaps:
    """Shape of a region, and for each chunk that reaches into it: its place there, its own part."""

    shape: list[int]
    parts: list[tuple[Any, tuple[slice, ...], tuple[slice, ...]]]


class CheckpointReader:
    """Read-only view of a checkpoint; its files are mapped, not loaded.

    Attributes:
        description: Parsed `mqat.json`.
        model: Global sizes.
        layers: Global linear name -> scheme, quantized linears only.
        tables: Name of a quantized vocabulary table -> scheme.
        kv_cache: Global name of a core attention -> scheme of its cache.

    Args:
        path: Checkpoint directory.
        crc: Files whose checksums are compared too, as for `check_files`.

    Raises:
        ValueError: Incomplete, damaged, or not a checkpoint; names the file.
    """

    def __init__(self, path: Path, *, crc: Checksums = "all") -> None:
        self.path = path
        self.description = read_description(path)
        try:
            check_files(path, self.description, crc=crc)
            self.model = DecoderConfig.from_dict(self.description["model"])
            quantization = self.description["quantization"] or {"layers": {}}
            schemes = {
                name: scheme_from_dict(scheme) for name, scheme in quantization["layers"].items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path / DESCRIPTION}: damaged ({error!r}); use another checkpoint."
            ) from error
        self.layers, self.kv_cache = linear_schemes(schemes), kv_cache_schemes(schemes)
        self.tables = table_schemes(schemes)
        self._tensors, self._records = _read_index(path / ".metadata")
        self._files: dict[Path, MappedFile] = {}
        self._chunks: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        expected = self.model.checkpoint_shapes() | _scale_shapes(self.model, schemes)
        self._check_shapes(expected)
        self._check_strays(expected)

    def _check_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        for key, shape in expected.items():
            found = self.shape(key)
            is_table = is_table_key(key)
            padded = is_table and found[1:] == shape[1:] and found[0] >= shape[0]
            if found != shape and not padded:
                raise UserError(
                    f"{self.path}: tensor {key!r} has shape {found}, but the model described in "
                    f"{DESCRIPTION} needs {shape}; use another checkpoint."
                )

    def _check_strays(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses tensors that a model built from the description would be without."""
        named = {key for key in self._tensors if not key.startswith(_TRAINING)}
        strays = sorted(named - expected.keys())
        if strays:
            more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
            raise UserError(
                f"{self.path}: {', '.join(strays[:3])}{more} have no place in the model described in "
                f"{DESCRIPTION}, which would compute something else without them. Save it again with "
                "the description that mqat.describe_model gives."
            )

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

    def frozen(self, module: str, operand: str, tensor: str) -> Tensor:
        """Frozen quantizer state, whole; arguments as for `models.structure.quantizer_key`."""
        return self.read(quantizer_key(module, operand, tensor))

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

    def _chunk(self, key: str, chunk: Any) -> Tensor:
        name = (key, tuple(chunk.offsets))
        if name in self._chunks:
            return self._chunks[name]
        if name not in self._records:
            raise UserError(f"{self.path}: no record of {key!r} at offset {name[1]}.")
        record = self._records[name]
        file = self.path / record.relative_path
        try:
            if file not in self._files:
                self._files[file] = MappedFile(file)
            tensor = self._files[file].tensor(record.offset, record.length)
            if tensor.shape != chunk.sizes:
                raise UserError(f"not a tensor of shape {tuple(chunk.sizes)}")
        except Exception as error:  # as for the index
            raise UserError(f"{file}: record of {key!r} cannot be read ({error}).") from error
        self._chunks[name] = tensor
        return tensor


def _scale_shapes(
    model: DecoderConfig, schemes: Mapping[str, Scheme]
) -> dict[str, tuple[int, ...]]:
    """Shape of everything that the quantizers of a quantized checkpoint have frozen."""
    shapes = {}
    for name, scheme in schemes.items():
        for kind, operand in scheme.operands.items():
            weight = None
            if kind == "weight":
                table = (model.vocab_size, model.hidden_size)
                is_table = name in (table.name for table in TABLES)
                weight = table if is_table else model.linear_shape(split_name(name)[1])
            for part, shape in operand.frozen_shapes(weight).items():
                shapes[quantizer_key(name, kind, part)] = shape
    return shapes
