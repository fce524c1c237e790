"""Where tests compute: `pytest --device {cpu,cuda}` for processes they start, `-m gpu` for their own.

Tests themselves stay on the CPU, GPUs hidden, so that their references are the same everywhere. With
`--device cuda` the processes that they start (`distributed/launch.py`) see the machine's GPUs again, and
train over NCCL. With `-m gpu`, also as `-m "gpu and ..."`, GPUs are not hidden: those tests compare CUDA
with the CPU themselves. Elsewhere they are skipped (`reason_to_skip`).
"""

from __future__ import annotations

import os
import re

import pytest
import torch

NO_CUDA = "no CUDA device here; run `pytest -m gpu` on a GPU machine"
HIDDEN = "this machine's GPUs are hidden from tests of the CPU; run `pytest -m gpu`"
# For pytest-xdist's workers, which inherit the environment: what was visible, and what was chosen.
_VISIBLE, _COUNT, _CHOICE = "MQAT_TESTS_VISIBLE", "MQAT_TESTS_GPUS", "MQAT_TESTS_DEVICE"
_HIDE = "CUDA_VISIBLE_DEVICES"


def selects_only_gpu_tests(markers: str) -> bool:
    """Whether an expression given to `-m` is `gpu`, or `gpu` and more."""
    return "or" not in markers.split() and "gpu" in re.split(r"\s+and\s+", markers.strip())


def choose(device: str, markers: str) -> None:
    """Called once per process with the options `--device` and `-m`, before anything asks for GPUs."""
    if selects_only_gpu_tests(markers):
        return
    if _CHOICE not in os.environ:
        gpus = torch.cuda.device_count()
        if device == "cuda" and not gpus:
            raise pytest.UsageError(
                "--device cuda: torch sees no GPU here; leave the option out to run over gloo on CPU"
            )
        os.environ |= {_CHOICE: device, _COUNT: str(gpus), _VISIBLE: os.environ.get(_HIDE, "")}
    os.environ[_HIDE] = "-1"


def reason_to_skip() -> str | None:
    """Why tests marked `gpu` cannot run in this process; None: they can."""
    if torch.cuda.is_available():
        return None
    return HIDDEN if int(os.environ.get(_COUNT, "0")) else NO_CUDA


def environment(processes: int) -> dict[str, str]:
    """Of processes that a test starts; skips the test where each would need a GPU of its own."""
    found = dict(os.environ)
    if os.environ.get(_CHOICE) != "cuda":
        return found
    gpus = int(os.environ[_COUNT])
    if processes > gpus:
        pytest.skip(f"{processes} processes over NCCL need as many GPUs; there are {gpus}")
    del found[_HIDE]
    return found | ({_HIDE: os.environ[_VISIBLE]} if os.environ[_VISIBLE] else {})
