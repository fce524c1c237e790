"""Adapters on a packed INT4-AWQ backbone, to the end: calibrate, pack, train, resume, export, verify."""

import json
import sys

import pytest

from mqat.cli.__main__ import main
from mqat.training.recipes import run_lora, run_ptq
from tests.unit.training.test_recipes import summary_of

AWQ = ["quantization.algorithm=int4_awq", "quantization.group_size=32"]


def test_adapters_on_a_calibrated_packed_backbone_are_served_on_its_export(
    tmp_path, monkeypatch, capsys
):
    ptq, run = tmp_path / "ptq", tmp_path / "lora"
    calibrated = summary_of(run_ptq, ptq, *AWQ, "export.format=hf")
    assert calibrated["export"]["verified"]
    start = [
        f"model.restore_from_path={ptq / 'checkpoint'}", "model.architecture=null", *AWQ,
        "model.peft.peft_scheme=lora", "model.peft.lora_tuning.adapter_dim=4", "model.optim.lr=0.01",
        "quantization.compress=true", "quantization.compare_with_finetuned=false",
        "export.format=peft", "exp_manager.checkpoint_interval=1", "exp_manager.resume_if_exists=true",
    ]  # fmt: skip
    found = summary_of(run_lora, run, *start, "trainer.max_steps=2")
    # The recipe's scales, not those of plain maxima; bf16 and packed products round otherwise.
    assert found["loss"]["ptq"] == pytest.approx(calibrated["loss"]["ptq_prepared"], rel=1e-4)
    assert found["loss"]["qat"] < found["loss"]["ptq"]
    more = "trainer.max_steps=4", "exp_manager.resume_changes=[trainer.max_steps]"
    resumed = summary_of(run_lora, run, *start, *more)
    assert "resumed from" in capsys.readouterr().out
    assert resumed["loss"]["qat"] < found["loss"]["qat"] and resumed["adapter"]["verified"]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]

    def verify(base):
        arguments = [run / "adapter", "--base", base, "--reference", run / "checkpoint", "--json"]
        monkeypatch.setattr(sys, "argv", ["mqat", "verify", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        report = json.loads(capsys.readouterr().out)
        assert end.value.code == (0 if report["ok"] else 1)
        return report

    report = verify(ptq / "hf")
    assert report["ok"] and report["compared_with_checkpoint"]
    summary_of(run_ptq, tmp_path / "other", *AWQ, "export.format=hf", "trainer.seed=5")
    assert not verify(tmp_path / "other" / "hf")["ok"]  # control: on another base
