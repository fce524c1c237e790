"""Where tests compute: `pytest --device {cpu,cuda}` for processes they start, `-m gpu` for their own.

Tests themselves stay on the CPU, GPUs hidden, so that their references are the same everywhere. With
`--device cuda` the processes that they start (`distributed/launch.py`) see the machine's GPUs again, and
train over NCCL. With `-m gpu` GPUs are not hidden: those tests compare CUDA with the CPU themselves.
"""

from __future__ import annotations

import os

import pytest
import torch

NO_CUDA = "no CUDA device; run on a GPU machine with `pytest -m gpu`"
# For pytest-xdist's workers, which inherit the environment: what was visible, and what was chosen.
_VISIBLE, _COUNT, _CHOICE = "MQAT_TESTS_VISIBLE", "MQAT_TESTS_GPUS", "MQAT_TESTS_DEVICE"
_HIDE = "CUDA_VISIBLE_DEVICES"


def choose(device: str, *, only_gpu_tests: bool) -> None:
    """Called once per process, before anything asks for GPUs."""
    if only_gpu_tests:
        return
    if _CHOICE not in os.environ:
        gpus = torch.cuda.device_count()
        if device == "cuda" and not gpus:
            raise pytest.UsageError(
                "--device cuda: torch sees no GPU here; leave the option out to run over gloo on CPU"
            )
        os.environ |= {_CHOICE: device, _COUNT: str(gpus), _VISIBLE: os.environ.get(_HIDE, "")}
    os.environ[_HIDE] = "-1"


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
