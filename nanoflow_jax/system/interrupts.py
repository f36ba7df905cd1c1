"""Ctrl-C during a long call: seen between two steps, and never lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Within, a Ctrl-C waits for the next call of the function given, which raises its KeyboardInterrupt; at the
    latest for the end.

    Python raises it wherever the main thread happens to be, and loses it when that is a garbage collector's callback
    (JAX has one) or a destructor. A second Ctrl-C is raised at once, for a step that never returns. Off the main
    thread, or where the program handles SIGINT in its own way, nothing is held.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield lambda: None
        return
    pressed = False

    def press(_: int, __: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, press)
    try:
        yield check
    except GeneratorExit:  # of the generator around it, which is closed early
        signal.signal(signal.SIGINT, before)
        check()
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    check()
