"""SIGTERM and Ctrl-C: what runs ends at once, or (steps of training, saving) when it is done.

`command_line` installs the one handler; what runs inside says how a signal is to be obeyed:
`stop_request` notes it, `ends_at_once` says what is given up, `undisturbed` obeys it afterwards.
"""

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


class Interrupted(BaseException):
    """A run ended early on request; no fault, so nothing that answers for errors catches it.

    Attributes:
        number: Of the signal.
        is_agreed: Every rank raises it at the same place, where nothing waits for another rank.
    """

    def __init__(self, message: str, number: int, *, is_agreed: bool = False) -> None:
        super().__init__(message)
        self.number, self.is_agreed = number, is_agreed


class StopRequest:
    """Whether this process was asked to end; the signal handler.

    Attributes:
        number: The signal; 0: none so far.
        running: What runs, outermost first: a name, which a signal ends at once, or None, during which
            it is only noted.
    """

    def __init__(self) -> None:
        self.number = 0
        self.running: list[str | None] = []
        self._since = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The first request is noted or obeyed, a later one ends the process as signals do."""
        if not self.number:
            self.number, self._since = number, time.monotonic()
            self.obey()
        elif time.monotonic() - self._since > _SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def obey(self) -> None:
        """Ends what runs, unless it is only to note the signal.

        Raises:
            Interrupted: Says what was not finished.
        """
        what = self.running[-1] if self.running else None
        if self.number and what is not None:
            raise Interrupted(
                f"{signal.Signals(self.number).name}: {what} was not finished; nothing of it is left, "
                "and the same command begins it again.",
                self.number,
            )


@contextmanager
def _running(what: str | None) -> Iterator[StopRequest]:
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()  # signals reach the main thread alone
        return
    found = signal.getsignal(SIGNALS[0])
    request = found if isinstance(found, StopRequest) else StopRequest()
    before = {number: signal.signal(number, request) for number in SIGNALS}
    request.running.append(what)
    try:
        yield request
    finally:
        request.running.pop()
        is_ending = request.number and what is not None and not request.running
        if not is_ending:  # or what torchrun repeats would cut off the command's last words
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Notes signals instead of obeying them, where this is the main thread (others get none)."""
    with _running(None) as request:
        yield request


@contextmanager
def ends_at_once(what: str) -> Iterator[StopRequest]:
    """A signal ends what runs inside at once; `what` is the beginning of a sentence about it.

    Raises:
        Interrupted: Likely on some ranks alone, in the middle of whatever they do.
    """
    with _running(what) as request:
        yield request


@contextmanager
def undisturbed() -> Iterator[None]:
    """What runs inside is done as a whole; a signal that comes meanwhile is obeyed afterwards."""
    with _running(None) as request, children_outlive_signals():
        yield
    if request.running:
        request.obey()
    elif request.number:  # nobody around that answers: as without this
        os.kill(os.getpid(), request.number)


@contextmanager
def children_outlive_signals() -> Iterator[None]:
    """Processes started inside (checkpoint writers) do not see what the terminal sends to all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
