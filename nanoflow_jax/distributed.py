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
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.joined import FollowingEngine
from nanoflow_jax.parallel import last_words
from nanoflow_jax.parallel.processes import PEER_TIMEOUT, PeerError, Processes, join, joined
from nanoflow_jax.schedule.plan import SchedulePlan, parse_plan

__all__ = ["PEER_TIMEOUT", "PeerError", "Processes", "follow", "join", "joined", "lead", "leave", "run"]


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
            llm = LLM(**options_from(message["llm"]), progress=False)
        elif "step" in message:
            assert llm is not None and isinstance(llm.engine, FollowingEngine)
            llm.engine.follow(message)
        else:
            processes.leave(0)
            return 0


def lead(options: dict[str, Any]) -> None:
    """Makes the processes that follow this one make an LLM with the same options. Does nothing when there are none.

    Raises ConfigError when there are other processes that cannot be led.
    """
    processes = joined()
    if processes is not None and processes.leads:
        processes.send({"llm": options_for(options)})
    elif processes is None and jax.process_count() > 1:
        raise ConfigError(
            f"distributed: jax.distributed has {jax.process_count()} processes; join them with "
            "nanoflow_jax.distributed.join() in its place"
        )


def leave(status: int = 0, reason: str = "") -> None:
    """Process 0: ends the others too. With another status than 0 they end with `reason`, and this call ends the
    process. Does nothing when no processes have been joined."""
    processes = joined()
    if processes is None:
        return
    if status == 0 and processes.leads:
        processes.send({"end": 0})
    processes.leave(status, reason)


def options_for(options: dict[str, Any]) -> dict[str, Any]:
    """Options of an LLM, for JSON."""

    def simple(value: Any) -> Any:
        if isinstance(value, SchedulePlan):
            return asdict(value)
        return str(value) if isinstance(value, Path) else value

    return {name: simple(value) for name, value in options.items()}


def options_from(found: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `options_for`."""
    plan = found["plan"]
    if isinstance(plan, dict):
        found = {**found, "plan": parse_plan(plan["name"], _without_none(plan))}
    return found


def _without_none(plan: dict[str, Any]) -> dict[str, Any]:
    """As a plan's file would have it: no name, and no fields that say nothing."""
    found: dict[str, Any] = {}
    for name, value in plan.items():
        if name == "name" or value is None:
            continue
        if name == "nano_batches":
            value = [{k: v for k, v in batch.items() if v is not None} for batch in value]
        elif name == "lanes":
            value = {op: {k: v for k, v in lane.items() if v is not None} for op, lane in value.items()}
        elif name == "splits":
            value = {op: list(sizes) for op, sizes in value.items()}
        elif name == "order":
            value = list(value)
        found[name] = value
    return found


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
