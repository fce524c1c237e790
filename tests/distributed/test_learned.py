"""Learned scales and bit annealing in a real model: on every layout, after resume, as exported."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from mqat.checkpoints.reader import CheckpointReader
from tests.distributed.ranks import run_ranks
from tests.launch import ROOT, torchrun

WORKER = Path(__file__).with_name("learned_worker.py")
QAT = ROOT / "examples" / "gpt_qat.py"
BITS = ["--bits", "[[0, 8], [1, 6], [3, 4]]"]
JOBS = {
    "tp1": (1, []),
    "pact": (1, ["--inputs", "pact"]),
    "bits": (1, BITS),
    "tp2": (2, ["--tp", "2"]),
    "tp2-sp": (2, ["--tp", "2", "--sp"]),
    "tp2-recompute": (2, ["--tp", "2", "--recompute", "full"]),
    "pp2": (2, ["--pp", "2"]),
    "dp2": (2, []),
    "bf16-dp2": (2, ["--bf16"]),
    "pact-tp2": (2, ["--tp", "2", "--inputs", "pact"]),
    "unsummed": (2, ["--tp", "2", "--sp", "--unsummed"]),
}
LAYOUTS = ["tp2", "tp2-sp", "tp2-recompute", "pp2", "dp2", "pact-tp2"]


def run(root: Path, jobs: dict[str, tuple[int, list[str]]]) -> dict[str, tuple[Path, dict]]:
    for processes in {count for count, _ in jobs.values()}:
        file = root / f"jobs{processes}.json"
        lines = [[str(root / n), *how] for n, (count, how) in jobs.items() if count == processes]
        file.write_text(json.dumps(lines))
        done = run_ranks(processes, WORKER, file, timeout=580)
        assert done.returncode == 0, done.stderr[-4000:]
    return {name: (root / name, json.loads((root / name / "result.json").read_text()))
            for name in jobs}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("learned"), JOBS)


def gradients(path: Path) -> dict[str, torch.Tensor]:
    """Of every learned scale, whole, by its key in checkpoints."""
    reader = FileSystemReader(path / "gradients")
    sizes = {k: m.size for k, m in reader.read_metadata().state_dict_metadata.items()
             if hasattr(m, "size")}  # fmt: skip
    found = {key: torch.zeros(size) for key, size in sizes.items()}
    load(found, storage_reader=reader, no_dist=True)
    return found


def reference(trained, name: str) -> tuple[Path, dict]:
    return trained["pact" if name.startswith("pact") else "tp1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_scales_are_those_of_one_process(trained, name):
    losses = [run[1]["losses"][0] for run in (reference(trained, name), trained[name])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6), "a code flipped: try another seed"
    expected, found = gradients(reference(trained, name)[0]), gradients(trained[name][0])
    assert found.keys() == expected.keys() and len(found) == 16  # 2 layers x 4 linears x 2 operands
    for key, gradient in expected.items():
        error = (found[key] - gradient).norm()
        assert error <= 1e-5 * gradient.norm(), key  # float32 sums in another order
    assert sum(bool(gradient.any()) for gradient in expected.values()) >= 14


@pytest.mark.slow
def test_without_the_sum_over_ranks_gradients_would_differ(trained):
    """Control of the test above: which gradients the sum changes is the table's last column."""
    expected, found = gradients(trained["tp1"][0]), gradients(trained["unsummed"][0])
    differing = {k for k in expected if (found[k] - expected[k]).norm() > 0.01 * expected[k].norm()}
    assert differing == {k for k in expected if "linear_fc1.weight" not in k}  # groups: own ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_learned_scales_are_those_of_one_process(trained, name):
    (root, expected), (other, found) = reference(trained, name), trained[name]
    # float32 sums in another order flip single codes, as in test_layouts.py
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-3)
    assert found["grad_norms"][0] == pytest.approx(expected["grad_norms"][0], rel=1e-5)
    start, first, second = (
        CheckpointReader(path) for path in (root / "ptq", root / "qat", other / "qat")
    )
    moved = apart = total = 0.0
    for key in gradients(root):
        before, here, there = (reader.read(key) for reader in (start, first, second))
        assert (here > 0).all() and not torch.equal(here, before), key  # trained and stored
        moved += float(((here - before) / before).norm())
        apart += float(((there - here) / before).norm())
        total += 1
    assert moved / total > 1e-3
    assert apart < 0.05 * moved  # Adam divides small gradients by their own size


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in JOBS if name != "unsummed"])
def test_scales_and_optimizer_resume_bit_for_bit(trained, name):
    assert trained[name][1]["resumed_alike"]


@pytest.mark.slow
def test_a_new_process_resumes_scales_at_another_layout(trained, tmp_path):
    root, whole = trained["tp2-sp"]
    job = {"resumed": (1, ["--resume", str(root / "qat")])}
    directory, found = run(tmp_path, job)["resumed"]
    assert found["losses"] == pytest.approx(whole["ahead"], rel=2e-3)
    assert found["losses"] != pytest.approx(whole["losses"], rel=2e-3)  # control: not steps 1, 2
    before, after = CheckpointReader(root / "qat"), CheckpointReader(directory / "ptq")
    for key in gradients(trained["tp1"][0]):
        assert torch.equal(before.read(key), after.read(key)), key


@pytest.mark.slow
def test_bf16_follows_fp32_within_its_rounding(trained):
    expected, found = trained["tp1"][1], trained["bf16-dp2"][1]
    assert found["losses"] == pytest.approx(expected["losses"], rel=3e-2)
    assert found["losses"] != expected["losses"]


@pytest.mark.slow
def test_scales_have_optimizer_groups_with_their_own_rate_and_decay(trained):
    lsq = [1e-4, 0.0, 0.0]
    assert trained["tp1"][1]["groups"] == [lsq]
    # Of the clip value 127 * scale: rate 0.01, decay 0.1 a unit of rate.
    pact = [pytest.approx(0.01 / 127), pytest.approx(0.1 * 127), 127.0]
    assert sorted(trained["pact"][1]["groups"]) == [pact, lsq]


@pytest.mark.slow
def test_weights_have_the_levels_of_each_stage_also_after_resume(trained):
    # Steps 0, 1, 2, 3; then, resumed from the checkpoint after two steps, 2 and 3 again.
    levels = trained["bits"][1]["levels"]
    for found, most in zip(levels, (255, 64, 64, 16, 64, 16), strict=True):
        assert most / 4 < found <= most
    assert max(trained["tp1"][1]["levels"]) <= 16


@pytest.mark.slow
def test_a_run_from_config_to_export_serves_the_learned_scales(tmp_path):
    """The exported model is verified against the trained one, which computes with learned scales."""
    done = torchrun(
        2, QAT, "--config", ROOT / "conf" / "qat_tiny.yaml", f"exp_manager.exp_dir={tmp_path}",
        "trainer.max_steps=4", "model.pretrain.max_steps=6", "model.sequence_parallel=true",
        "model.pipeline_model_parallel_size=1", "model.optim.sched.warmup_steps=0",
        "quantization.algorithm=int4_w_int8_a", "quantization.group_size=64",
        "quantization.compare_with_finetuned=false", "quantization.bit_schedule=[[0,8],[2,4]]",
        "quantization.weight_scales=lsq", "quantization.lsq_lr=0.001",
        "quantization.input_scales=pact", "quantization.inputs_after_n_steps=1",
        "export.format=hf", timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    export = json.loads((tmp_path / "summary.json").read_text())["export"]
    assert export["verified"] and export["compared_with_checkpoint"]
    before = CheckpointReader(tmp_path / "checkpoints" / "ptq")
    after = CheckpointReader(tmp_path / "checkpoint")
    for kind in ("weight", "input"):
        key = f"quantizers.decoder.layers.0.mlp.linear_fc2.{kind}_scale"
        assert not torch.equal(before.read(key), after.read(key))
