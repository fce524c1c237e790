from __future__ import annotations

import pytest

from tests import device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="what processes that tests start compute on: gloo on CPU, or NCCL on the GPUs",
    )


def pytest_configure(config: pytest.Config) -> None:
    device.choose(config.option.device, config.option.markexpr)


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = device.reason_to_skip() if item.get_closest_marker("gpu") else None
    if reason is not None:
        pytest.skip(reason)
