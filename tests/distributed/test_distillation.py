"""Quantization-aware distillation: its losses by definition, and the same on every parallel layout."""

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.launch import torchrun

HERE = Path(__file__).parent
MIXED = {"weight": 0.7, "temperature": 2.0, "top_k": 20, "hidden_weight": 0.5}
REVERSE = {"divergence": "reverse_kl"}
# Its tables would be padded to another number of rows.
LARGER = {"model": {"num_query_groups": 4, "intermediate_size": 512}}


def _jobs(loss: dict) -> dict[int, dict[str, list[str]]]:
    taught = ["--distill", json.dumps(loss)]
    return {
        1: {
            "tp1": taught, "labels": [], "recomputed": [*taught, "--recompute", "full"],
            "reverse": ["--distill", json.dumps(REVERSE)],
            "larger": ["--distill", json.dumps(LARGER)],
            "documents": [*taught, "--documents"],
            "experts": [*taught, "--model", "experts"],
        },
        2: {
            "tp2": [*taught, "--tp", "2"],
            "tp2-sp": [*taught, "--tp", "2", "--sp"],
            "pp2-interleaved": [*taught, "--pp", "2", "--vp", "2"],
            "dp2": taught,
            "cp2": [*taught, "--cp", "2"],
            "larger-tp2-sp": ["--distill", json.dumps(LARGER), "--tp", "2", "--sp"],
            "documents-cp2": [*taught, "--documents", "--cp", "2"],
            "experts-ep2": [*taught, "--model", "experts", "--ep", "2"],
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("distillation")
    for processes, jobs in _jobs(MIXED).items():
        file = root / f"jobs{processes}.json"
        lines = [[str(root / name), "--algorithm", "int4", *how] for name, how in jobs.items()]
        file.write_text(json.dumps(lines))
        done = run_ranks(processes, HERE / "worker.py", file)
        assert done.returncode == 0, done.stderr[-4000:]
    return {
        name: json.loads((root / name / "result.json").read_text())
        for jobs in _jobs(MIXED).values()
        for name in jobs
    }


@pytest.mark.parametrize("layout", _jobs(MIXED)[2])
def test_losses_and_gradients_are_those_of_one_process(results, layout):
    own = layout.partition("-")[0]  # of another model or text, with a reference of its own
    expected, found = results[own if own in results else "tp1"], results[layout]
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-3)
    assert found["grad_norms"][0] == pytest.approx(expected["grad_norms"][0], rel=2e-3)
    assert found["resumed_alike"]
    for other in ("labels", "reverse"):  # controls
        assert results[other]["losses"] != pytest.approx(expected["losses"], rel=0.1)
    if own == "documents":
        assert results["tp1"]["losses"] != pytest.approx(expected["losses"], rel=2e-3)


def test_recomputed_activations_change_nothing(results):
    assert results["recomputed"]["losses"] == results["tp1"]["losses"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_losses_and_gradients_are_those_of_the_definition(ranks):
    done = run_ranks(ranks, HERE / "divergence_worker.py")
    assert done.returncode == 0, done.stderr[-4000:]
    worst = json.loads(done.stdout.splitlines()[-1])
    assert worst["loss"] < 1e-4 and worst["gradient"] < 1e-5, worst


@pytest.mark.slow
def test_the_example_distils_exports_and_verifies(tmp_path):
    script, run = HERE.parents[1] / "examples" / "gpt_qad.py", tmp_path / "run"
    done = torchrun(
        2, script, f"exp_manager.exp_dir={run}", "model.pipeline_model_parallel_size=1",
        "model.sequence_parallel=true", "trainer.max_steps=8", "model.pretrain.max_steps=20",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "teacher: the unquantized weights that QAT starts from" in done.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert summary["export"]["verified"] and summary["finished"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    taught = [line for line in lines if line["phase"] == "qat" and line["divergence"] > 0]
    assert len(taught) == 8
