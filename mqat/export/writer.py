"""A directory that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

# Waits for all processes; if any passes an error, all raise it (`runtime.groups.agree`).
Agree = Callable[[Exception | None], None]


def raise_alone(error: Exception | None) -> None:
    """The agreement of a single process."""
    if error is not None:
        raise error


class AtomicDirectory:
    """Collects files under a temporary name; `commit` renames it into place.

    Args:
        target: Directory that will exist after `commit`.
        overwrite: Replace an existing target; otherwise that is an error.
        rank: Process that shares the work; rank 0 creates and renames.
        agree: Waits for all processes, and spreads an error of any of them.

    Raises:
        ValueError: The target exists and must not be replaced.
    """

    def __init__(
        self, target: Path, *, overwrite: bool, rank: int = 0, agree: Agree = raise_alone
    ) -> None:
        self.target = target
        self.temporary = target.with_name(f".{target.name}.tmp")
        self.rank = rank
        self.agree = agree
        if target.exists() and not overwrite:
            raise ValueError(
                f"{target} exists already; choose another directory, or allow overwriting it."
            )
        error: Exception | None = None
        if rank == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)  # what a killed run left
            try:
                self.temporary.mkdir(parents=True)
            except OSError as caught:
                error = ValueError(f"{self.temporary}: cannot be created: {caught.strerror}.")
        agree(error)

    def write_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """One safetensors file, flushed to disk."""
        path = self.temporary / name
        try:
            save_file(tensors, str(path), metadata={"format": "pt"})
            _flush(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: writing failed ({error}); is the disk full?") from error

    def write_text(self, name: str, text: str) -> None:
        """One UTF-8 text file, flushed to disk."""
        path = self.temporary / name
        try:
            path.write_text(text, encoding="utf-8")
            _flush(path)
        except OSError as error:
            raise ValueError(f"{path}: writing failed ({error}); is the disk full?") from error

    def copy_from(self, directory: Path) -> None:
        """Copies the files of a flat directory, if it exists."""
        if directory.is_dir():
            for file in sorted(directory.iterdir()):
                shutil.copyfile(file, self.temporary / file.name)

    def commit(self) -> None:
        """Makes the directory visible, replacing an older one; every process must have written."""
        if self.rank == 0:
            old = self.target.with_name(f".{self.target.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            if self.target.exists():
                self.target.rename(old)
            self.temporary.rename(self.target)
            shutil.rmtree(old, ignore_errors=True)
        self.agree(None)

    def discard(self) -> None:
        """Removes everything written so far."""
        if self.rank == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
