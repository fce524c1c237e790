"""Files of a directory, or of a tar archive as they lie in it: nothing is unpacked, few bytes are read.

A member of an uncompressed archive is a range of bytes of the archive, so that tensors in it are mapped
like those of a directory. A compressed archive is first written out into a temporary file.
"""

from __future__ import annotations

import gzip
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from mqat.errors import UserError

_TEXT_BYTES = 1 << 28  # of one file that is read as a whole: an index, a configuration, a tokenizer
_GROWTH = 32  # a compressed archive that grows by more holds no weights


@dataclass(frozen=True)
class Place:
    """Bytes `start` to `start + length` of a file on disk."""

    file: Path
    start: int
    length: int


class Folder:
    """Read-only view of the files below a directory, or in an archive or a folder of it.

    Attributes:
        path: Of the directory, or of the archive; for messages.

    Args:
        path: A directory, or a `.tar` or `.tar.gz` file of any name.

    Raises:
        UserError: Not a complete archive, or a member is a link or device, has an absolute name or one
            that leaves the archive, or stands there twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._prefix = ""
        self._members: dict[str, Place] | None = None
        self._unpacked: IO[bytes] | None = None  # removed with this object
        if path.is_file():
            try:
                self._open_archive()
            except (tarfile.TarError, OSError, EOFError) as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise UserError(f"{path}: not a complete tar archive ({reason}).") from error

    def _open_archive(self) -> None:
        file = self.path
        with file.open("rb") as handle:
            is_compressed = handle.read(2) == b"\x1f\x8b"
        if is_compressed:
            self._unpacked = _gunzip(file)
            file = Path(self._unpacked.name)
        self._members = {}
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise tarfile.TarError(f"{member.name!r} leaves the archive")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise tarfile.TarError(f"{member.name!r} is no plain file")
                if str(name) in self._members:
                    raise tarfile.TarError(f"{member.name!r} is there twice")
                if member.offset_data + member.size > file.stat().st_size:
                    raise tarfile.TarError(f"{member.name!r} is cut off")
                self._members[str(name)] = Place(file, member.offset_data, member.size)

    def inside(self, name: str) -> Folder:
        """The folder of that name in this one."""
        found = Folder.__new__(Folder)
        found.path, found._unpacked = self.path, self._unpacked
        found._members, found._prefix = self._members, f"{self._prefix}{name}/"
        if self._members is None:
            found.path, found._prefix = self.path / name, ""
        return found

    def names(self) -> list[str]:
        """Files below this folder, by their path in it, sorted."""
        if self._members is not None:
            prefix = self._prefix
            return sorted(n.removeprefix(prefix) for n in self._members if n.startswith(prefix))
        return sorted(str(f.relative_to(self.path)) for f in self.path.rglob("*") if f.is_file())

    def has(self, name: str) -> bool:
        """Whether there is a file of that name, or a folder that is not empty."""
        if self._members is None:
            return (self.path / name).exists()
        full = self._prefix + name
        return full in self._members or any(n.startswith(f"{full}/") for n in self._members)

    def place(self, name: str) -> Place:
        """Where a file lies.

        Raises:
            UserError: There is none of that name.
        """
        if self._members is not None and self._prefix + name in self._members:
            return self._members[self._prefix + name]
        is_inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        if self._members is None and is_inside and (self.path / name).is_file():
            return Place(self.path / name, 0, (self.path / name).stat().st_size)
        raise UserError(f"{self.path}: {self._prefix}{name} is missing; the model is not complete.")

    def read(self, name: str) -> bytes:
        """A whole file, other than of tensors.

        Raises:
            UserError: There is none, or it is larger than such files are.
        """
        place = self.place(name)
        if place.length > _TEXT_BYTES:
            raise UserError(
                f"{self.path}: {self._prefix}{name} has {place.length} bytes; such a file has at most "
                f"{_TEXT_BYTES}."
            )
        with place.file.open("rb") as handle:
            handle.seek(place.start)
            return handle.read(place.length)


def _gunzip(path: Path) -> IO[bytes]:
    """The archive without its compression, in a file that disappears when it is closed."""
    most = max(path.stat().st_size * _GROWTH, 1 << 24)
    out = tempfile.NamedTemporaryFile(dir=path.parent, prefix=".mqat-", suffix=".tar")
    with gzip.open(path) as source:
        while block := source.read(1 << 22):
            out.write(block)
            if out.tell() > most:
                raise tarfile.TarError(f"unpacks to more than {_GROWTH} times its size")
    out.flush()
    return out


def copy_files(folder: Folder, names: Mapping[str, str], directory: Path) -> None:
    """Copies small files out of a folder: their name in it -> their name in `directory`."""
    for name, target in names.items():
        (directory / target).parent.mkdir(parents=True, exist_ok=True)
        (directory / target).write_bytes(folder.read(name))
