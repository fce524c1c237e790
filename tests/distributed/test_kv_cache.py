"""Quantized key/value caches on every layout: scales, training, and what a server computes."""

import pytest
import torch

from mqat.checkpoints.reader import CheckpointReader
from mqat.export.export import export_hf, export_trtllm
from mqat.models.structure import CORE_ATTENTION
from mqat.verify.verify import verify_export
from tests.distributed.test_layouts import run
from tests.distributed.worker import MODEL, TOKENS

CACHE = ["--algorithm", "null", "--kv-cache", "int8", "--logits"]
LAYOUTS = {
    "tp1": (1, []),
    "tp2": (2, ["--tp", "2"]),
    "tp2-sp": (2, ["--tp", "2", "--sp"]),
    "pp2": (2, ["--pp", "2"]),
    "dp2": (2, []),
    "tp2-sp-recompute": (2, ["--tp", "2", "--sp", "--recompute", "selective"]),
}
SEPARATE = ["--algorithm", "fp8", "--kv-cache", "fp8", "--kv-cache-scales", "separate", "--logits"]
JOBS = {
    **{name: (count, [*options, *CACHE]) for name, (count, options) in LAYOUTS.items()},
    "separate": (1, SEPARATE),
    "separate-tp2-sp": (2, ["--tp", "2", "--sp", *SEPARATE]),
    "tp2-unreduced": (2, ["--tp", "2", *CACHE, "--unreduced"]),
    "dp2-unreduced": (2, [*CACHE, "--unreduced"]),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return run(tmp_path_factory.mktemp("caches"), JOBS)


def scales(jobs, name, kinds=("kv",), checkpoint="ptq"):
    """float32 [layers, kinds]."""
    reader = CheckpointReader(jobs[name][0] / checkpoint)
    names = [f"decoder.layers.{i}.{CORE_ATTENTION.name}" for i in range(MODEL.num_layers)]
    assert list(reader.kv_cache) == names
    return torch.stack(
        [torch.cat([reader.read(f"quantizers.{n}.{kind}_scale") for kind in kinds]) for n in names]
    )


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_scales_are_bit_equal_and_losses_alike_on_every_layout(jobs, name):
    expected, found = scales(jobs, "tp1"), scales(jobs, name)
    assert torch.equal(found, expected) and found.unique().numel() == MODEL.num_layers
    expected, found = jobs["tp1"][1], jobs[name][1]
    assert found["unquantized"] == pytest.approx(expected["unquantized"], rel=1e-6)
    # float32 sums in another order flip single codes
    assert found["quantized"] == pytest.approx(expected["quantized"], rel=1e-5)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["grad_norms"][0] == pytest.approx(expected["grad_norms"][0], rel=1e-2)
    assert abs(found["quantized"] / found["unquantized"] - 1) > 1e-5  # control: it is quantized


@pytest.mark.parametrize("name", ["tp2", "dp2"])
def test_the_reduction_does_the_work(jobs, name):
    assert not torch.equal(scales(jobs, f"{name}-unreduced"), scales(jobs, "tp1"))


def test_separate_scales_are_bit_equal_too_and_not_each_other(jobs):
    kinds = ("key", "value")
    found = scales(jobs, "separate", kinds)
    assert torch.equal(found, scales(jobs, "separate-tp2-sp", kinds))
    assert (found[:, 0] != found[:, 1]).any()


@pytest.mark.parametrize("name", [name for name in JOBS if "unreduced" not in name])
def test_training_keeps_the_scales_and_resumes_bit_for_bit(jobs, name):
    kinds = ("key", "value") if "separate" in name else ("kv",)
    assert torch.equal(scales(jobs, name, kinds), scales(jobs, name, kinds, "qat"))
    assert jobs[name][1]["resumed_alike"]


@pytest.mark.parametrize("name", ["tp1", "tp2-sp", "pp2"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_an_engine_computes_what_training_computed(jobs, tmp_path, name, tp, pp):
    root = jobs[name][0]
    out = tmp_path / "out"
    export_trtllm(root / "qat", out, tensor_parallel=tp, pipeline_parallel=pp, dtype="float32")
    trained = torch.load(root / "logits.pt")
    report = verify_export(out, reference=root / "qat", tokens=TOKENS, reference_logits=trained)
    assert report.problems == []
    # Without quantized weights or inputs only cache codes can flip: far below what the cache changes.
    assert report.mean_kl < 1e-6 and report.top1_agreement == 1.0


@pytest.mark.parametrize("style", ["compressed-tensors", "modelopt"])
def test_hugging_face_directories_compute_what_training_computed(jobs, tmp_path, style):
    root = jobs["separate-tp2-sp"][0]
    export_hf(root / "qat", tmp_path / "out", style=style, dtype="float32")
    trained = torch.load(root / "logits.pt")
    report = verify_export(
        tmp_path / "out", reference=root / "qat", tokens=TOKENS, reference_logits=trained
    )
    assert report.problems == [] and report.mean_kl < 1e-2
