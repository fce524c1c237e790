"""An error of one rank ends all ranks, and the output says whose it was."""

from pathlib import Path

from tests.launch import torchrun

WORKER = Path(__file__).with_name("errors_worker.py")


def test_a_users_error_of_the_last_rank_is_one_line():
    done = torchrun(2, WORKER, "user")
    assert done.returncode
    assert done.stderr.count("error: group_size=7 does not fit") == 1
    assert "Traceback (most recent call last):\n  File" not in done.stderr.split("error: ")[0]


def test_a_fault_of_the_last_rank_keeps_its_traceback():
    done = torchrun(2, WORKER, "fault")
    assert done.returncode
    assert "KeyError: 'a missing key'" in done.stderr
    assert "raise ERRORS[sys.argv[1]]" in done.stderr  # where it came from
    assert "error: " not in done.stderr.split("Traceback")[0]


def test_a_script_without_a_guard_is_told_so_and_ends(tmp_path):
    worker = Path(__file__).with_name("unguarded_worker.py")
    done = torchrun(2, worker, tmp_path / "checkpoint")
    assert done.returncode != 0 and "if __name__ == '__main__'" in done.stderr
    assert not (tmp_path / "checkpoint").exists()
