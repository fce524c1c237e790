"""`metrics.jsonl` has one line for each step, also of resumed runs."""

import json

import pytest

from mqat.training.log import LossTrend, RunLog
from mqat.training.loggers import TensorBoard


def steps(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [(entry["phase"], entry["step"]) for entry in map(json.loads, lines)]


def write(directory, phase, numbers):
    with RunLog(directory, enabled=True) as log:
        for number in numbers:
            log.metrics(phase, number, {"loss": 1.0})


def test_a_resumed_phase_takes_steps_again_and_has_each_once(tmp_path):
    write(tmp_path, "baseline", [1, 2])
    write(tmp_path, "qat", [1, 2, 3])
    with RunLog(tmp_path, enabled=True) as log:
        log.drop_steps_after("qat", 2)  # the checkpoint that it is resumed from
        log.metrics("qat", 3, {"loss": 0.5})
    assert steps(tmp_path) == [("baseline", 1), ("baseline", 2), ("qat", 1), ("qat", 2), ("qat", 3)]


def test_other_ranks_write_nothing(tmp_path):
    with RunLog(tmp_path, enabled=False) as log:
        log.drop_steps_after("qat", 0)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_line_cut_by_a_kill_is_dropped_and_a_damaged_one_named(tmp_path):
    write(tmp_path, "qat", [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "qat", "st')
    with RunLog(tmp_path, enabled=True) as log:
        log.drop_steps_after("qat", 2)
    assert steps(tmp_path) == [("qat", 1), ("qat", 2)]
    (tmp_path / "metrics.jsonl").write_text('{"phase": "qat", "step": 1}\n{"phase"\n')
    with (
        RunLog(tmp_path, enabled=True) as log,
        pytest.raises(ValueError, match=r"metrics\.jsonl:2: damaged"),
    ):
        log.drop_steps_after("qat", 1)


def test_without_a_terminal_a_phase_prints_a_line_every_few_steps(tmp_path, capsys):
    values = {
        "lr": 1e-5,
        "grad_norm": 0.5,
        "tokens_per_second": 812.4,
        "peak_memory_bytes": 3 << 30,
    }
    with RunLog(tmp_path, enabled=True) as log:
        with log.steps("qat", 25, 4, every_n_steps=10) as report:
            for number in range(5, 26):
                report.step(number, values | {"loss": 2.5})
        report.step(25, values | {"loss": 2.5, "validation_loss": 2.75})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:4]] == ["5/25", "10/25", "20/25", "25/25"]
    assert "loss 2.5000  lr 1e-05  grad norm 0.5  812 tokens/s  0:00:00 left  3.0 GiB" in lines[0]
    assert lines[5] == "  qat 25/25  validation loss 2.7500"
    assert len(steps(tmp_path)) == 22


def test_a_loss_that_rises_for_good_is_said_once_and_noise_never():
    noise = LossTrend()
    assert not any(noise.begins_to_diverge(3.0 + (-1) ** n) for n in range(200))
    trend = LossTrend()
    said = [trend.begins_to_diverge(3.0 if n < 50 else 3.0 + 0.1 * (n - 50)) for n in range(80)]
    assert sum(said) == 1 and 50 < said.index(True) < 65


def test_tensorboard_has_figures_text_and_hyperparameters(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, enabled=True, loggers=[TensorBoard(tmp_path)]) as log:
        log.metrics("qat", 1, {"loss": 2.0})
        log.measured("qat", 2.5, 12.2, {"The def": "statement"})
        log.hyperparameters({"model.optim.lr": 1e-4, "export.style": None}, {"qat": 12.2})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"qat/loss", "held_out_loss/qat", "perplexity/qat"} <= set(events.Tags()["scalars"])
    assert events.Scalars("perplexity/qat")[0].value == pytest.approx(12.2)
    (text,) = [
        events.Tensors(tag)[0].tensor_proto.string_val[0]
        for tag in events.Tags()["tensors"]
        if tag.startswith("samples/The def")
    ]
    assert b"**qat**" in text and b"statement" in text
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model.optim.lr" in hparams and b"export.style" in hparams
