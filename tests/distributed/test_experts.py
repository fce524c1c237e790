"""A mixture of experts on every parallel layout: losses, gradients, scales, resumed training."""

from pathlib import Path

import pytest
import torch

from mqat.checkpoints.reader import CheckpointReader
from tests.distributed.ranks import run_ranks
from tests.distributed.test_layouts import run
from tests.unit.checkpoints.test_experts import random_model

FAMILIES_WORKER = Path(__file__).with_name("families_worker.py")
HF_LAYOUTS = {
    "TP 2 + SP": ["--tp", "2", "--sp"],
    "EP 2": ["--ep", "2"],
    "TP 2": ["--tp", "2"],
    "PP 2": ["--pp", "2"],
}

pytestmark = pytest.mark.timeout(1500)
IDLE = [f"decoder.layers.0.mlp.experts.3.linear_fc{n}" for n in (1, 2)]
LAYOUTS = {
    "ep1": (1, []),
    "ep2": (2, ["--ep", "2"]),
    "tp2-sp": (2, ["--tp", "2", "--sp"]),
    "pp2": (2, ["--pp", "2"]),
}
LARGER = {
    "tp2-sp-ep2": (4, ["--tp", "2", "--sp", "--ep", "2"]),
    "ep2-etp1": (4, ["--tp", "2", "--sp", "--ep", "2", "--etp", "1"]),
    "ep2-pp2": (4, ["--pp", "2", "--ep", "2"]),
    "ep2-cp2": (4, ["--cp", "2", "--ep", "2"]),
}
OTHERS = {
    "idle": (1, ["--idle", "--ptq"]),
    "idle-ep2": (2, ["--idle", "--ep", "2"]),
    "ep1-unreduced": (2, ["--unreduced", "--ptq"]),
}
LEARNED = {
    "learned": (1, ["--learned"]),
    "learned-ep2": (2, ["--learned", "--ep", "2"]),
    "learned-tp2-sp": (2, ["--learned", "--tp", "2", "--sp"]),
}
# Layout that saved, layout that resumes: with one optimizer, and with one more for experts.
RESUMED = [("ep1", "ep2"), ("ep2", "ep1"), ("tp2-sp", "ep2")]


def with_model(jobs, model="experts"):
    return {name: (count, ["--model", model, *options]) for name, (count, options) in jobs.items()}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    return run(tmp_path_factory.mktemp("experts"), with_model(LAYOUTS | OTHERS))


@pytest.fixture(scope="module")
def larger(layouts, tmp_path_factory):
    return layouts | run(tmp_path_factory.mktemp("larger"), with_model(LARGER))


@pytest.fixture(scope="module")
def resumed(layouts, tmp_path_factory):
    jobs = {
        f"{saved}-{layout}": (
            LAYOUTS[layout][0], [*LAYOUTS[layout][1], "--resume", str(layouts[saved][0] / "qat")]
        )
        for saved, layout in RESUMED
    }  # fmt: skip
    return run(tmp_path_factory.mktemp("resumed"), with_model(jobs))


def assert_alike(layouts, name):
    """Losses and gradients within rounding; every tensor of the calibrated model to the bit."""
    (first, expected), (second, found) = layouts["ep1"], layouts[name]
    assert found["unquantized"] == pytest.approx(expected["unquantized"], rel=1e-6)
    assert found["quantized"] == pytest.approx(expected["quantized"], rel=1e-3)
    # Flipped codes move some scores; a token on the border between two experts goes to the other.
    assert found["losses"] == pytest.approx(expected["losses"], rel=5e-3)
    assert found["grad_norms"][0] == pytest.approx(expected["grad_norms"][0], rel=2e-2)
    assert found["resumed_alike"] and found["idle"] == []
    assert_same_scales(first, second)


def assert_same_scales(first, second):
    one, other = (CheckpointReader(path / "ptq") for path in (first, second))
    assert set(one.keys()) == set(other.keys())
    for key in one.keys():
        assert torch.equal(one.read(key), other.read(key)), key


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_a_mixture_is_the_same_on_every_layout(layouts, name):
    assert_alike(layouts, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_expert_parallelism_changes_nothing_with_any_other(larger, name):
    assert_alike(larger, name)


@pytest.mark.parametrize("name", [*list(LAYOUTS)[1:], "idle-ep2"])
def test_the_quality_report_of_experts_is_the_same(layouts, name):
    (_, expected), (_, found) = (layouts[n] for n in ("idle" if "idle" in name else "ep1", name))
    assert [e["name"] for e in found["quality"]] == [e["name"] for e in expected["quality"]]
    for entry, same in zip(expected["quality"], found["quality"], strict=True):
        assert same.get("is_idle") == entry.get("is_idle")
        assert entry.get("is_idle", False) == (entry["name"] in expected["idle"])
        if entry.get("is_idle"):
            continue
        assert same["output_sqnr_db"] == pytest.approx(entry["output_sqnr_db"], abs=0.05)
        assert same["weight"]["sqnr_db"] == pytest.approx(entry["weight"]["sqnr_db"], rel=1e-9)
        assert same["input_amax"] == pytest.approx(entry["input_amax"], rel=1e-2)
    figures = [e["output_sqnr_db"] for e in expected["quality"] if "fc2" in e["name"]]
    assert max(filter(None, figures)) - min(filter(None, figures)) > 0.2  # control: they differ


def test_each_expert_has_scales_of_its_own(layouts):
    checkpoint = CheckpointReader(layouts["ep1"][0] / "ptq")
    for operand in ("input", "weight"):
        names = [f"decoder.layers.1.mlp.experts.{n}.linear_fc2" for n in range(4)]
        found = [checkpoint.frozen(name, operand, "scale") for name in names]
        assert not all(torch.equal(found[0], scale) for scale in found[1:])


def test_scales_without_the_other_ranks_tokens_would_be_noticed(layouts):
    with pytest.raises(AssertionError, match=r"experts.*input_scale"):
        assert_same_scales(layouts["ep1"][0], layouts["ep1-unreduced"][0])


def test_an_expert_without_tokens_is_reported_and_calibrated_alike(layouts):
    (first, alone), (second, shared) = layouts["idle"], layouts["idle-ep2"]
    assert alone["idle"] == shared["idle"] == IDLE
    assert_same_scales(first, second)
    checkpoint = CheckpointReader(first / "ptq")
    for kind in ("linear_fc1", "linear_fc2"):
        *others, own = [
            checkpoint.frozen(f"decoder.layers.0.mlp.experts.{n}.{kind}", "input", "scale")
            for n in range(4)
        ]
        assert torch.equal(own, torch.stack(others).amax(dim=0))
    assert shared["resumed_alike"] and shared["losses"][1] < shared["losses"][0]


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "layout"), RESUMED)
def test_training_goes_on_at_another_expert_parallel_size(layouts, resumed, saved, layout):
    expected, found = layouts[saved][1], resumed[f"{saved}-{layout}"][1]
    assert found["losses"] == pytest.approx(expected["ahead"], rel=2e-3)
    assert found["losses"] != pytest.approx(expected["losses"], rel=2e-3)  # control: it went on


@pytest.fixture(scope="module")
def corrected(tmp_path_factory):
    jobs = LAYOUTS | {"ep1-unreduced": OTHERS["ep1-unreduced"]}
    return run(tmp_path_factory.mktemp("corrected"), with_model(jobs, "corrected"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    jobs = LAYOUTS | {"tp2-sp-ep2": LARGER["tp2-sp-ep2"]}
    return run(tmp_path_factory.mktemp("shared"), with_model(jobs, "shared"))


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_corrected_routers_and_dense_layers_are_the_same_on_every_layout(corrected, name):
    assert_alike(corrected, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*list(LAYOUTS)[1:], "tp2-sp-ep2"])
def test_shared_experts_behind_a_gate_are_the_same_on_every_layout(shared, name):
    assert_alike(shared, name)


def test_scales_of_shared_experts_without_the_other_ranks_tokens_would_be_noticed(corrected):
    one, other = (CheckpointReader(corrected[n][0] / "ptq") for n in ("ep1", "ep1-unreduced"))
    name = "decoder.layers.1.mlp.shared_experts.linear_fc2"
    assert one.layers[name] == other.layers[name]
    scales = [reader.frozen(name, "input", "scale") for reader in (one, other)]
    assert not torch.equal(*scales)


def test_the_correction_of_a_router_stays_as_it_is_in_training(corrected):
    key = "decoder.layers.1.mlp.router.expert_bias"
    for name in LAYOUTS:
        before, after = (CheckpointReader(corrected[name][0] / n) for n in ("ptq", "qat"))
        assert torch.equal(before.read(key), after.read(key)) and bool(before.read(key).any())
        weights = [r.read("decoder.layers.1.mlp.router.weight") for r in (before, after)]
        assert not torch.equal(*weights)  # control: the router itself was trained


@pytest.fixture(scope="module")
def learned(layouts, tmp_path_factory):
    return layouts | run(tmp_path_factory.mktemp("learned"), with_model(LEARNED))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learned-ep2", "learned-tp2-sp"])
def test_scales_of_experts_learn_alike(learned, name):
    (first, expected), (second, found) = learned["learned"], learned[name]
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-3)
    assert found["grad_norms"][0] == pytest.approx(expected["grad_norms"][0], rel=2e-2)
    assert found["resumed_alike"]
    one, other, start = (
        CheckpointReader(path) for path in (first / "qat", second / "qat", first / "ptq")
    )
    for number in range(4):
        # Of a single number, Adam's second step is a coin toss where codes have flipped over TP.
        for operand in ("weight",) if "tp2" in name else ("weight", "input"):
            linear = f"decoder.layers.1.mlp.experts.{number}.linear_fc1"
            trained, again, before = (
                c.frozen(linear, operand, "scale") for c in (one, other, start)
            )
            moved, apart = (trained - before).abs(), (again - trained).abs()
            assert float(moved.median()) > 1e-6  # control: they learned
            # Adam moves a scale whose gradient is near zero to either side.
            assert float((apart < 0.1 * moved).float().mean()) > 0.8, (linear, operand)


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
    """Directories of transformers, and its logits for 24 tokens of each."""
    root, expected = tmp_path_factory.mktemp("models"), {}
    tokens = torch.randint(0, 301, (2, 24), generator=torch.Generator().manual_seed(1))
    for name in ("mixtral", "qwen3_moe", "qwen2_moe", "glm4_moe"):
        model = random_model(name)
        model.save_pretrained(root / name)
        torch.save(tokens, root / name / "tokens.pt")
        with torch.no_grad():
            expected[name] = model(tokens).logits
    return root, expected


@pytest.mark.parametrize(
    "layout",
    [n if n == "EP 2" else pytest.param(n, marks=pytest.mark.slow) for n in HF_LAYOUTS],
)
def test_logits_are_those_of_transformers_on_every_layout(huggingface, tmp_path, layout):
    root, expected = huggingface
    done = run_ranks(2, FAMILIES_WORKER, root, tmp_path, *HF_LAYOUTS[layout], timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, wanted in expected.items():
        found = torch.load(tmp_path / f"{name}.pt")
        assert float((found["plain"] - wanted).abs().max()) < 1e-3, name
        assert float((found["quantized"] - wanted).abs().max()) > 1e-3  # control
