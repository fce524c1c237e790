"""Every algorithm in a real model: quantization is on, and it is the same on every layout."""

import json
from pathlib import Path

import pytest
import torch

from mqat.checkpoints.reader import CheckpointReader
from mqat.quant.algorithm import ALGORITHMS, named_scheme
from tests.distributed.ranks import run_ranks

WORKER = Path(__file__).with_name("schemes_worker.py")
QUANTIZED = [name for name in ALGORITHMS if name != "null"]
# Dynamic tokens, two levels, powers of two, zero points.
# Squares, quantized outputs and symmetric tokens besides (schemes_worker.COMPOSED).
COMPARED = ["nvfp4", "mxfp8", "fp8_pc_pt", "8da4w", "w_uint4_asym", "composed"]
CUT_TOKENS = ["fp8_pc_pt", "8da4w", "composed"]
LAYOUTS = {"tp2-sp": (2, ["--tp", "2", "--sp"]), "pp2": (2, ["--pp", "2"])}


def run(out: Path, processes: int, algorithms: list[str], *options: str) -> dict:
    out.mkdir(parents=True)
    done = run_ranks(processes, WORKER, out, *algorithms, *options, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Every algorithm on one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, run(out, 1, [*QUANTIZED, "composed"], "--guard")


@pytest.fixture(scope="module", params=LAYOUTS)
def elsewhere(request, tmp_path_factory):
    """Some algorithms on another layout."""
    processes, options = LAYOUTS[request.param]
    out = tmp_path_factory.mktemp(request.param) / "run"
    return out, run(out, processes, COMPARED, *options)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [*QUANTIZED, "composed"])
def test_weights_are_quantized_at_step_0_after_steps_and_after_resume(alone, algorithm):
    result = alone[1][algorithm]
    is_composed = algorithm == "composed"
    limit = 2 ** (8 if is_composed else named_scheme(algorithm).weight.format.bits)
    assert len(result["levels"]) == 3 and max(result["levels"]) <= limit
    assert result["raw_levels"] > limit  # control: the weights themselves are not on the grid
    assert result["resumed_alike"]
    assert result["quantized"] != result["unquantized"]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", COMPARED)
def test_losses_and_frozen_tensors_are_those_of_one_process(alone, elsewhere, algorithm):
    (root, expected), (other, found) = alone, elsewhere
    expected, found = expected[algorithm], found[algorithm]
    assert found["unquantized"] == pytest.approx(expected["unquantized"], rel=1e-6)
    # float32 sums in another order flip single codes, as in test_layouts.py
    assert found["quantized"] == pytest.approx(expected["quantized"], rel=1e-3)
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-3)
    first, second = (CheckpointReader(path / algorithm / "ptq") for path in (root, other))
    keys = [
        f"quantizers.{name}.{kind}_{part}"
        for name, scheme in first.layers.items()
        for kind, operand in scheme.operands.items()
        for part in operand.frozen_shapes((1, 1) if kind == "weight" else None)
    ]
    assert len(keys) >= len(first.layers)
    for key in keys:
        assert torch.equal(first.read(key), second.read(key)), key
    assert not torch.equal(first.read(keys[0]).amax(), first.read(keys[-1]).amax())  # control


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", CUT_TOKENS)
def test_tokens_cut_over_ranks_share_the_largest_of_their_maxima(alone, elsewhere, algorithm):
    expected, found = alone[1][algorithm]["quantized"], elsewhere[1][algorithm]
    error, without = (abs(found[key] - expected) for key in ("quantized", "unmerged"))
    if "tp2" in str(elsewhere[0]):
        assert without > 5 * error and without > 1e-5 * expected  # the reduction does the work
    else:
        assert found["unmerged"] == found["quantized"]  # nothing is cut
