"""Stopping at a step boundary when the process is asked to end."""

import signal
import threading
from types import FrameType


class Interrupted(SystemExit):
    """Ends the process after a checkpoint, with the exit code the signal calls for.

    Attributes:
      step: steps done, all of them in the checkpoint.
      signal_number: the signal that was received.
    """

    def __init__(self, signal_number: int, step: int):
        super().__init__(128 + signal_number)
        self.signal_number = signal_number
        self.step = step

    def __str__(self) -> str:
        name = signal.Signals(self.signal_number).name
        return f"{name}: saved after step {self.step}; the same command resumes"


class StopRequest:
    """Catches SIGTERM and SIGINT while open; a second signal acts at once.

    Handlers can be set by the main thread only: elsewhere, and with
    `enabled=False`, nothing is caught.
    """

    def __init__(self, *, enabled: bool = True):
        main = threading.current_thread() is threading.main_thread()
        self._enabled = enabled and main
        self._before = {}
        self.received: int | None = None

    def __enter__(self) -> "StopRequest":
        if self._enabled:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
