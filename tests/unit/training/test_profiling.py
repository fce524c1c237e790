"""A window of steps under the profiler."""

import json

import torch

from mqat.experiment_config import ProfileConfig
from mqat.training.profiling import ProfiledSteps


def run(directory, settings, steps=5):
    profiled = ProfiledSteps(settings, directory, "qat")
    said = []
    for step in range(1, steps + 1):
        profiled.before(step)
        torch.ones(step, 7).matmul(torch.ones(7, 3))
        said.append(profiled.after(step))
    return said, profiled


def test_the_window_is_written_when_it_ends(tmp_path):
    said, _ = run(tmp_path, ProfileConfig(start_step=2, end_step=3))
    assert [s is not None for s in said] == [False, False, True, False, False]
    events = json.loads((tmp_path / "qat_rank0.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::matmul" for event in events) == 2  # steps 2 and 3
    assert "aten::matmul" in (tmp_path / "qat_rank0.txt").read_text()
    assert not list(tmp_path.glob(".*"))


def test_a_phase_that_ends_within_the_window_leaves_what_it_has(tmp_path):
    said, profiled = run(tmp_path, ProfileConfig(start_step=2, end_step=9), steps=3)
    assert said == [None] * 3 and "profile of steps 2 on" in profiled.close()
    assert (tmp_path / "qat_rank0.json").is_file() and profiled.close() is None


def test_other_ranks_and_other_steps_are_not_profiled(tmp_path):
    for settings in (ProfileConfig(), ProfileConfig(start_step=1, end_step=2, ranks=[3])):
        run(tmp_path, settings)
    assert not list(tmp_path.iterdir())
