"""Ranks that differ in something decide alike, and none of them waits for another for ever."""

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks

WORKER = Path(__file__).with_name("agreement_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found, and the job's output."""
    out = tmp_path_factory.mktemp("agreement")
    done = run_ranks(2, WORKER, out, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)], done.stdout


@pytest.mark.parametrize("layout", ["tp", "pp", "dp"])
def test_every_rank_sees_a_poisoned_gradient_of_one_and_names_the_parameter(ranks, layout):
    (first, second), _ = ranks
    assert first[layout] == second[layout] == "nan ['decoder.layers.1.mlp.linear_fc2.weight']"


def test_a_full_disk_is_one_line_and_a_fault_while_saving_is_not(ranks):
    for rank, found in enumerate(ranks[0]):
        for name in ("disk", "wrapped disk"):
            kind, message = found["saves"][name]
            assert kind == "UserError" and "step_1: writing the checkpoint failed: " in message
            assert "[Errno 28]" in message
        for name, kind in (
            ("fault", "TypeError"), ("wrapped fault", "CheckpointException"), ("shape", "RuntimeError"),
        ):  # fmt: skip
            assert found["saves"][name][0] == ("RuntimeError", kind)[rank]
            assert "disk" not in found["saves"][name][1]


def test_auto_precision_is_the_first_ranks_and_the_difference_is_told(ranks):
    (first, second), output = ranks
    assert first["dtypes"] == ["torch.bfloat16", "torch.bfloat16"]
    assert second["dtypes"] == ["torch.bfloat16", "torch.float32"]  # alone it would be float32
    assert "precision: auto differs between the machines" in output


def test_a_report_that_cannot_be_written_ends_every_rank(ranks):
    for found in ranks[0]:
        assert found["report"] == "the report cannot be written"
