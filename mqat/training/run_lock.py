"""One run at a time in a directory: a file names the process that has it."""

import atexit
import json
import os
import socket
import threading
import time
from pathlib import Path

import psutil

from mqat.errors import UserError

FILE = "run.lock"
_BEAT_SECONDS = 60.0
# A process of another machine cannot be asked; its file is touched as long as it lives.
_SILENT_SECONDS = 600.0


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
    while True:
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(own, file)
            break
        except FileExistsError:
            _refuse_if_alive(path, own["host"])
            path.unlink(missing_ok=True)
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, ended), daemon=True).start()
    atexit.register(_release, path, ended, own)


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


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT_SECONDS):
        try:
            os.utime(path)
        except OSError:  # a full or absent disk ends the run elsewhere, with its reason
            continue


def _release(path: Path, ended: threading.Event, own: dict[str, object]) -> None:
    ended.set()
    try:
        if json.loads(path.read_text("utf-8")) == own:
            path.unlink()
    except (OSError, ValueError):
        return
