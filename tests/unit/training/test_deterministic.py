"""A step with torch's deterministic operations: it runs, and gives the same bits twice."""

import os

import pytest
import torch

from tests.unit.model_fixtures import microbatches


@pytest.fixture
def deterministic(monkeypatch):
    from mqat.runtime.groups import make_deterministic

    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        monkeypatch.setenv(name, "as it was")
        monkeypatch.delenv(name)
    before = torch.backends.cudnn.benchmark
    make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("algorithm", ["null", "int8"])
def test_a_step_runs_and_gives_the_same_bits(deterministic, calibrated, algorithm):
    from mqat.training.step import forward_backward

    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    chunks = calibrated(algorithm)
    found = []
    for _ in range(2):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        sums = forward_backward(chunks, microbatches())
        found.append(
            [torch.tensor(sums["loss"]), *(p.main_grad.clone() for p in chunks[0].parameters())]
        )
    assert all(map(torch.equal, *found))
