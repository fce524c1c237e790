"""Tensors inside checkpoint files, mapped instead of read.

A record is what `torch.save` writes for one tensor: an uncompressed zip archive with a pickle that
says dtype, shape and strides, and the bytes. The pickle is read by an unpickler that knows only those
words; the bytes stay in the page cache until somebody copies a part of them.
"""

import io
import mmap
import pickle
import zipfile
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
        """The tensor of one record.

        Args:
            start: First byte of the record.
            length: Its size in bytes.

        Raises:
            Exception: Of nearly any type, if the record is damaged.
        """
        archive = zipfile.ZipFile(_Window(self._map, start, length))
        names = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
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
            if info.compress_type != zipfile.ZIP_STORED or offset + info.file_size > start + length:
                raise UserError(f"storage {key} is compressed or cut off")
            count = info.file_size // dtype.itemsize
            if not count:
                return torch.empty(0, dtype=dtype)
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)

        found = _TensorUnpickler(io.BytesIO(archive.read(names["data.pkl"])), storage).load()
        if not isinstance(found, Tensor):
            raise UserError("not a tensor")
        return found


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


class _TensorUnpickler(pickle.Unpickler):
    """Knows the words with which `torch.save` describes one tensor."""

    def __init__(self, file: io.BytesIO, storage: Any) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return dict  # backward hooks, always empty
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return _rebuild_typed
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a tensor")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        return self._storage(key, dtype)


def _rebuild(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


def _rebuild_typed(
    storage: Tensor, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    return torch.as_strided(storage.view(dtype), size, stride, offset)
