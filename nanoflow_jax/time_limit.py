"""A limit on the time that expressions of others take: templates and regular expressions of tasks and model folders."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SECONDS = 10.0  # a thousand times what the longest known takes


class TooLong(ValueError):
    """An expression has not come to an end."""


@contextmanager
def time_limit(seconds: float | None = None) -> Iterator[None]:
    """Raises TooLong in what runs longer than so many seconds (None: SECONDS), be it Python or a regular expression.
    By an alarm, which only the main thread can have: in others there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seconds = SECONDS if seconds is None else seconds

    def stop(_: int, __: FrameType | None) -> None:
        raise TooLong(f"it takes longer than {seconds:g} s")

    before, began = signal.signal(signal.SIGALRM, stop), time.monotonic()
    others, repeat = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if others:  # somebody else's alarm
            signal.setitimer(signal.ITIMER_REAL, max(others - (time.monotonic() - began), 1e-6), repeat)
