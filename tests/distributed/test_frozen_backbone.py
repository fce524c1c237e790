"""Gradients through a packed, frozen backbone do not depend on the layout."""

from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks

WORKER = Path(__file__).with_name("frozen_worker.py")


def gradients(out: Path, *options: str) -> dict[str, torch.Tensor]:
    done = run_ranks(int(options[0]), WORKER, out, *options)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return gradients(tmp_path_factory.mktemp("frozen") / "1.pt", "1")


@pytest.mark.parametrize("options", [("2",), ("2", "--sp")], ids=["tp2", "tp2-sp"])
def test_gradients_of_norms_are_those_of_one_process(alone, tmp_path, options):
    found = gradients(tmp_path / "2.pt", *options)
    assert found.keys() == alone.keys() and len(found) > 4
    for name, expected in alone.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6)
    first, last = (found[name] for name in list(found)[:2])
    assert not torch.allclose(first, last, rtol=1e-3, atol=1e-6)  # control
