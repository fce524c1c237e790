"""Runs a worker's `main` on ranks that are forked from a process which has imported everything already.

Importing torch and Megatron-Core takes a rank some ten seconds of CPU time, most of what a small test
takes. Tests of what users start use `tests.launch.torchrun` instead, which starts from nothing.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.device import environment

_RANKS = multiprocessing.get_context("forkserver")
_RANKS.set_forkserver_preload(
    [
        "torch", "transformers", "megatron.core.dist_checkpointing", "mqat.training.recipes",
        "mqat.checkpoints.training_checkpoints", "tests.distributed.worker",
    ]
)  # fmt: skip


def run_ranks(
    processes: int, worker: Path, *arguments: object, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """Runs `main` of a worker in this directory on `processes` ranks, as torchrun would.

    One that fails ends the others. Returns the first failure's status (or 0) and all that was printed.
    """
    variables = environment(processes) | {
        "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        started = [
            _RANKS.Process(
                target=_run_rank,
                args=(rank, worker.stem, list(map(str, arguments)), variables, folder),
            )
            for rank in range(processes)
        ]
        for process in started:
            process.start()
        status = _wait_for(started, time.monotonic() + timeout)
        printed = [
            "".join(Path(folder, f"{rank}.{name}").read_text("utf-8") for rank in range(processes))
            for name in ("out", "err")
        ]
    return subprocess.CompletedProcess([worker.stem, *map(str, arguments)], status, *printed)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_for(started: list, deadline: float) -> int:
    running = {process.sentinel: process for process in started}
    status = 0
    while running and not status:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        status = 0 if ended else 124  # out of time
        for sentinel in ended:
            status = status or running.pop(sentinel).exitcode
    for process in running.values():
        process.kill()
    for process in started:
        process.join()
        process.close()
    return status


def _run_rank(
    rank: int, worker: str, arguments: list[str], variables: dict[str, str], folder: str
) -> None:
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        file = os.open(Path(folder, f"{rank}.{name}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream.fileno())
    os.environ.clear()
    os.environ |= variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    import torch

    from mqat.runtime.groups import command_line

    torch.set_num_threads(1)
    sys.argv = [worker, *arguments]
    with command_line():
        importlib.import_module(f"tests.distributed.{worker}").main()
