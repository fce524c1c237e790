"""The description beside a checkpoint (`mqat.json`) and the proof that its files are whole.

`mqat.json` is written last, inside a directory that is renamed into place afterwards, and lists
every file with its size and CRC-32: a checkpoint without it was never finished, and a truncated or
damaged file is found before a single tensor is used.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DESCRIPTION = "mqat.json"
FORMAT_VERSION = 1


def file_crc32(path: Path) -> str:
    """CRC-32 of a file's bytes, as eight hexadecimal digits."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def describe_files(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and CRC-32 of each named file."""
    return {
        name: {
            "bytes": (directory / name).stat().st_size,
            "crc32": file_crc32(directory / name),
        }
        for name in sorted(names)
    }


def read_description(checkpoint: Path) -> dict[str, Any]:
    """The parsed `mqat.json`.

    Raises:
        ValueError: It is missing (not a checkpoint, or one that was never finished), damaged, or of
            a newer format.
    """
    file = checkpoint / DESCRIPTION
    if not checkpoint.exists():
        raise ValueError(f"{checkpoint}: no such file or directory.")
    if not file.is_file():
        raise ValueError(
            f"{checkpoint}: not a complete mqat checkpoint ({DESCRIPTION} is missing; it is written "
            "last). Use another checkpoint of the run, or import the model again."
        )
    try:
        description = json.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: damaged ({error}); use another checkpoint.") from error
    if not isinstance(description, dict) or description.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{file}: expected format_version {FORMAT_VERSION}; update mqat.")
    return description


def check_files(checkpoint: Path, description: Mapping[str, Any], *, crc: bool = True) -> None:
    """Compares every listed file with its recorded size, and with its CRC-32 unless `crc` is off.

    Raises:
        ValueError: Names the first file that is missing, truncated or damaged.
    """
    for name, expected in description["files"].items():
        file = checkpoint / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"]:
            found = "missing" if size is None else f"{size} bytes"
            raise ValueError(
                f"{file}: {found}, expected {expected['bytes']} bytes. The checkpoint is incomplete; "
                "copy it again or use an earlier one."
            )
        if crc and file_crc32(file) != expected["crc32"]:
            raise ValueError(
                f"{file}: contents do not match the checksum in {DESCRIPTION}. The checkpoint is "
                "damaged; copy it again or use an earlier one."
            )


@contextmanager
def checking_contents(checkpoint: Path, description: Mapping[str, Any]) -> Iterator[None]:
    """Compares checksums in a thread while the body reads the files.

    Raises:
        ValueError: As `check_files`, at the end, also where the body failed: damage explains more.
    """
    with ThreadPoolExecutor(1) as pool:
        check = pool.submit(check_files, checkpoint, description)
        try:
            yield
        finally:
            check.result()
