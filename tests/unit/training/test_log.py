"""`metrics.jsonl` has one line for each step, also of resumed runs."""

import json

import pytest

from mqat.training.log import RunLog


def steps(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [(entry["phase"], entry["step"]) for entry in map(json.loads, lines)]


def write(directory, phase, numbers):
    with RunLog(directory, enabled=True, tensorboard=False) as log:
        for number in numbers:
            log.metrics(phase, number, {"loss": 1.0})


def test_a_resumed_phase_takes_steps_again_and_has_each_once(tmp_path):
    write(tmp_path, "baseline", [1, 2])
    write(tmp_path, "qat", [1, 2, 3])
    with RunLog(tmp_path, enabled=True, tensorboard=False) as log:
        log.drop_steps_after("qat", 2)  # the checkpoint that it is resumed from
        log.metrics("qat", 3, {"loss": 0.5})
    assert steps(tmp_path) == [("baseline", 1), ("baseline", 2), ("qat", 1), ("qat", 2), ("qat", 3)]


def test_other_ranks_write_nothing(tmp_path):
    with RunLog(tmp_path, enabled=False, tensorboard=False) as log:
        log.drop_steps_after("qat", 0)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_line_cut_by_a_kill_is_dropped_and_a_damaged_one_named(tmp_path):
    write(tmp_path, "qat", [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "qat", "st')
    with RunLog(tmp_path, enabled=True, tensorboard=False) as log:
        log.drop_steps_after("qat", 2)
    assert steps(tmp_path) == [("qat", 1), ("qat", 2)]
    (tmp_path / "metrics.jsonl").write_text('{"phase": "qat", "step": 1}\n{"phase"\n')
    with (
        RunLog(tmp_path, enabled=True, tensorboard=False) as log,
        pytest.raises(ValueError, match=r"metrics\.jsonl:2: damaged"),
    ):
        log.drop_steps_after("qat", 1)
