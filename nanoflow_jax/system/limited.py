"""What templates and regular expressions of others come to, in a process of their own that has limits of time and
memory: those of a task file or a model folder may never end, or take all memory there is."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

from nanoflow_jax.system.limited_worker import MEMORY
from nanoflow_jax.system.reading import one_line

SECONDS = 10.0  # of processor time


class LimitedError(ValueError):
    """The work failed, or was ended at a limit; the message is one line without a subject."""


class Worker:
    """A process that does one piece of work at a time (`limited_worker.WORK`), started when it is first needed and
    again after one that had to be ended."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock, self._seconds, self._owner = threading.Lock(), seconds, os.getpid()
        atexit.register(self.stop)

    def ask(self, do: str, **job: Any) -> Any:
        """Raises LimitedError."""
        try:
            line = json.dumps({"do": do, **job}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise LimitedError(f"it is given what is no plain data ({one_line(str(error))})") from None
        with self._lock:
            try:
                answer = self._exchange(line)
            except BaseException:  # an interrupt: an answer that nobody read must not be taken for the next one's
                self.stop()
                raise
        if "error" in answer:
            raise LimitedError(one_line(answer["error"], 300))
        return answer["found"]

    def _exchange(self, line: bytes) -> dict[str, Any]:
        process = self._process = self._process or _start(self._seconds)
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError:
            pass
        if answer := process.stdout.readline():
            return json.loads(answer)
        status = process.wait()
        self.stop()
        if status == -signal.SIGPROF:
            return {"error": f"it did not end within {self._seconds:g} seconds"}
        return {"error": f"its process ended (status {status}); accepted: what takes less than {MEMORY >> 30} GiB"}

    def stop(self) -> None:
        """Ends the process; the next piece of work starts another."""
        process, self._process = self._process, None
        if process is not None and os.getpid() == self._owner:  # a fork has no part in it
            process.kill()
            process.communicate()


def _start(seconds: float) -> subprocess.Popen[bytes]:
    # -P: the folder of the program, this package, is no place to import from.
    return subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("limited_worker.py")), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )


@cache
def _worker_of(process: int) -> Worker:
    return Worker()


def ask(do: str, **job: Any) -> Any:
    """By the worker of this process: one that was forked has its own. Raises LimitedError."""
    return _worker_of(os.getpid()).ask(do, **job)
