"""Signals are noted while a model trains, and obeyed at a second request."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mqat.runtime import interruption
from mqat.runtime.groups import command_line
from mqat.runtime.interruption import (
    Interrupted,
    children_outlive_signals,
    ends_at_once,
    stop_request,
    undisturbed,
)


@pytest.fixture
def handlers():
    """A command leaves its handler in place when it was interrupted, as its process is ending."""
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_is_noted_and_handlers_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with stop_request() as request:
        assert request.number == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun repeats what the terminal has sent
        assert request.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_later_request_ends_the_process(tmp_path):
    code = """
import os, signal, time
from mqat.runtime import interruption
interruption._SAME_REQUEST_SECONDS = 0.0
with interruption.stop_request():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == -signal.SIGTERM


def test_checkpoint_writers_go_on_when_the_terminal_signals_all():
    with stop_request() as request:
        with children_outlive_signals():
            os.kill(os.getpid(), signal.SIGINT)
            child = subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input()"],
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
            assert child.stdout.readline() == b"up\n"
            child.send_signal(signal.SIGINT)
            time.sleep(0.2)
            assert child.poll() is None
            child.communicate(b"\n")
        assert request.number == signal.SIGINT and child.returncode == 0
    assert interruption.SIGNALS == (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_what_cannot_be_saved_ends_at_once_in_one_line(handlers, capsys, number):
    with pytest.raises(SystemExit) as ended, command_line(), ends_at_once("calibration"):
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")
    os.kill(os.getpid(), number)  # torchrun's repetition does not cut the last words off
    name = signal.Signals(number).name
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == (
        f"interrupted by {name}: calibration was not finished; nothing of it is left, and the same "
        "command begins it again.\n"
    )


def test_a_checkpoint_is_written_as_a_whole_first(handlers):
    done = []
    with (
        pytest.raises(Interrupted, match="evaluation was not finished"),
        ends_at_once("evaluation"),
    ):
        with undisturbed():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("written")
        done.append("went on")
    assert done == ["written"]


def test_while_training_the_loop_decides_when_a_saved_step_ends_it(handlers):
    with ends_at_once("the command"), stop_request() as request:
        with undisturbed():
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.number == signal.SIGTERM


def test_a_collective_that_the_others_have_left_is_no_fault_of_the_program(handlers, capsys):
    with pytest.raises(SystemExit) as ended, command_line(), stop_request():
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")
    assert ended.value.code == 128 + signal.SIGTERM
    assert "Traceback" not in capsys.readouterr().err


def test_where_nobody_answers_a_signal_does_what_it_does():
    code = """
import os, signal, time
from mqat.runtime.interruption import undisturbed
with undisturbed():
    os.kill(os.getpid(), signal.SIGTERM)
    print("whole", flush=True)
time.sleep(5)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, timeout=60, capture_output=True
    )
    assert done.returncode == -signal.SIGTERM and done.stdout == b"whole\n"
