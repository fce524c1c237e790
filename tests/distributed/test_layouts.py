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
from tests.distributed.ranks import run_ranks

# The first test waits for the fixture that trains all layouts.
pytestmark = pytest.mark.timeout(1500)
WORKER = Path(__file__).with_name("worker.py")
# With the sequence cut over two ranks and over two stages, and over nothing: each way a number can go.
LAYOUTS = {
    "tp1": (1, []),
    "tp2-sp": (2, ["--tp", "2", "--sp"]),
    "pp2-interleaved": (2, ["--pp", "2", "--vp", "2"]),
    "dp2": (2, []),
    "cp2": (2, ["--cp", "2"]),
}
# Other models than the one above, so each with a reference of its own.
VARIANTS = {
    "w4a8": (1, ["--algorithm", "int4_w_int8_a"]),
    "w4a8-tp2-sp": (2, ["--algorithm", "int4_w_int8_a", "--tp", "2", "--sp"]),
    "documents": (1, ["--documents", "--kv-cache", "int8"]),
    "documents-cp2": (2, ["--documents", "--kv-cache", "int8", "--cp", "2"]),
}
# Of what the tests of context parallelism see.
WRONG = {
    "cp2-contiguous": (2, ["--cp", "2", "--contiguous"]),
    "cp2-unreduced": (2, ["--cp", "2", "--unreduced", "--ptq"]),
}
# Layout that saved, layout that resumes.
RESUMED = [("tp2-sp", "tp1"), ("dp2", "pp2-interleaved")]


def run(root: Path, jobs: dict[str, tuple[int, list[str]]]) -> dict[str, tuple[Path, dict]]:
    """Directory and result of every job: (number of processes, options)."""
    for processes in {count for count, _ in jobs.values()}:
        file = root / f"jobs{processes}.json"
        lines = [[str(root / n), *how] for n, (count, how) in jobs.items() if count == processes]
        file.write_text(json.dumps(lines))
        done = run_ranks(processes, WORKER, file)
        assert done.returncode == 0, done.stderr[-4000:]
    return {name: (root / name, json.loads((root / name / "result.json").read_text()))
            for name in jobs}  # fmt: skip


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    return run(tmp_path_factory.mktemp("layouts"), LAYOUTS | VARIANTS | WRONG)


def resume(root, layouts, pairs, options):
    """Other processes that go on from the checkpoints of the first; `options`: of each layout."""
    jobs = {
        f"{saved}-{layout}": (
            options[layout][0], [*options[layout][1], "--resume", str(layouts[saved][0] / "qat")]
        )
        for saved, layout in pairs
    }  # fmt: skip
    return run(root, jobs)


@pytest.fixture(scope="module")
def resumed(layouts, tmp_path_factory):
    return resume(tmp_path_factory.mktemp("resumed"), layouts, RESUMED, LAYOUTS)


def test_chunks_in_file_order_and_statistics_of_one_rank_would_be_noticed(layouts):
    expected, found = (layouts[n][1] for n in ("tp1", "cp2-contiguous"))
    assert found["unquantized"] != pytest.approx(expected["unquantized"], rel=1e-4)
    assert found["losses"] != pytest.approx(expected["losses"], rel=2e-3)
    with pytest.raises(AssertionError, match="input_scale"):
        check_scales(layouts, "cp2-unreduced")


def test_documents_and_their_caches_are_the_same_over_context_ranks(layouts):
    expected, found, whole = (layouts[n][1] for n in ("documents", "documents-cp2", "tp1"))
    assert found["unquantized"] == pytest.approx(expected["unquantized"], rel=1e-6)
    check_steps(found, expected)
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
    check_losses(layouts, name)


def check_losses(layouts, name):
    _, expected = layouts["tp1"]
    _, found = layouts[name]
    # float32 sums in another order; flipped INT8 codes add to it once quantized
    assert found["unquantized"] == pytest.approx(expected["unquantized"], rel=1e-6)
    assert found["quantized"] == pytest.approx(expected["quantized"], rel=1e-3)
    check_steps(found, expected)


def check_steps(found, expected):
    """Later losses differ more: which codes flip depends on the processor, and AdamW takes up each."""
    assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=2e-3)
    assert found["losses"][1:] == pytest.approx(expected["losses"][1:], rel=5e-3)
    assert found["grad_norms"][0] == pytest.approx(expected["grad_norms"][0], rel=2e-2)


def test_another_algorithm_equals_one_process_under_sequence_parallelism(layouts):
    check_algorithm(layouts, "w4a8")


def check_algorithm(layouts, algorithm):
    expected, found = layouts[algorithm][1], layouts[f"{algorithm}-tp2-sp"][1]
    # What moves with the layout is numbers on borders between codes, not the model (docs/export.md).
    assert found["unquantized"] == pytest.approx(expected["unquantized"], rel=1e-6)
    check_steps(found, expected)
    int8 = layouts["tp1"][1]
    assert found["losses"] != pytest.approx(int8["losses"], rel=1e-6)  # control: another algorithm


def test_quantization_and_training_change_the_loss(layouts):
    _, result = layouts["tp1"]
    assert result["unquantized"] != result["quantized"]  # controls for the comparison above
    assert result["losses"][1] < result["losses"][0]


@pytest.mark.parametrize("name", [*LAYOUTS, *VARIANTS])
def test_training_resumed_from_a_checkpoint_continues_bit_for_bit(layouts, name):
    assert layouts[name][1]["resumed_alike"]


@pytest.mark.parametrize(("saved", "layout"), RESUMED)
def test_a_new_process_resumes_at_any_layout(layouts, resumed, saved, layout):
    check_resumed(layouts, resumed, saved, layout)


def check_resumed(layouts, resumed, saved, layout):
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
    check_scales(layouts, name)


def check_scales(layouts, name):
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


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_the_quality_report_is_the_same(layout, layouts):
    check_quality(layouts, layout)


def check_quality(layouts, layout):
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp1", "w4a8"])
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
        done = run_ranks(processes, worker, checkpoint, tokens, out, *options)
        assert done.returncode == 0, done.stderr[-3000:]
        found[how] = torch.load(out)
    distance = (found["lowered"] - found["whole"]).norm() / found["whole"].norm()
    # float32 sums in another order; flipped INT8 codes of later layers' inputs add to it
    assert 0 < float(distance) < 1e-2
    shifted = (found["lowered"][:, 1:] - found["whole"][:, :-1]).norm() / found["whole"].norm()
    assert float(shifted) > 0.1  # control
