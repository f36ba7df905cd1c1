"""One replica over several processes: process 0 runs the program, the others follow it.

from nanoflow_jax import LLM, distributed

processes = distributed.join()      # SLURM, Kubernetes; elsewhere join("host:port", 2, process_id)
if not processes.leads:
    raise SystemExit(distributed.follow())
llm = LLM(...)                      # over the devices of all processes
...
distributed.leave()
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType

from nanoflow_jax.engine.multiprocess import FollowerEngine, options_from
from nanoflow_jax.parallel import last_words
from nanoflow_jax.parallel.processes import PEER_TIMEOUT, PeerError, Processes, join, joined

__all__ = ["PEER_TIMEOUT", "PeerError", "Processes", "follow", "join", "joined", "leave", "run"]


def run(work: Callable[[], int], report: Callable[[BaseException], int]) -> int:
    """`work` in process 0, `follow` in the others; then all leave. Returns the exit status, which is `report`'s (it
    prints a line) after an error; where it is not 0 and the others could wait for this process, ends it instead."""
    processes = joined()
    assert processes is not None, "call join first"
    _keep_stdout_clean()
    if not processes.leads:
        last_words.start()
    reason = ""
    try:
        status = work() if processes.leads else follow()
    except BaseException as error:
        try:
            status, reason = report(error), _line(error)
        except BaseException:
            traceback.print_exc()
            status, reason = 1, _line(error)
    leave(status, reason or f"exit status {status}")
    return status


def follow() -> int:
    """Does what process 0 does, model after model, until it leaves. Returns the exit status: 0, or 1 when process 0
    failed.

    This process needs no input and writes no output; the model's folder must be here under the same name. Ctrl-C here
    does nothing: process 0 decides.
    """
    processes = joined()
    assert processes is not None and not processes.leads, "call join first; process 0 leads"
    _ignore_interrupts(processes)  # ahead of the import, which takes seconds
    from nanoflow_jax.api import LLM

    llm: LLM | None = None
    while True:
        message = processes.receive()
        if "llm" in message:
            llm = None  # its memory, before the next one's
            llm = LLM(**options_from(message["llm"]))
        elif "step" in message:
            assert llm is not None and isinstance(llm.engine, FollowerEngine)
            llm.engine.follow(message)
        else:
            processes.leave(0)
            return 0


def leave(status: int = 0, reason: str = "") -> None:
    """Process 0: ends the others too. With another status than 0 they end with `reason`, and this call ends the
    process. Does nothing when no processes have been joined."""
    processes = joined()
    if processes is None:
        return
    if status == 0 and processes.leads:
        processes.send({"end": 0})
    processes.leave(status, reason)


def _keep_stdout_clean() -> None:
    """Sends what libraries print (Gloo and NCCL do) to stderr, and leaves stdout to results."""
    sys.stdout.flush()
    results = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding)
    os.dup2(2, 1)
    sys.stdout = results


def _line(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else " ".join(str(error).split()) or repr(error)


def _ignore_interrupts(processes: Processes) -> None:
    if threading.current_thread() is not threading.main_thread():
        return

    def press(_: int, __: FrameType | None) -> None:
        print(f"process {processes.rank} follows process 0: interrupt that one", file=sys.stderr)

    signal.signal(signal.SIGINT, press)
