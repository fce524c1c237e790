"""Processes end with gloo's threads gone, and with the status they asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, torchrun

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


def threads_at_the_end(processes: int, ending: str) -> tuple[list[int], int, str]:
    """gloo's threads of every rank just before finalization, the status, and what stderr got."""
    done = torchrun(processes, HERE / "clean_end_worker.py", ending, timeout=300)
    return [int(n) for n in done.stdout.split() if n.isdigit()], done.returncode, done.stderr


def test_no_thread_of_gloo_outlives_a_script_that_keeps_its_model():
    assert threads_at_the_end(2, "return")[0] == [0, 0]
    kept = threads_at_the_end(2, "control")[0]
    assert len(kept) == 2 and min(kept) > 0  # control: destroying the groups is not enough


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [
        pytest.param("exit", 3, "", marks=pytest.mark.slow),
        ("user", 2, "error: group_size=7 does not fit"),
        ("fault", 1, "KeyError: 'a missing key'"),
    ],
)
def test_early_ends_leave_no_thread_either_and_keep_status_and_message(ending, status, said):
    threads, found, stderr = threads_at_the_end(1, ending)
    assert threads == [0] and found == status and said in stderr


def aborted(pairs: int, *arguments: str) -> int:
    command = [sys.executable, str(HERE / "clean_end_stress.py"), str(pairs), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, cwd=ROOT, check=True
    )
    return int(done.stdout.split("aborted:")[1])


@pytest.mark.slow
def test_ranks_that_end_right_after_a_collective_are_not_aborted():
    assert aborted(12) == 0
    assert aborted(12, "control") > 0  # a quarter of the ranks
