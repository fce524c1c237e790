"""A directory that appears whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mqat.errors import UserError
from mqat.export import tar
from mqat.export.stream import TensorPlan, write_safetensors

PRODUCER_FILE = "producer.json"  # of directories without a `config.json`


def _is_export(target: Path, *, as_tar: bool) -> bool:
    """Whether mqat wrote this directory or archive: nothing else is ever replaced."""
    try:
        config = target / PRODUCER_FILE
        config = config if config.is_file() else target / "config.json"
        text = tar.read_text(target, config.name) if as_tar else config.read_text("utf-8")
        return bool(json.loads(text or "")["producer"]["name"] == "mqat")
    except (OSError, ValueError, KeyError, TypeError):
        return False


class AtomicDirectory:
    """Collects files under a temporary name beside the target; `commit` renames it into place.

    Several processes may write files between one process's `create` and `commit`.

    Args:
        target: Directory that will exist after `commit`.
        overwrite: Replace an existing export; otherwise that is an error.
        as_tar: The target is one file, an archive of the directory (`tar.py`).

    Raises:
        UserError: The target exists and must not be replaced.
    """

    def __init__(self, target: Path, *, overwrite: bool, as_tar: bool = False) -> None:
        self.target = Path(os.path.abspath(target))  # "." and "a/.." have no name to derive from
        self.temporary = self.target.with_name(f".{self.target.name}.tmp")
        self.as_tar = as_tar
        if not self.target.exists():
            return
        if not overwrite:
            raise UserError(
                f"{target} exists already; choose another directory, or allow overwriting it "
                "(--overwrite)."
            )
        is_empty = self.target.is_dir() and not any(self.target.iterdir())
        if (as_tar or not is_empty) and not _is_export(self.target, as_tar=as_tar):
            raise UserError(
                f"{target} exists and is not an export of mqat (its config.json does not name mqat as "
                "producer), so it is not overwritten; choose another directory."
            )

    def create(self) -> None:
        """Makes the empty temporary directory, removing what a killed run left."""
        self.discard()
        with _clear_errors(self.temporary):
            self.temporary.mkdir(parents=True)

    def write_tensors(
        self,
        name: str,
        plans: Sequence[TensorPlan],
        write: Callable[[Path, Sequence[TensorPlan]], None] = write_safetensors,
    ) -> None:
        """One file of tensors, a few of them at a time, flushed to disk."""
        path = self.temporary / name
        with _clear_errors(path):
            path.parent.mkdir(exist_ok=True)
            write(path, plans)
            _flush(path)

    def write_text(self, name: str, text: str | bytes) -> None:
        """One file of UTF-8 text, or of bytes, flushed to disk."""
        path = self.temporary / name
        with _clear_errors(path):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode() if isinstance(text, str) else text)
            _flush(path)

    def copy_tree(self, directory: Path) -> None:
        """Copies everything below a directory, if it exists."""
        for file in sorted(directory.rglob("*")):
            path = self.temporary / file.relative_to(directory)
            with _clear_errors(path):
                if file.is_dir():
                    path.mkdir()
                else:
                    shutil.copyfile(file, path)
                    _flush(path)

    def commit(self) -> None:
        """Makes the directory (or archive) visible, replacing an older one."""
        if self.as_tar:
            self._commit_tar()
            return
        with _clear_errors(self.target):
            shutil.rmtree(self._old, ignore_errors=True)
            _flush(self.temporary)
            if self.target.exists():
                self.target.rename(self._old)
            self.temporary.rename(self.target)
            _flush(self.target.parent)
        shutil.rmtree(self._old, ignore_errors=True)

    def _commit_tar(self) -> None:
        with _clear_errors(self._tar):
            tar.write_tar(self.temporary, self._tar)
            _flush(self._tar)
            self._tar.rename(self.target)
            _flush(self.target.parent)
        self.discard()

    @property
    def _tar(self) -> Path:
        return self.target.with_name(f".{self.target.name}.tar.tmp")

    @property
    def _old(self) -> Path:
        return self.target.with_name(f".{self.target.name}.old")

    def discard(self) -> None:
        """Removes everything written so far; an older export that was being replaced is there again."""
        if self._old.exists() and not self.target.exists():
            self._old.rename(self.target)
        shutil.rmtree(self.temporary, ignore_errors=True)
        self._tar.unlink(missing_ok=True)


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Turns a failure to write into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: writing failed ({error}); is the disk full?") from error


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
