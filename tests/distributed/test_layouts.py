"""The same model on every parallel layout: losses, gradients, scales and exported bytes."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mqat.checkpoints.reader import CheckpointReader
from mqat.data.packaged import python_docs_documents
from mqat.data.tokenizer import train_small_tokenizer
from mqat.export.export import export_trtllm
from mqat.verify.verify import verify_export
from tests.distributed.launch import torchrun

# The first test waits for the fixture that trains all layouts.
pytestmark = pytest.mark.timeout(1500)
WORKER = Path(__file__).with_name("worker.py")
# Megatron's data-parallel overlaps, in buckets that several layers share.
OVERLAPS = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 100_000}
# Other models than the one above, so each with a reference of its own.
VARIANTS = {
    "untied": (1, ["--untied"]),
    "untied-pp2": (2, ["--untied", "--pp", "2"]),
    "bf16-tp2-sp": (2, ["--bf16", "--tp", "2", "--sp"]),
    "bf16-dp2": (2, ["--bf16"]),
    "w4a8": (1, ["--algorithm", "int4_w_int8_a"]),
    "w4a8-tp2-sp": (2, ["--algorithm", "int4_w_int8_a", "--tp", "2", "--sp"]),
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
    "documents": (1, ["--documents", "--kv-cache", "int8"]),
    "documents-cp2": (2, ["--documents", "--kv-cache", "int8", "--cp", "2"]),
}
LAYOUTS = {
    "tp1": (1, []),
    "tp2": (2, ["--tp", "2"]),
    "tp2-sp": (2, ["--tp", "2", "--sp"]),
    "pp2": (2, ["--pp", "2"]),
    "pp2-interleaved": (2, ["--pp", "2", "--vp", "2"]),
    "dp2": (2, []),
    "cp2": (2, ["--cp", "2"]),
}
CONTEXT = {
    "tp2-sp-cp2": (4, ["--tp", "2", "--sp", "--cp", "2"]),
    "cp2-pp2": (4, ["--cp", "2", "--pp", "2"]),
    "cp2-dp2": (4, ["--cp", "2"]),
}
MORE = {
    "tp2-recompute": (2, ["--tp", "2", "--recompute", "full"]),
    "tp2-sp-selective": (2, ["--tp", "2", "--sp", "--recompute", "selective"]),
    "cp2-selective": (2, ["--cp", "2", "--recompute", "selective"]),
    "tp2-cp2": (4, ["--tp", "2", "--cp", "2"]),
    "cp4": (4, ["--cp", "4"]),
    "cp2-pp2-interleaved": (4, ["--cp", "2", "--pp", "2", "--vp", "2"]),
}
# Of what the tests of context parallelism see.
WRONG = {
    "cp2-contiguous": (2, ["--cp", "2", "--contiguous"]),
    "cp2-unreduced": (2, ["--cp", "2", "--unreduced", "--ptq"]),
}
# Layout that saved, layout that resumes.
RESUMED = [
    ("tp1", "tp1"), ("dp2", "dp2"), ("tp2-sp", "tp1"), ("tp1", "pp2"), ("pp2-interleaved", "tp2"),
    ("cp2", "tp1"), ("tp1", "cp2"),
]  # fmt: skip


def run(root: Path, jobs: dict[str, tuple[int, list[str]]]) -> dict[str, tuple[Path, dict]]:
    """Directory and result of every job: (number of processes, options)."""
    for processes in {count for count, _ in jobs.values()}:
        file = root / f"jobs{processes}.json"
        lines = [[str(root / n), *how] for n, (count, how) in jobs.items() if count == processes]
        file.write_text(json.dumps(lines))
        done = torchrun(processes, WORKER, file)
        assert done.returncode == 0, done.stderr[-4000:]
    return {name: (root / name, json.loads((root / name / "result.json").read_text()))
            for name in jobs}  # fmt: skip


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    return run(tmp_path_factory.mktemp("layouts"), LAYOUTS | VARIANTS)


@pytest.fixture(scope="module")
def context_layouts(layouts, tmp_path_factory):
    return layouts | run(tmp_path_factory.mktemp("context_layouts"), CONTEXT | WRONG)


@pytest.fixture(scope="module")
def more_layouts(layouts, tmp_path_factory):
    return layouts | run(tmp_path_factory.mktemp("more_layouts"), MORE)


@pytest.fixture(scope="module")
def resumed(layouts, tmp_path_factory):
    """Other processes that go on from the checkpoints of the first."""
    jobs = {
        f"{saved}-{layout}": (
            LAYOUTS[layout][0], [*LAYOUTS[layout][1], "--resume", str(layouts[saved][0] / "qat")]
        )
        for saved, layout in RESUMED
    }  # fmt: skip
    return run(tmp_path_factory.mktemp("resumed"), jobs)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_recomputed_activations_change_nothing(more_layouts, name):
    test_losses_and_gradient_norms_equal_one_process(more_layouts, name)
    test_training_resumed_from_a_checkpoint_continues_bit_for_bit(more_layouts, name)
    test_scales_are_bit_equal_on_every_layout(more_layouts, name)


@pytest.mark.parametrize("name", CONTEXT)
def test_context_parallelism_changes_nothing_with_any_other(context_layouts, name):
    test_losses_and_gradient_norms_equal_one_process(context_layouts, name)
    test_training_resumed_from_a_checkpoint_continues_bit_for_bit(context_layouts, name)
    test_scales_are_bit_equal_on_every_layout(context_layouts, name)


def test_chunks_in_file_order_and_statistics_of_one_rank_would_be_noticed(context_layouts):
    expected, found = (context_layouts[n][1] for n in ("tp1", "cp2-contiguous"))
    assert found["unquantized"] != pytest.approx(expected["unquantized"], rel=1e-4)
    assert found["losses"] != pytest.approx(expected["losses"], rel=2e-3)
    with pytest.raises(AssertionError, match="input_scale"):
        test_scales_are_bit_equal_on_every_layout(context_layouts, "cp2-unreduced")


def test_documents_and_their_caches_are_the_same_over_context_ranks(layouts):
    expected, found, whole = (layouts[n][1] for n in ("documents", "documents-cp2", "tp1"))
    assert found["unquantized"] == pytest.approx(expected["unquantized"], rel=1e-6)
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-3)
    assert found["grad_norms"][0] == pytest.approx(expected["grad_norms"][0], rel=2e-2)
    assert whole["unquantized"] != pytest.approx(expected["unquantized"], rel=1e-4)  # control
    first, second = (
        CheckpointReader(layouts[n][0] / "ptq") for n in ("documents", "documents-cp2")
    )
    scales = [key for key in first.keys() if key.endswith("_scale")]
    assert any(key.endswith(".kv_scale") for key in scales)
    for key in scales:
        assert torch.equal(first.read(key), second.read(key)), key


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_losses_and_gradient_norms_equal_one_process(layouts, name):
    _, expected = layouts["tp1"]
    _, found = layouts[name]
    # float32 sums in another order; flipped INT8 codes add to it once quantized
    assert found["unquantized"] == pytest.approx(expected["unquantized"], rel=1e-6)
    assert found["quantized"] == pytest.approx(expected["quantized"], rel=1e-3)
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-3)
    assert found["grad_norms"][0] == pytest.approx(expected["grad_norms"][0], rel=2e-2)


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


@pytest.mark.parametrize("algorithm", ["w4a8", "fp8"])
def test_other_algorithms_equal_one_process_under_sequence_parallelism(layouts, algorithm):
    expected, found = layouts[algorithm][1], layouts[f"{algorithm}-tp2-sp"][1]
    # What moves with the layout is numbers on borders between codes, not the model (docs/export.md).
    assert found["unquantized"] == pytest.approx(expected["unquantized"], rel=1e-6)
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-3)
    assert found["grad_norms"][0] == pytest.approx(expected["grad_norms"][0], rel=2e-2)
    int8 = layouts["tp1"][1]
    assert found["losses"] != pytest.approx(int8["losses"], rel=1e-6)  # control: another algorithm


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


def test_quantization_and_training_change_the_loss(layouts):
    _, result = layouts["tp1"]
    assert result["unquantized"] != result["quantized"]  # controls for the comparison above
    assert result["losses"][1] < result["losses"][0]


@pytest.mark.parametrize("name", [*LAYOUTS, *VARIANTS])
def test_training_resumed_from_a_checkpoint_continues_bit_for_bit(layouts, name):
    assert layouts[name][1]["resumed_alike"]


@pytest.mark.parametrize(("saved", "layout"), RESUMED)
def test_a_new_process_resumes_at_any_layout(layouts, resumed, saved, layout):
    root, whole = layouts[saved]
    directory, found = resumed[f"{saved}-{layout}"]
    # float32 sums in another order flip single INT8 codes, as in the comparison of losses above
    assert found["losses"] == pytest.approx(whole["ahead"], rel=2e-3)
    assert found["losses"] != pytest.approx(whole["losses"], rel=2e-3)  # control: not steps 1, 2
    if layout == saved:
        assert found["losses"] == whole["ahead"]
    before, after = CheckpointReader(root / "qat"), CheckpointReader(directory / "qat")
    for linear in before.layers:
        for kind in ("weight", "input"):
            key = f"quantizers.{linear}.{kind}_scale"
            assert torch.equal(before.read(key), after.read(key)), key


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_scales_are_bit_equal_on_every_layout(layouts, name):
    reference = CheckpointReader(layouts["tp1"][0] / "ptq")
    other = CheckpointReader(layouts[name][0] / "ptq")
    for linear in reference.layers:
        for kind in ("weight", "input"):
            key = f"quantizers.{linear}.{kind}_scale"
            assert torch.equal(reference.read(key), other.read(key)), key
    first, second = (f"quantizers.{n}.input_scale" for n in list(reference.layers)[:2])
    assert not torch.equal(reference.read(first), reference.read(second))  # control


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_exports_do_not_depend_on_the_training_layout(layouts, tmp_path, tp, pp):
    outputs = []
    for name in ("tp1", "tp2-sp", "pp2-interleaved"):
        out = tmp_path / name
        export_trtllm(layouts[name][0] / "ptq", out, tensor_parallel=tp, pipeline_parallel=pp)
        outputs.append({f.name: f.read_bytes() for f in out.iterdir()})
        report = verify_export(
            out, reference=layouts[name][0] / "ptq", tokens=torch.arange(16)[None]
        )
        assert report.ok, report.problems
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(outputs[0]) == tp * pp + 1


def test_a_flipped_byte_in_an_export_is_found(layouts, tmp_path):
    out = tmp_path / "export"
    export_trtllm(layouts["tp1"][0] / "ptq", out, tensor_parallel=2)
    file = out / "rank1.safetensors"
    data = bytearray(file.read_bytes())
    data[-5000] ^= 1
    file.write_bytes(bytes(data))
    report = verify_export(out, reference=layouts["tp1"][0] / "ptq")
    assert not report.ok
    (out / "rank1.safetensors").unlink()
    assert "missing" in verify_export(out).problems[0]


def test_a_damaged_checkpoint_is_refused_by_name(layouts, tmp_path):
    copy = tmp_path / "damaged"
    shutil.copytree(layouts["tp1"][0] / "ptq", copy)
    file = next(copy.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="do not match the checksum"):
        CheckpointReader(copy)
    file.write_bytes(bytes(data[:-10]))
    with pytest.raises(ValueError, match=r"distcp: \d+ bytes, expected"):
        CheckpointReader(copy)
    (copy / "mqat.json").unlink()
    with pytest.raises(ValueError, match="not a complete mqat checkpoint"):
        CheckpointReader(copy)


def quality(job):
    """Name of a linear -> its entry of the quality report."""
    return {entry["name"]: entry for entry in job[1]["quality"]}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1"])
def test_the_quality_report_is_the_same(layout, layouts):
    expected, found = quality(layouts["tp1"]), quality(layouts[layout])
    other = quality(layouts["w4a8"])
    assert list(found) == list(expected) and len(found) == 16
    for name, entry in expected.items():
        same = found[name]
        assert same["output_sqnr_db"] == pytest.approx(entry["output_sqnr_db"], abs=0.05)
        for key in ("amax", "clip_rate", "scale", "sqnr_db"):
            assert same["weight"][key] == pytest.approx(entry["weight"][key], rel=1e-9)
        assert same["input_amax"] == pytest.approx(entry["input_amax"], rel=1e-2)
        assert same["input"]["clip_rate"] == pytest.approx(entry["input"]["clip_rate"], abs=1e-4)
        assert same["outliers"]["count"] == entry["outliers"]["count"]
        # Control: the figures of weights of 4 bits are far away.
        assert other[name]["output_sqnr_db"] < entry["output_sqnr_db"] - 1


@pytest.mark.parametrize("name", ["tp1", pytest.param("w4a8", marks=pytest.mark.slow)])
def test_lowered_at_tp_2_is_the_model_that_was_calibrated(layouts, tmp_path, name):
    tokens, worker = tmp_path / "tokens.pt", Path(__file__).with_name("logits_worker.py")
    checkpoint = shutil.copytree(layouts[name][0] / "ptq", tmp_path / "ptq")
    train_small_tokenizer(python_docs_documents()[:2], 300).save_pretrained(
        checkpoint / "tokenizer"
    )
    torch.save(torch.arange(24).view(2, 12), tokens)
    found = {}
    for how, (processes, options) in {
        "whole": (1, []), "lowered": (2, ["--tp", "2", "--lowered"])
    }.items():  # fmt: skip
        out = tmp_path / f"{how}.pt"
        done = torchrun(processes, worker, checkpoint, tokens, out, *options)
        assert done.returncode == 0, done.stderr[-3000:]
        found[how] = torch.load(out)
    distance = (found["lowered"] - found["whole"]).norm() / found["whole"].norm()
    # float32 sums in another order; flipped INT8 codes of later layers' inputs add to it
    assert 0 < float(distance) < 1e-2
    shifted = (found["lowered"][:, 1:] - found["whole"][:, :-1]).norm() / found["whole"].norm()
    assert float(shifted) > 0.1  # control
