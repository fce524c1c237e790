"""The content of a `.qnemo` archive as a directory."""

import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mqat.errors import UserError


def _extract(archive: tarfile.TarFile, directory: Path) -> None:
    """Plain files and folders below `directory`; Python 3.11.2 has no `filter` that does this."""
    for member in archive:
        target = (directory / member.name).resolve()
        is_inside = target.is_relative_to(directory.resolve())
        if not is_inside or not (member.isfile() or member.isdir()):
            raise tarfile.TarError(f"{member.name} is no file or folder inside the archive")
        archive.extract(member, directory)


@contextmanager
def unpacked(export: Path) -> Iterator[Path]:
    """An export as a directory: itself, or a `.qnemo` archive's content for as long as it is used."""
    if not export.is_file():
        yield export
        return
    with tempfile.TemporaryDirectory(dir=export.parent, prefix=".mqat-") as temporary:
        try:
            with tarfile.open(export) as archive:
                _extract(archive, Path(temporary))
        except (tarfile.TarError, OSError, EOFError) as error:
            reason = next(iter(str(error).splitlines()), repr(error)).rstrip(":")
            raise UserError(f"{export}: not a .qnemo archive ({reason}).") from error
        yield Path(temporary)
