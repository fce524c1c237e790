"""Calibration recipes give the same bits on every parallel layout: weights, norms and scales."""

import json
from pathlib import Path

import pytest
import torch

from mqat.export.slices import CheckpointReader
from tests.distributed.launch import torchrun
from tests.distributed.recipes_worker import MODEL, RECIPES

WORKER = Path(__file__).with_name("recipes_worker.py")
LAYOUTS = {
    1: {"tp1": {}, "tp1-other-text": {"seed": 1}, "tp1-one-batch": {"batches": 1}},
    2: {
        "tp2": {"tp": 2}, "tp2-sp": {"tp": 2, "sp": True}, "pp2": {"pp": 2}, "dp2": {},
        "dp2-one-batch": {"batches": 1},
    },
    4: {"tp4-sp": {"tp": 4, "sp": True}, "tp2-dp2": {"tp": 2}},
}  # fmt: skip
# Layout, the one that must give the same.
PAIRS = [
    ("tp2", "tp1"), ("tp2-sp", "tp1"), ("pp2", "tp1"), ("dp2", "tp1"), ("tp4-sp", "tp1"),
    ("tp2-dp2", "tp1"), ("dp2-one-batch", "tp1-one-batch"),
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Directory with a checkpoint for every layout and recipe, and what was printed."""
    root = tmp_path_factory.mktemp("recipes")
    for processes, layouts in LAYOUTS.items():
        file = root / f"{processes}.json"
        file.write_text(json.dumps(layouts))
        done = torchrun(processes, WORKER, root, file, timeout=580)
        assert done.returncode == 0, done.stderr[-4000:]
    names = [name for layouts in LAYOUTS.values() for name in layouts]
    return root, {name: json.loads((root / name / "result.json").read_text()) for name in names}


def differences(first: Path, second: Path) -> set[str]:
    """Keys of tensors that are not bit-equal."""
    one, two = CheckpointReader(first), CheckpointReader(second)
    assert one.keys() == two.keys()
    return {key for key in one.keys() if not torch.equal(one.read(key), two.read(key))}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("layout", "reference"), PAIRS)
def test_weights_and_scales_are_bit_equal_on_every_layout(results, layout, reference, recipe):
    root, _ = results
    assert differences(root / layout / recipe, root / reference / recipe) == set()


@pytest.mark.parametrize("recipe", RECIPES)
def test_other_text_gives_other_scales(results, recipe):
    """Control: the comparison above can fail."""
    root, _ = results
    found = differences(root / "tp1" / recipe, root / "tp1-other-text" / recipe)
    assert any(key.endswith("_scale") for key in found)


def test_rescaling_keeps_the_function(results):
    _, printed = results
    for layout, result in printed.items():
        exact, free = result["smoothquant"], result["awq"]
        assert exact["prepared"] == pytest.approx(exact["unquantized"], rel=1e-6), layout
        assert free["prepared"] == pytest.approx(free["unquantized"], rel=1e-5), layout
        moved = result["gptq"]  # control: rounded weights are another function
        assert moved["prepared"] != pytest.approx(moved["unquantized"], rel=1e-5), layout


@pytest.mark.parametrize("recipe", ["search", "gptq", "levels"])
def test_weights_on_grid_points_stay_where_they_are(results, recipe):
    """Scales are frozen before GPTQ rounds: quantizing its weights again changes nothing."""
    root, _ = results
    reader = CheckpointReader(root / "tp1" / recipe)
    limit = 2 ** reader.layers["decoder.layers.0.mlp.linear_fc2"].weight.format.bits
    rows = reader.read("decoder.layers.mlp.linear_fc2.weight", (slice(0, 1),))[0, :4]
    groups = rows if recipe == "search" else rows[:, : 16 if recipe == "levels" else 32]
    assert all(row.unique().numel() <= limit for row in groups)
    plain = CheckpointReader(root / "tp1" / "tensor")
    row = plain.read("decoder.layers.mlp.linear_fc2.weight", (slice(0, 1),))[0, 0]
    assert row[:32].unique().numel() > 16  # control


@pytest.mark.parametrize("layout", ["tp2", "dp2", "tp2-dp2"])
def test_scales_cost_one_collective_for_each_statistic(results, layout):
    """Not one for each linear: maxima, and histograms where the method has them."""
    _, printed = results
    assert MODEL.num_layers > 1
    for recipe, (_, calibrator, _) in RECIPES.items():
        expected = 1 if calibrator == "max" else 2
        assert printed[layout][recipe]["collectives"] == expected, recipe
