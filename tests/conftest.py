from __future__ import annotations

import pytest
import torch

from tests import device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="what processes that tests start compute on: gloo on CPU, or NCCL on the GPUs",
    )


def pytest_configure(config: pytest.Config) -> None:
    device.choose(config.option.device, only_gpu_tests=config.option.markexpr == "gpu")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip(device.NO_CUDA)
