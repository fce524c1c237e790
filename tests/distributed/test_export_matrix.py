"""Real training layouts x inference layouts: a Qwen 2 model with biases, calibrated on each layout."""

from pathlib import Path

import pytest
import torch

from mqat.checkpoints.reader import CheckpointReader
from mqat.export.export import export_hf, export_trtllm
from mqat.verify.verify import verify_export
from tests.distributed.test_layouts import run
from tests.launch import torchrun

pytestmark = pytest.mark.slow
ALGORITHMS = ("int8", "int4", "fp8")
TRAINED = {
    "TP 1 x PP 1": (1, []),
    "TP 2 x PP 1": (2, ["--tp", "2"]),
    "TP 1 x PP 2": (2, ["--pp", "2"]),
    "TP 3 x PP 1": (3, ["--tp", "3"]),
    "TP 2 x PP 2": (4, ["--tp", "2", "--pp", "2"]),
}
SERVED = ((1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (3, 2))
# Groups of 64 need 192 columns to be a multiple of 64 on every rank, in TensorRT-LLM of 128 in all.
REFUSED = {("int4", (2, 1)), ("int4", (2, 2))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(algorithm, training layout) -> checkpoint."""
    jobs = {
        f"{algorithm} {name}": (
            count, ["--model", "qwen2", "--ptq", "--algorithm", algorithm, *options]
        )
        for algorithm in ALGORITHMS
        for name, (count, options) in TRAINED.items()
        if algorithm != "int4" or "TP 2" not in name  # 96 columns on a rank
    }  # fmt: skip
    found = run(tmp_path_factory.mktemp("trained"), jobs)
    return {name: directory / "ptq" for name, (directory, _) in found.items()}


def contents(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.is_file()}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_bytes_depend_on_the_inference_layout_alone(algorithm, trained, tmp_path):
    checkpoints = {n: p for n, p in trained.items() if n.startswith(f"{algorithm} ")}
    assert len(checkpoints) == (3 if algorithm == "int4" else 5)
    written = {}
    for tp, pp in SERVED:
        for name, checkpoint in checkpoints.items():
            out = tmp_path / f"{name} {tp} {pp}"
            if (algorithm, (tp, pp)) in REFUSED:
                with pytest.raises(ValueError, match="is not a multiple of 128"):
                    export_trtllm(checkpoint, out, tensor_parallel=tp, pipeline_parallel=pp)
                continue
            export_trtllm(checkpoint, out, tensor_parallel=tp, pipeline_parallel=pp)
            report = verify_export(out, reference=checkpoint, tokens=torch.arange(16)[None])
            assert report.problems == []
            found = contents(out)
            assert len(found) == tp * pp + 1
            assert found == written.setdefault((tp, pp), found), name
    assert written[1, 1] != written[3, 1]  # control: another layout has other bytes
    for style in (
        ("compressed-tensors", "modelopt") if algorithm == "fp8" else ("compressed-tensors",)
    ):
        for name, checkpoint in checkpoints.items():
            out = tmp_path / f"{name} {style}"
            export_hf(checkpoint, out, style=style)
            assert verify_export(out, reference=checkpoint).problems == []
            assert contents(out) == written.setdefault(style, contents(out)), name
    file = written[1, 1]["rank0.safetensors"]
    assert file.count(b"attention.qkv.bias") == 4 and b"attention.dense.bias" not in file


def test_biases_and_scales_are_the_same_on_every_layout(trained):
    first, *others = (CheckpointReader(p) for n, p in trained.items() if n.startswith("int8 "))
    keys = [key for key in first.keys() if key.startswith("quantizers.") or key.endswith(".bias")]
    assert "decoder.layers.self_attention.linear_qkv.bias" in keys
    for other in others:
        assert all(torch.equal(first.read(key), other.read(key)) for key in keys)


def test_several_processes_write_what_one_does(trained, tmp_path):
    checkpoint = trained["fp8 TP 2 x PP 2"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    export_trtllm(checkpoint, alone, tensor_parallel=2, pipeline_parallel=2)
    done = torchrun(3, "mqat.cli", "export", checkpoint, "--inference-tp", 2, "--inference-pp", 2,
                    "--out", together)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(alone) == contents(together)
