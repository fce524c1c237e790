"""Starts scripts the way users do: as processes of their own, under torchrun."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from tests.device import environment

ROOT = Path(__file__).parents[1]


def torchrun(
    processes: int,
    script: Path | str,
    *arguments: object,
    timeout: float = 900,
    file_bytes: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a script, or a module by its dotted name, on `processes` ranks of a free port.

    A single one starts without torchrun, as on a laptop, which takes three seconds less. With
    `file_bytes`, writing a file beyond that size fails, as it does on a full disk.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    module = ["-m"] if isinstance(script, str) else []
    started = [*(launcher if processes > 1 else []), *module, str(script), *map(str, arguments)]
    return _run([sys.executable, *started], timeout, processes, file_bytes)


def mqat(*arguments: object, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Runs the `mqat` command."""
    return _run([sys.executable, "-m", "mqat.cli", *map(str, arguments)], timeout)


def _run(
    command: list[str], timeout: float, processes: int = 1, file_bytes: int | None = None
) -> subprocess.CompletedProcess[str]:
    variables = environment(processes) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def limit() -> None:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=variables, check=False,
        preexec_fn=limit,
    )  # fmt: skip
