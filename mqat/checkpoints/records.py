"""What `torch.save` wrote, its tensors mapped instead of read, and no code of others run.

A record is an uncompressed zip archive with a pickle that says dtype, shape and strides of tensors, and
their bytes. The pickle is read by an unpickler that knows only those words; objects of training
frameworks (`_OTHERS`) become empty ones, and anything else is refused. The bytes stay in the page cache
until somebody copies a part of them.
"""

import argparse
import codecs
import io
import mmap
import pickle
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mqat.errors import UserError

_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


# Their objects stand beside weights, and none of them is needed.
_OTHERS = (
    "megatron", "nemo", "transformer_engine", "modelopt", "signal", "pathlib", "numpy", "datetime",
)  # fmt: skip


_PICKLE_BYTES = 1 << 26  # of real ones: up to some MB, as tensors stand beside them


class Foreign:
    """Stands for an object of another package, without what it held."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Takes whatever the object was made of."""

    def __setstate__(self, _: Any) -> None:
        """Takes whatever the object held."""


class MappedFile:
    """A checkpoint file; its tensors share memory with the page cache and must not be changed.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is empty.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # Private and copy-on-write: torch wants writable memory, the file stays as it is.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, start: int, length: int) -> Tensor:
        """The tensor of one record; as `load`."""
        found = self.load(start, length)
        if not isinstance(found, Tensor):
            raise UserError("not a tensor")
        return found

    def load(self, start: int, length: int) -> Any:
        """What one record holds: tensors, numbers, texts, in lists, dicts and `argparse.Namespace`.

        Args:
            start: First byte of the record.
            length: Its size in bytes.

        Raises:
            Exception: Of nearly any type, if the record is damaged.
        """
        archive = zipfile.ZipFile(_Window(self._map, start, length))
        names = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
        for name, info in names.items():
            if info.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{name} is compressed, which torch.save never does")
        if names["data.pkl"].file_size > _PICKLE_BYTES:
            raise UserError(f"data.pkl is larger than {_PICKLE_BYTES} bytes")
        if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
            raise UserError("written on a big-endian machine")

        def storage(key: str, dtype: torch.dtype) -> Tensor:
            info = names[f"data/{key}"]
            header = start + info.header_offset
            # Local header: 30 bytes, the lengths of name and extra field at 26 and 28.
            extra = sum(
                int.from_bytes(self._map[header + i : header + i + 2], "little") for i in (26, 28)
            )
            offset = header + 30 + extra
            if offset + info.file_size > start + length:
                raise UserError(f"storage {key} is cut off")
            count = info.file_size // dtype.itemsize
            if not count:
                return torch.empty(0, dtype=dtype)
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)

        return _PlainUnpickler(io.BytesIO(archive.read(names["data.pkl"])), storage).load()


class _Window(io.RawIOBase):
    """A part of a mapping as a file of its own, for `zipfile`."""

    def __init__(self, source: mmap.mmap, start: int, length: int) -> None:
        self._source, self._start, self._length, self._position = source, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        stop = self._length if size is None or size < 0 else self._position + size
        stop = max(min(stop, self._length), self._position)
        data = self._source[self._start + self._position : self._start + stop]
        self._position = stop
        return data


def _attribute(owner: Any, _: str) -> Foreign:
    """`getattr`: so Python 3.11.0 to 3.11.3 pickle members of enumerations."""
    if not (isinstance(owner, type) and issubclass(owner, Foreign)):
        raise pickle.UnpicklingError("getattr does not belong in a checkpoint")
    return Foreign()


# A pickle can set attributes of whatever it names. Those of these words, in C, cannot be set.
_WORDS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("_codecs", "encode"): codecs.encode,  # bytes, in the protocol of torch.save
    ("torch", "Size"): torch.Size,
}
# Those of these could; a pickle gets a subclass of its own.
_CLASSES: dict[tuple[str, str], type] = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): argparse.Namespace,
    ("_io", "BytesIO"): Foreign,  # Transformer Engine's extra state
}


class _PlainUnpickler(pickle.Unpickler):
    """Knows the words with which `torch.save` describes tensors, and plain containers of them."""

    def __init__(self, file: io.BytesIO, storage: Any) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _WORDS:
            return _WORDS[module, name]
        if (module, name) in _CLASSES:
            return type(name, (_CLASSES[module, name],), {})
        if (module, name) in _FUNCTIONS:
            return partial(_FUNCTIONS[module, name])
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split(".")[0] in _OTHERS:
            return type(name, (Foreign,), {})
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        return self._storage(key, dtype)


def _rebuild(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


def _rebuild_typed(
    storage: Tensor, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    return torch.as_strided(storage.view(dtype), size, stride, offset)


def _rebuild_parameter(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


# A pickle gets a `partial` of its own.
_FUNCTIONS: dict[tuple[str, str], Any] = {
    ("builtins", "getattr"): _attribute,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}
