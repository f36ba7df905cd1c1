"""Standard error of a process that follows another, with the end of that one in one line.

When process 0 is killed, JAX ends the others at once, from a thread of its own, with a page of C++ trace. This filter
is a process of its own that reads what they print: `python last_words.py` copies its input to standard error.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator

_FROM_COORDINATION = re.compile(
    rb"[EWF]\d{4} \S+ +\d+ (preemption_sync_manager|coordination_service\w*|client)\.\w+:\d+\]"
)
_FATAL = b"Terminating process because the JAX distributed service detected fatal errors"
GONE = b"nanoflow: process 0 is gone; what was written stays, start all processes again to go on\n"


def filtered(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines as they come. Those of JAX's coordination, and what follows them, are kept back: they are told at the
    end, or replaced by GONE where they say that the process ends for want of process 0."""
    kept: list[bytes] = []
    for line in lines:
        if line.startswith(b"nanoflow"):  # our own words
            yield line
        elif kept or _FROM_COORDINATION.match(line):
            kept.append(line)
        else:
            yield line
    yield from [GONE] if any(_FATAL in line for line in kept) else kept


def start() -> None:
    """Sends what this process prints to standard error, its C++ libraries included, through the filter."""
    sys.stderr.flush()
    process = subprocess.Popen([sys.executable, "-S", "-E", __file__], stdin=subprocess.PIPE)
    assert process.stdin is not None
    os.dup2(process.stdin.fileno(), 2)
    process.stdin.close()
    process.returncode = 0  # nobody waits for it: it ends when this process has ended


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for each in filtered(iter(sys.stdin.buffer.readline, b"")):
        sys.stderr.buffer.write(each)
        sys.stderr.buffer.flush()
