"""What a run says about itself at its end."""

import json
from pathlib import Path

import pytest

from mqat.config import load_config
from mqat.errors import UserError

TINY = Path(__file__).parents[3] / "conf" / "sft_tiny.yaml"


def summary_of(recipe, directory, *overrides):
    """What a recipe leaves, run on one process with a few tiny batches."""
    small = [
        "trainer.limit_val_samples=4", "trainer.max_steps=1", "model.global_batch_size=4",
        "model.data.seq_length=32", "quantization.num_calib_size=4", "trainer.precision=32",
    ]  # fmt: skip
    recipe(load_config(TINY, [*small, f"exp_manager.exp_dir={directory}", *overrides]))
    return json.loads((directory / "summary.json").read_text())


@pytest.mark.parametrize(
    ("ptq", "qat", "share"),
    [
        (30.0, 25.0, 0.5),
        (30.0, 20.0, 1.0),
        (20.05, 24.0, None),  # a ratio would be -7900%
        (19.0, 18.0, None),
    ],
)
def test_no_share_is_recovered_of_a_gap_that_is_noise(ptq, qat, share):
    from mqat.training.recipes import gap_recovered

    assert gap_recovered({"bf16": 21.0, "bf16_finetuned": 20.0, "ptq": ptq, "qat": qat}) == share


def test_without_ptq_there_is_no_gap():
    from mqat.training.recipes import gap_recovered

    assert gap_recovered({"bf16": 21.0, "qat": 20.0}) is None


def test_a_calibrated_checkpoint_is_measured_and_fine_tuned_unquantized(tmp_path):
    from mqat.training.recipes import run_ptq, run_sft

    rule = "quantization.rules=[{pattern: '*', weight: {format: int2, granularity: tensor}}]"
    first = summary_of(run_ptq, tmp_path / "ptq", rule)
    start = f"model.restore_from_path={tmp_path / 'ptq' / 'checkpoint'}"
    then = summary_of(
        run_sft, tmp_path / "sft", rule, start, "model.architecture=null", "export.format=null"
    )
    assert first["loss"]["ptq"] != first["loss"]["bf16"]  # control: the two can be told apart
    assert then["loss"]["bf16"] == first["loss"]["bf16"]


def test_fine_tuning_does_what_pretrain_and_export_ask_for(tmp_path):
    from mqat.training.recipes import run_sft

    asked = summary_of(run_sft, tmp_path, "model.pretrain.max_steps=2", "export.format=hf")
    assert asked["tokens"].keys() == {"pretrain", "sft"}
    assert asked["export"]["verified"] and (tmp_path / "hf" / "config.json").is_file()


def test_adapters_that_nothing_would_train_are_refused():
    from mqat.training.recipes import run_ptq

    with pytest.raises(UserError, match=r"model\.peft: ptq trains nothing"):
        run_ptq(
            load_config(None, ["model.peft.peft_scheme=lora", "model.data.packaged=python_docs"])
        )
