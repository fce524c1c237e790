"""Low-rank adapters: the same bits at first, and the same losses, on every parallel layout."""

import json
from pathlib import Path

import pytest
import torch

from mqat.checkpoints.reader import CheckpointReader
from mqat.models.structure import is_adapter_key
from tests.distributed.ranks import run_ranks

WORKER = Path(__file__).with_name("worker.py")
KINDS = {
    "beside": ["--lora", '{"dropout": 0.2}', "--algorithm", "int8"],
    "merged": ["--lora", '{"is_merged": true}', "--algorithm", "int4"],
    "packed": ["--lora", "{}", "--algorithm", "nf4", "--packed"],
    "taught": ["--lora", "{}", "--algorithm", "int4", "--distill", '{"temperature": 2.0}'],
}
LAYOUTS = {
    "tp2": ["--tp", "2"],
    "tp2-sp": ["--tp", "2", "--sp"],
    "pp2": ["--pp", "2", "--recompute", "full"],
    "dp2": [],
}
RUN = [
    ("beside", "tp2-sp"), ("beside", "dp2"), ("merged", "tp2"), ("merged", "tp2-sp"),
    ("merged", "pp2"), ("packed", "tp2-sp"), ("packed", "pp2"),
    ("taught", "tp2-sp"),
]  # fmt: skip
MERGED = [layout for kind, layout in RUN if kind == "merged"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    recomputed = [str(root / "recomputed"), *KINDS["beside"], "--recompute", "full"]
    resumed = [str(root / "resumed"), *KINDS["beside"], "--tp", "2", "--resume"]
    jobs = {
        1: [
            *([str(root / f"{kind}-alone"), *how] for kind, how in KINDS.items()),
            [str(root / "weights"), "--algorithm", "null"],
            recomputed,
        ],
        2: [
            *([str(root / f"{kind}-{name}"), *KINDS[kind], *LAYOUTS[name]] for kind, name in RUN),
            [*resumed, str(root / "beside-alone" / "qat")],
        ],
    }
    for processes, lines in jobs.items():
        file = root / f"jobs{processes}.json"
        file.write_text(json.dumps(lines))
        done = run_ranks(processes, WORKER, file)
        assert done.returncode == 0, done.stderr[-4000:]
    return root


def result(root: Path, name: str) -> dict:
    return json.loads((root / name / "result.json").read_text())


def tensors(checkpoint: Path, *, of_adapters: bool = True) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(checkpoint)
    keys = [key for key in reader.keys() if "optimizer" not in key]
    return {key: reader.read(key) for key in keys if is_adapter_key(key) or not of_adapters}


@pytest.mark.parametrize(("kind", "layout"), RUN)
def test_losses_and_gradients_are_those_of_one_process(results, kind, layout):
    expected, found = result(results, f"{kind}-alone"), result(results, f"{kind}-{layout}")
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=5e-3)
    assert found["resumed_alike"]
    control = result(results, "weights")
    assert control["grad_norms"] != pytest.approx(expected["grad_norms"], rel=5e-3)


@pytest.mark.parametrize("layout", MERGED)
def test_adapters_start_with_the_same_bits_on_every_layout(results, layout):
    expected, found = (tensors(results / f"merged-{name}" / "ptq") for name in ("alone", layout))
    assert found.keys() == expected.keys() and len(found) == 2 * 4 * 4
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(bool(found[key].any()) == ("linear_in" in key) for key in found)
    trained = tensors(results / f"merged-{layout}" / "qat")
    assert not any(torch.equal(trained[key], expected[key]) for key in expected)  # control


@pytest.mark.parametrize("layout", [layout for kind, layout in RUN if kind == "packed"])
def test_packed_weights_have_the_same_bits_on_every_layout(results, layout):
    expected, found = (
        tensors(results / f"packed-{name}" / "qat", of_adapters=False) for name in ("alone", layout)
    )
    packed = [key for key in expected if key.startswith("packed.")]
    assert found.keys() == expected.keys() and len(packed) == 4 * 4 * 4
    assert all(torch.equal(found[key], expected[key]) for key in packed)
    codes = [key for key in packed if ".layers.3." in key and key.endswith("codes")]
    others = [key.replace(".layers.3.", ".layers.2.") for key in codes]
    pairs = zip(codes, others, strict=True)
    assert not any(torch.equal(found[a], expected[b]) for a, b in pairs)  # control


@pytest.mark.parametrize("layout", ["alone", *MERGED])
def test_merged_adapters_are_what_was_quantized(results, layout):
    found = result(results, f"merged-{layout}")
    assert found["merged"] == found["beside"] != found["quantized"]
    merged = tensors(results / f"merged-{layout}" / "merged", of_adapters=False)
    assert not any(map(is_adapter_key, merged))


def test_only_adapters_are_trained_and_have_state(results):
    before = tensors(results / "beside-alone" / "ptq", of_adapters=False)
    after = tensors(results / "beside-alone" / "qat", of_adapters=False)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if is_adapter_key(key)}
    reader = CheckpointReader(results / "beside-alone" / "qat")
    state = [key for key in reader.keys() if key.startswith("optimizer.state")]
    assert state and all(is_adapter_key(key) for key in state)


def test_a_resumed_run_goes_on_at_another_layout(results):
    expected, found = result(results, "beside-alone"), result(results, "resumed")
    assert found["losses"] == pytest.approx(expected["ahead"], rel=1e-3)
    assert found["losses"] != pytest.approx(expected["losses"], rel=1e-3)  # control


def test_dropout_is_drawn_again_for_a_recomputed_layer(results):
    expected, found = result(results, "beside-alone"), result(results, "recomputed")
    assert found["losses"] == expected["losses"]
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-5)
