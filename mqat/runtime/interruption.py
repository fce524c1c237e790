"""SIGTERM and Ctrl-C while a model trains: its step is finished and saved, then all ranks end."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun hands on to its processes what a terminal has already sent them.
_SAME_REQUEST_SECONDS = 3.0


class Interrupted(Exception):  # noqa: N818  (no fault)
    """A run ended early on request, with its progress saved; the message says where and how to go on.

    Attributes:
        number: Of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class StopRequest:
    """Whether this process was asked to end.

    Attributes:
        number: The signal; 0: none so far.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: the first request is noted, a later one ends the process at once."""
        if not self.number:
            self.number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > _SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Notes signals instead of obeying them, where this is the main thread (others get none)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def children_outlive_signals() -> Iterator[None]:
    """Processes started inside (checkpoint writers) do not see what the terminal sends to all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
