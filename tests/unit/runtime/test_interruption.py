"""Signals are noted while a model trains, and obeyed at a second request."""

import os
import signal
import subprocess
import sys
import time

from mqat.runtime import interruption
from mqat.runtime.interruption import children_outlive_signals, stop_request


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
