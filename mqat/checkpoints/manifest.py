"""The description beside a checkpoint (`mqat.json`) and the proof that its files are whole.

`mqat.json` is written last, inside a directory that is renamed into place afterwards, and lists
every file with its size and CRC-32: a checkpoint without it was never finished, and a truncated or
damaged file is found before a tensor is used or, by an export, before its directory appears.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, Literal

from mqat.errors import UserError

Checksums = Literal["all", "index", "data", "none"]
_DATA_SUFFIX = ".distcp"  # of Megatron's files with tensors
DESCRIPTION = "mqat.json"
FORMAT_VERSION = 1


def file_crc32(path: Path, stop: Event | None = None) -> str:
    """CRC-32 of a file's bytes, as eight hexadecimal digits; CancelledError once `stop` is set."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            if stop is not None and stop.is_set():
                raise CancelledError(f"{path}: not read to its end")
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
        raise UserError(f"{checkpoint}: no such file or directory.")
    if not file.is_file():
        raise UserError(
            f"{checkpoint}: not a complete mqat checkpoint ({DESCRIPTION} is missing; it is written "
            "last). Use another checkpoint of the run, or import the model again."
        )
    try:
        description = json.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: damaged ({error}); use another checkpoint.") from error
    if not isinstance(description, dict) or description.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{file}: expected format_version {FORMAT_VERSION}; update mqat.")
    return description


def check_files(
    checkpoint: Path,
    description: Mapping[str, Any],
    *,
    crc: Checksums = "all",
    stop: Event | None = None,
) -> None:
    """Compares every listed file with its recorded size, and some with their CRC-32.

    Args:
        checkpoint: Its directory.
        description: Parsed `mqat.json`.
        crc: Which files are read for it: `data` are those with tensors, `index` all others.
        stop: Makes the reading end soon, once it is set.

    Raises:
        ValueError: Names the first file that is missing, truncated or damaged.
        CancelledError: `stop` was set.
    """
    try:
        expected = {
            str(name): (entry["bytes"], entry["crc32"])
            for name, entry in description["files"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{checkpoint / DESCRIPTION}: damaged ({error!r}); use another checkpoint."
        ) from error
    for name, (expected_size, expected_crc) in expected.items():
        file = checkpoint / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected_size:
            found = "missing" if size is None else f"{size} bytes"
            raise UserError(
                f"{file}: {found}, expected {expected_size} bytes. The checkpoint is incomplete; "
                "copy it again or use an earlier one."
            )
        kind = "data" if name.endswith(_DATA_SUFFIX) else "index"
        if crc in ("all", kind) and file_crc32(file, stop) != expected_crc:
            raise UserError(
                f"{file}: contents do not match the checksum in {DESCRIPTION}. The checkpoint is "
                "damaged; copy it again or use an earlier one."
            )


@contextmanager
def checking_data(checkpoint: Path, description: Mapping[str, Any]) -> Iterator[None]:
    """Compares checksums of the files with tensors in a thread while the body reads these.

    Waits for the comparison at the end, also where the body failed: damage explains more than what it
    led to. An interrupt does not wait.

    Raises:
        ValueError: As `check_files`.
    """
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        check = pool.submit(check_files, checkpoint, description, crc="data", stop=stop)
        try:
            yield
        except Exception:
            check.result()
            raise
        except BaseException:
            stop.set()
            raise
        check.result()
