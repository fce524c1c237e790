"""One run at a time in a directory: a file names the process that has it."""

import atexit
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from mqat.errors import UserError
from mqat.files import write_whole

FILE = "run.lock"
_BEAT_SECONDS = 20.0
# A process of another machine cannot be asked; its file is touched as long as it lives.
_SILENT_SECONDS = 180.0


def lock_run_directory(directory: Path) -> None:
    """Takes the directory for this process until it ends; call on one rank only.

    Raises:
        UserError: A living process has it; names process, host and time.
    """
    path = directory / FILE
    directory.mkdir(parents=True, exist_ok=True)
    own = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }
    with _one_at_a_time(directory):
        if path.exists():
            _refuse_if_alive(path, own["host"])
        write_whole(path, json.dumps(own))
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, ended, own), daemon=True).start()
    atexit.register(_release, path, ended, own)


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Between looking at the file and writing it, where the file system has locks."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _refuse_if_alive(path: Path, host: object) -> None:
    try:
        text, touched = path.read_text("utf-8"), path.stat().st_mtime
    except FileNotFoundError:
        return  # given back meanwhile
    try:
        holder = json.loads(text)
        pid, started = int(holder["pid"]), float(holder["started"])
        is_here = holder["host"] == host
    except (ValueError, KeyError, TypeError):  # cut off while it was written
        holder, pid, started, is_here = {"host": "an unknown host"}, 0, touched, False
    if pid == os.getpid() and is_here:
        return  # an earlier run of this process
    silent = time.time() - touched
    if not (_is_alive(pid, started) if is_here else silent < _SILENT_SECONDS):
        return
    raise UserError(
        f"{path.parent}: process {pid} on {holder['host']} runs in this directory (last sign of life "
        f"{max(silent, 0):.0f} s ago). Wait for it or stop it, or choose another "
        f"exp_manager.exp_dir. If it is gone for certain, delete {path}."
    )


def _is_alive(pid: int, started: float) -> bool:
    """Whether the process lives, and is not another one with its number."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and (
            abs(process.create_time() - started) < 2.0
        )
    except psutil.NoSuchProcess:
        return False


def _beat(path: Path, ended: threading.Event, own: dict[str, object]) -> None:
    while not ended.wait(_BEAT_SECONDS):
        # An absent disk ends the run elsewhere, with its reason.
        with suppress(OSError, ValueError):
            if json.loads(path.read_text("utf-8")) == own:
                os.utime(path)


def _release(path: Path, ended: threading.Event, own: dict[str, object]) -> None:
    ended.set()
    try:
        if json.loads(path.read_text("utf-8")) == own:
            path.unlink()
    except (OSError, ValueError):
        return
