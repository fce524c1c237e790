"""More layouts, models and algorithms than `test_layouts.py`, by the same checks (`make test-all`)."""

import json

import pytest
import torch

from mqat.checkpoints.reader import CheckpointReader
from tests.distributed.test_layouts import (
    LAYOUTS,
    check_algorithm,
    check_losses,
    check_quality,
    check_resumed,
    check_scales,
    resume,
    run,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
# Megatron's data-parallel overlaps, in buckets that several layers share.
OVERLAPS = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 100_000}
# Against one process.
MORE = {
    "tp2": (2, ["--tp", "2"]),
    "pp2": (2, ["--pp", "2"]),
    "tp2-recompute": (2, ["--tp", "2", "--recompute", "full"]),
    "tp2-sp-selective": (2, ["--tp", "2", "--sp", "--recompute", "selective"]),
    "cp2-selective": (2, ["--cp", "2", "--recompute", "selective"]),
    "tp2-cp2": (4, ["--tp", "2", "--cp", "2"]),
    "tp2-sp-cp2": (4, ["--tp", "2", "--sp", "--cp", "2"]),
    "cp2-pp2": (4, ["--cp", "2", "--pp", "2"]),
    "cp2-dp2": (4, ["--cp", "2"]),
    "cp4": (4, ["--cp", "4"]),
    "cp2-pp2-interleaved": (4, ["--cp", "2", "--pp", "2", "--vp", "2"]),
}
# Other models, so each with a reference of its own.
VARIANTS = {
    "w4a8": (1, ["--algorithm", "int4_w_int8_a"]),
    "untied": (1, ["--untied"]),
    "untied-pp2": (2, ["--untied", "--pp", "2"]),
    "bf16-tp2-sp": (2, ["--bf16", "--tp", "2", "--sp"]),
    "bf16-dp2": (2, ["--bf16"]),
    "biased": (1, ["--model", "biased"]),
    "biased-tp2-sp": (2, ["--model", "biased", "--tp", "2", "--sp"]),
    "int8-backward": (1, ["--backward", "int8"]),
    "int8-backward-pp2": (2, ["--backward", "int8", "--pp", "2"]),
    "int8-backward-tp2": (2, ["--backward", "int8", "--tp", "2"]),
    "int8-backward-tp2-sp": (2, ["--backward", "int8", "--tp", "2", "--sp"]),
    "int8-backward-dp2": (2, ["--backward", "int8"]),
    "int8-backward-cp2": (2, ["--backward", "int8", "--cp", "2"]),
    "fp8": (1, ["--algorithm", "fp8"]),
    "fp8-tp2-sp": (2, ["--algorithm", "fp8", "--tp", "2", "--sp"]),
    "dp2-overlap": (2, ["--ddp", json.dumps(OVERLAPS)]),
}
# Layout that saved, layout that resumes.
RESUMED = [
    ("tp1", "tp1"), ("dp2", "dp2"), ("tp1", "pp2"), ("pp2-interleaved", "tp2"), ("cp2", "tp1"),
    ("tp1", "cp2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    return run(tmp_path_factory.mktemp("more_layouts"), LAYOUTS | MORE | VARIANTS)


@pytest.fixture(scope="module")
def resumed(layouts, tmp_path_factory):
    return resume(tmp_path_factory.mktemp("resumed"), layouts, RESUMED, LAYOUTS | MORE)


@pytest.mark.parametrize("name", MORE)
def test_more_layouts_change_nothing(layouts, name):
    check_losses(layouts, name)
    check_scales(layouts, name)
    check_quality(layouts, name)


@pytest.mark.parametrize("name", [*MORE, *VARIANTS])
def test_training_resumed_from_a_checkpoint_continues_bit_for_bit(layouts, name):
    assert layouts[name][1]["resumed_alike"]


@pytest.mark.parametrize(("saved", "layout"), RESUMED)
def test_a_new_process_resumes_at_any_layout(layouts, resumed, saved, layout):
    check_resumed(layouts, resumed, saved, layout)


def test_fp8_equals_one_process_under_sequence_parallelism(layouts):
    check_algorithm(layouts, "fp8")


def test_overlapped_collectives_change_nothing(layouts):
    (plain, expected), (overlapped, found) = (layouts[name] for name in ("dp2", "dp2-overlap"))
    # Norms, by which gradients are clipped, add up numbers bucket by bucket.
    for key in ("losses", "grad_norms", "ahead"):
        assert found[key] == pytest.approx(expected[key], rel=1e-6), key
    assert found["resumed_alike"]
    assert found["bucket_groups"] > expected["bucket_groups"]  # control: it was really another way
    first, second = (CheckpointReader(path / "qat") for path in (plain, overlapped))
    for key in first.keys():
        if key.endswith(".weight"):
            assert torch.allclose(first.read(key), second.read(key), rtol=1e-4, atol=1e-6), key


def test_8_bit_gradients_equal_one_process_but_for_their_noise(layouts):
    expected, exact = layouts["int8-backward"][1], layouts["tp1"][1]
    other_noise = dict.fromkeys(("tp2", "tp2-sp", "dp2", "cp2"), 2e-2)
    for name, tolerance in ({"pp2": 1e-4} | other_noise).items():
        found = layouts[f"int8-backward-{name}"][1]
        # PP: the same codes, but for float32 sums that flip some. TP: a token's gradient has a step for
        # each rank's outputs of a column-parallel linear, so its noise is another. DP, CP: ranks have
        # noise of their own.
        assert found["grad_norms"][0] == pytest.approx(expected["grad_norms"][0], rel=tolerance)
        limit = 2e-3 if name == "pp2" else 1e-2
        assert found["losses"] == pytest.approx(expected["losses"], rel=limit)
        assert found["resumed_alike"]
    assert expected["grad_norms"][0] != pytest.approx(exact["grad_norms"][0], rel=1e-5)  # control
    assert expected["grad_norms"][0] == pytest.approx(exact["grad_norms"][0], rel=2e-2)


def test_untied_embeddings_train_alike_and_are_another_model(layouts):
    alone, staged, tied = (layouts[name][1] for name in ("untied", "untied-pp2", "tp1"))
    assert staged["unquantized"] == pytest.approx(alone["unquantized"], rel=1e-6)
    assert staged["losses"] == pytest.approx(alone["losses"], rel=2e-3)
    assert tied["losses"] != pytest.approx(alone["losses"], rel=2e-3)  # control


def test_biases_train_alike_under_sequence_parallelism_and_matter(layouts):
    expected, found, without = (layouts[n][1] for n in ("biased", "biased-tp2-sp", "tp1"))
    assert found["unquantized"] == pytest.approx(expected["unquantized"], rel=1e-6)
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-3)
    assert found["grad_norms"][0] == pytest.approx(expected["grad_norms"][0], rel=2e-2)
    assert without["losses"] != pytest.approx(expected["losses"], rel=2e-3)  # control
    first, second = (CheckpointReader(layouts[n][0] / "ptq") for n in ("biased", "biased-tp2-sp"))
    for key in first.keys():
        if key.endswith((".bias", "_scale")):
            assert torch.equal(first.read(key), second.read(key)), key
    trained = CheckpointReader(layouts["biased"][0] / "qat")
    key = "decoder.layers.mlp.linear_fc2.bias"  # replicated over ranks
    assert not torch.equal(trained.read(key), first.read(key))


@pytest.mark.parametrize("name", ["bf16-tp2-sp", "bf16-dp2"])
def test_bf16_follows_fp32_within_its_rounding(layouts, name):
    _, expected = layouts["tp1"]
    _, found = layouts[name]
    assert found["unquantized"] == pytest.approx(expected["unquantized"], rel=1e-2)
    assert found["losses"] == pytest.approx(expected["losses"], rel=3e-2)
    assert found["losses"] != expected["losses"]  # control: it is another precision


def test_bf16_scales_are_bit_equal_on_both_layouts(layouts):
    first, second = (CheckpointReader(layouts[n][0] / "ptq") for n in ("bf16-tp2-sp", "bf16-dp2"))
    for linear in first.layers:
        for kind in ("weight", "input"):
            key = f"quantizers.{linear}.{kind}_scale"
            assert torch.equal(first.read(key), second.read(key)), key
