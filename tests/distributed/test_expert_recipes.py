"""Recipes of experts give the same bits on every layout, with experts that see no token or a few."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.recipes_worker import EXPERT_RECIPES
from tests.distributed.test_recipes import WORKER, differences, printed, run, tensors

ALONE = {"ep1": {}, "ep1-other-text": {"seed": 1}}
PAIRS = {"ep2": {"ep": 2}, "tp2-sp": {"tp": 2, "sp": True}, "pp2": {"pp": 2}, "dp2": {}}
MORE = {"tp2-sp-ep2": {"tp": 2, "sp": True, "ep": 2}, "ep2-pp2": {"ep": 2, "pp": 2}}
IDLE = [
    f"decoder.layers.{expert}.linear_fc{n}" for expert in ("0.mlp.experts.3", "1.mlp.experts.0")
    for n in (1, 2)
]  # fmt: skip

pytestmark = pytest.mark.timeout(1500)


def of_experts(layouts):
    return {name: layout | {"experts": True} for name, layout in layouts.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("expert_recipes")
    run(root, {1: of_experts(ALONE), 2: of_experts(PAIRS)})
    return root


@pytest.fixture(scope="module")
def more_results(results):
    run(results, {4: of_experts(MORE)})
    return results


def check(root: Path, layout: str, recipe: str) -> None:
    found, expected = (tensors(root, name, recipe) for name in (layout, "ep1"))
    assert differences(found, expected) == set()
    assert printed(root, layout)[recipe]["idle"] == IDLE


@pytest.mark.parametrize("recipe", EXPERT_RECIPES)
@pytest.mark.parametrize("layout", PAIRS)
def test_weights_routers_and_scales_are_bit_equal_on_every_layout(results, layout, recipe):
    check(results, layout, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", EXPERT_RECIPES)
@pytest.mark.parametrize("layout", MORE)
def test_weights_routers_and_scales_are_bit_equal_on_more_layouts(more_results, layout, recipe):
    check(more_results, layout, recipe)


@pytest.mark.parametrize("recipe", EXPERT_RECIPES)
def test_other_text_gives_other_weights_and_scales(results, recipe):
    """Control: the comparison above can fail."""
    found = differences(tensors(results, "ep1", recipe), tensors(results, "ep1-other-text", recipe))
    assert any("experts" in key and key.endswith("_scale") for key in found)
    moved = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert moved in found or recipe == "smoothquant"  # whose factors are powers of two


@pytest.mark.parametrize("recipe", ["awq-gptq", "gptq"])
def test_an_expert_with_a_few_tokens_is_rounded_without_them(results, recipe):
    first, second = (tensors(results, name, recipe) for name in ("ep1", "ep1-other-text"))
    weight = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    for number in range(4):  # control: what the others saw moved them
        assert torch.equal(first[weight][1, number], second[weight][1, number]) == (number == 0)
    scale = "quantizers.decoder.layers.1.mlp.experts.{}.linear_fc2.{}_scale".format
    assert torch.equal(first[scale(0, "weight")], second[scale(0, "weight")])
    if recipe == "gptq":
        rare, *others = (first[scale(number, "input")] for number in range(4))
        assert torch.equal(rare, torch.stack(others).amax(dim=0))


def test_factors_of_one_ranks_experts_alone_would_be_noticed(results, tmp_path):
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps({"unmerged": {"experts": True, "ep": 2, "unmerged": True}}))
    done = run_ranks(2, WORKER, tmp_path, file, timeout=580)
    assert done.returncode != 0
    assert "pre_mlp_layernorm.weight: ranks disagree" in done.stderr


def test_rescaling_keeps_the_function(results):
    for layout in ALONE | PAIRS:
        result = printed(results, layout)
        exact = result["smoothquant"]
        assert exact["prepared"] == pytest.approx(exact["unquantized"], rel=1e-6), layout
        for name in ("awq-gptq", "gptq"):  # control: rounded weights are another function
            rounded = result[name]
            assert rounded["prepared"] != pytest.approx(rounded["unquantized"], rel=1e-6), layout


def test_the_router_takes_up_what_the_norm_gives(results):
    smoothed, plain = (tensors(results, "ep1", recipe) for recipe in ("smoothquant", "gptq"))
    norm, router = "decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.router.weight"
    factors = plain[norm] / smoothed[norm]
    assert len(factors.unique()) > 1
    assert torch.equal(smoothed[router], plain[router] * factors[:, None])
