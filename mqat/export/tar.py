"""A directory as one uncompressed archive, the same bytes for the same content, and texts out of it."""

import tarfile
from pathlib import Path


def write_tar(directory: Path, target: Path) -> None:
    """An archive whose members start with `./`."""

    def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mode = 0o755 if member.isdir() else 0o644
        return member

    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(directory, "./", recursive=False, filter=anonymous)
        for path in sorted(directory.rglob("*")):
            name = f"./{path.relative_to(directory)}"
            archive.add(path, name, recursive=False, filter=anonymous)


def read_text(path: Path, name: str) -> str | None:
    """A UTF-8 member `./name` of an archive that `write_tar` wrote; None: there is none."""
    try:
        with tarfile.open(path, "r:") as archive:
            file = archive.extractfile(f"./{name}")
            return None if file is None else file.read().decode("utf-8")
    except (tarfile.TarError, KeyError, UnicodeDecodeError):
        return None
