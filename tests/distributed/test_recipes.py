"""Calibration recipes give the same bits on every parallel layout: weights, norms and scales."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.recipes_worker import MODEL, RECIPES

WORKER = Path(__file__).with_name("recipes_worker.py")
ALONE = {"tp1": {}, "tp1-other-text": {"seed": 1}}
PAIRS = {"tp2-sp": {"tp": 2, "sp": True}, "pp2": {"pp": 2}, "dp2": {}}
MORE = {
    1: {"tp1-bf16": {"bf16": True}, "tp1-one-batch": {"batches": 1}},
    2: {
        "tp2": {"tp": 2}, "dp2-one-batch": {"batches": 1},
        "tp2-sp-bf16": {"tp": 2, "sp": True, "bf16": True},
    },
    4: {"tp4-sp": {"tp": 4, "sp": True}, "tp2-dp2": {"tp": 2}},
}  # fmt: skip


def run(root: Path, worlds: dict[int, dict[str, dict]]) -> None:
    """Every recipe on every layout, by number of processes."""
    for processes, layouts in worlds.items():
        file = root / f"{processes}.json"
        file.write_text(json.dumps(layouts))
        done = run_ranks(processes, WORKER, root, file, timeout=580)
        assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    run(root, {1: ALONE, 2: PAIRS})
    return root


@pytest.fixture(scope="module")
def more_results(results):
    run(results, MORE)
    return results


def tensors(root: Path, layout: str, recipe: str) -> dict[str, torch.Tensor]:
    """Every global tensor of the model and its quantizers."""
    return torch.load(root / layout / f"{recipe}.pt", weights_only=True)


def printed(root: Path, layout: str) -> dict:
    """What the worker measured, by recipe."""
    return json.loads((root / layout / "result.json").read_text())


def differences(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    """Keys of tensors that are not bit-equal."""
    assert first.keys() == second.keys()
    assert not any(bool(tensor.isnan().any()) for tensor in first.values())
    return {key for key in first if not torch.equal(first[key], second[key])}


def check(root: Path, layout: str, recipe: str) -> None:
    alike = [name for name in ("one-batch", "bf16") if layout.endswith(name)]
    reference = "-".join(["tp1", *alike])
    found, expected = (tensors(root, name, recipe) for name in (layout, reference))
    assert differences(found, expected) == set()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", PAIRS)
def test_weights_and_scales_are_bit_equal_on_every_layout(results, layout, recipe):
    check(results, layout, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", [name for layouts in MORE.values() for name in layouts])
def test_weights_and_scales_are_bit_equal_on_more_layouts(more_results, layout, recipe):
    check(more_results, layout, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_other_text_gives_other_scales(results, recipe):
    """Control: the comparison above can fail."""
    found = differences(tensors(results, "tp1", recipe), tensors(results, "tp1-other-text", recipe))
    assert any(key.endswith("_scale") for key in found)


def test_rescaling_keeps_the_function(results):
    for layout in ALONE | PAIRS:  # in bf16 folding rounds
        result = printed(results, layout)
        exact, free = result["smoothquant"], result["awq"]
        assert exact["prepared"] == pytest.approx(exact["unquantized"], rel=1e-6), layout
        assert free["prepared"] == pytest.approx(free["unquantized"], rel=1e-5), layout
        moved = result["gptq"]  # control: rounded weights are another function
        assert moved["prepared"] != pytest.approx(moved["unquantized"], rel=1e-5), layout


@pytest.mark.parametrize(("recipe", "block", "levels"), [("search", 256, 255), ("gptq", 32, 16)])
def test_gptq_leaves_weights_on_grid_points(results, recipe, block, levels):
    name = "decoder.layers.mlp.linear_fc2.weight"
    weight, plain = (tensors(results, "tp1", r)[name][0] for r in (recipe, "smoothquant"))
    assert max(group.unique().numel() for group in weight.view(-1, block)) <= levels
    assert plain.view(-1, block)[0].unique().numel() > levels  # control


@pytest.mark.parametrize("layout", ["tp2-sp", "dp2"])
def test_scales_cost_one_collective_for_each_statistic(results, layout):
    """Not one for each linear: maxima, and histograms where the method has them."""
    assert MODEL.num_layers > 1
    for recipe, (_, calibrator, _) in RECIPES.items():
        expected = 1 if calibrator == "max" else 2
        if recipe in ("awq", "gptq"):  # weights alone, all of them frozen as their recipe chose
            expected = 0
        assert printed(results, layout)[recipe]["collectives"] == expected, recipe
