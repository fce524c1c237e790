"""CUDA against the CPU: the same codes to the last bit, and a training step that is close."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mqat.kernels.device_check import fixed_results
from mqat.quant.algorithm import ALGORITHMS, named_scheme
from mqat.quant.qparams import compute_qparams, statistic_of
from tests.launch import ROOT

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def results():
    return tuple(fixed_results(torch.device(name)) for name in ("cpu", "cuda"))


@pytest.mark.parametrize(
    "operator",
    ["encode", "decode", "fake_quantize", "apply_mask", "accumulate", "int8 GEMM", "stochastic"],
)
def test_operators_give_the_same_bits_as_on_the_cpu(results, operator):
    on_cpu, on_cuda = results
    calls = [call for call in on_cpu if call.startswith(operator)]
    assert calls
    for call in calls:
        for expected, found in zip(on_cpu[call], on_cuda[call], strict=True):
            if expected.element_size() == 1:
                expected, found = expected.view(torch.uint8), found.view(torch.uint8)
            torch.testing.assert_close(
                found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m, c=call: f"{c}: {m}"
            )


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "null"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_scales_have_the_same_bits_as_on_the_cpu(algorithm, dtype):
    x = (torch.randn(96, 512, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    x[3, 5], x[4, 6] = torch.nan, torch.inf
    for scheme in named_scheme(algorithm).operands.values():
        found = []
        for device in ("cpu", "cuda"):
            statistic = statistic_of(x.to(device), scheme)
            above = torch.tensor([0.01], device=device) if scheme.has_global_scale else None
            found.append([statistic, *compute_qparams(statistic, scheme, above)])
        for expected, other in zip(*found, strict=True):
            assert (expected is None) == (other is None)
            if expected is not None:
                torch.testing.assert_close(other.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def step_on(device: str, algorithm: str, tmp_path) -> dict:
    out = tmp_path / f"{device}.pt"
    hidden = {"CUDA_VISIBLE_DEVICES": "-1"} if device == "cpu" else {}
    command = [sys.executable, "-m", "tests.gpu.step_worker", str(out), algorithm]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | hidden
    subprocess.run(command, env=environment, check=True, timeout=600)
    return torch.load(out)


@pytest.mark.parametrize("algorithm", ["null", "int8", "fp8", "int8_pc_pt", "int4", "nvfp4"])
def test_a_training_step_is_that_of_the_cpu_but_for_rounding(tmp_path, algorithm):
    expected, found = (step_on(device, algorithm, tmp_path) for device in ("cpu", "cuda"))
    assert (expected["device"], found["device"]) == ("cpu", "cuda")
    for name, scale in expected["scales"].items():
        torch.testing.assert_close(found["scales"][name], scale, rtol=1e-5, atol=0)
    # Sums in another order move single codes of later layers by one.
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    for name, gradient in expected["gradients"].items():
        error = (found["gradients"][name] - gradient).norm() / gradient.norm()
        assert float(error) < 5e-2, name
