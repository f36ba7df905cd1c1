"""The process of a replica: an `LLM` in an actor of Ray, and what it says of itself.

Its engine runs in threads of their own: the process answers, whatever they do. One that does not is stopped or wedged,
which `front` sees. That an engine stands still is seen here: no step for STEP_SECONDS, and no program being compiled.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.engine import Engine
from nanoflow_jax.engine.feed import Score, Work, feed, room_ahead, score_of
from nanoflow_jax.engine.outputs import Gathered, GrowingOutput, prompt_output
from nanoflow_jax.engine.request import CompletionOutput, Logprob, Request, RequestMetrics, RequestOutput
from nanoflow_jax.plan.plan import SchedulePlan
from nanoflow_jax.step.compile import compile_step
from nanoflow_jax.weights.fingerprint import model_fingerprint

POLL_SECONDS = 0.1  # a replica that has nothing to tell answers after so long
STEP_SECONDS = 600.0  # no step takes so long


class Hung(RuntimeError):
    """An engine makes no step any more; the process has to be ended."""


@dataclass
class Growth:
    """What a watched completion has got since the last time; the last part has its finish_reason, and the prompt's
    output follows when all have ended."""

    part: CompletionOutput
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None


Found = RequestOutput | Score | Growth


@dataclass(frozen=True)
class About:
    """What a replica says when it is ready. capacity: requests that keep its engine full while messages travel."""

    process: int
    node: str
    gpus: str
    devices: int
    max_model_len: int
    prefill_rows: int
    capacity: int
    plan: SchedulePlan
    device_kind: str


class Replica:
    """An `LLM` in an actor of Ray, made by `make`, in a thread: the process answers while weights are loaded, too."""

    def __init__(self, make: Callable[..., Any], options: Mapping[str, Any], fingerprint: str, plan: str | None):
        self._calls: dict[int, _Call] = {}
        self._lock, self._error = threading.Lock(), None
        self._making = threading.Thread(target=self._make, args=(make, options, fingerprint, plan), daemon=True)
        self._making.start()

    def _make(self, make: Callable[..., Any], options: Mapping[str, Any], fingerprint: str, plan: str | None) -> None:
        try:
            self._llm = make(**options)
            self._about = _about(self._llm)
            node = self._about.node
            if model_fingerprint(self._llm.folder) != fingerprint:
                raise ConfigError(f"model: {options['model']} is another model on node {node}")
            check_plan(plan or self._llm.plan.identity, self._llm.plan, self._about.device_kind, node)
        except Exception as error:  # Ray would tell it with a page of traces
            self._error = cause_line(error)

    def about(self) -> About | None:
        """None: it is not ready yet. Raises ConfigError, one line, where it cannot be."""
        self._making.join(POLL_SECONDS)
        if self._making.is_alive():
            return None
        if self._error is not None:
            raise ConfigError(self._error)
        return self._about

    def exchange(self, call: int, new: list[Work], gone: list[int]) -> list[tuple[Any, Found]]:
        """Takes prompts of a call, whose keys are their numbers, and numbers that are not wanted any more; returns what
        has ended meanwhile and what watched ones have got, waiting a little. Raises Hung."""
        with self._lock:
            if call not in self._calls:
                self._calls[call] = _Call(self._llm)
        return self._calls[call].exchange(new, gone)

    def counts(self) -> dict[str, int]:
        return engine_counts(self._llm.engine)

    def close(self, call: int) -> None:
        """Ends what is unfinished of a call."""
        with self._lock:
            found = self._calls.pop(call, None)
        if found is not None:
            found.close()


def engine_counts(engine: Engine) -> dict[str, int]:
    """What can be added up over replicas."""
    pool = engine.scheduler.pool
    return {
        "preemptions": engine.scheduler.stats.preemptions,
        "steps": engine.num_steps,
        "running": engine.running.num_running,
        "slots": engine.running.count,
        "pages": pool.num_pages,
        "pages_in_use": pool.num_pages - pool.num_available,
    }


def _about(llm: Any) -> About:
    slots, device = llm.engine.running.count, llm.mesh.devices.flat[0]
    return About(
        process=os.getpid(),
        node=os.uname().nodename,
        gpus=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        devices=len(device.client.local_devices()),
        max_model_len=llm.max_model_len,
        prefill_rows=llm.prefill_rows,
        capacity=slots + room_ahead(llm.calls) + slots // 4 + 8,
        plan=llm.plan,
        device_kind=device.device_kind,
    )


class _Call:
    """A thread that keeps the engine full with the prompts of one call."""

    def __init__(self, llm: Any):
        self._changed = threading.Condition()
        self._new: deque[Work] = deque()
        self._works: dict[Any, Work] = {}  # that have not ended, by their numbers
        self._gone: set[Work] = set()
        self._found: list[tuple[Any, Found]] = []
        self._asked = False  # somebody waits for what is found
        self._closed = False
        self._moved = time.monotonic()  # when the engine last made a step, took a prompt, had none, or compiled
        self._failure: BaseException | None = None
        threading.Thread(target=self._work, args=(llm,), daemon=True).start()

    def exchange(self, new: list[Work], gone: list[int]) -> list[tuple[Any, Found]]:
        with self._changed:
            if not self._works:
                self._moved = time.monotonic()
            self._new.extend(new)
            self._works |= {work.key: work for work in new}
            if gone:
                self._gone |= {self._works.pop(number) for number in gone if number in self._works}
                self._new = deque(work for work in self._new if work not in self._gone)
            self._asked = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._found or self._failure, POLL_SECONDS)
            self._asked = False
            if self._failure is not None:
                raise self._failure
            found, self._found = self._found, []
            still = time.monotonic() - self._moved
            if self._works and still > 1 and _compiling():
                self._moved = time.monotonic()
            elif self._works and still > STEP_SECONDS and not found:
                raise Hung(f"no step for {still:.0f} s")
            return found

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _source(self) -> Iterator[Work | None]:
        while not self._closed:
            if (self._works or self._gone) and not self._new:
                yield None
                continue
            with self._changed:
                self._changed.wait_for(lambda: self._new or self._closed)
                if self._closed:
                    return
                item = self._new.popleft()
                self._moved = time.monotonic()
            yield item

    def _work(self, llm: Any) -> None:
        gathered, growing = Gathered(llm.tokenizer, llm.reasoning), dict[Request, GrowingOutput]()
        grown: dict[Request, Work] = {}
        try:
            with closing(feed(llm.calls, self._source(), gone=self._gone)) as steps:
                for ended, more in steps:
                    self._moved = time.monotonic()
                    if self._closed:
                        return
                    grown |= {request: work for work, request in more}
                    found: list[tuple[Any, Found]] = []
                    if grown and self._asked:  # what comes until then is one part
                        with llm.calls.alone():
                            found += [
                                (w.key, self._part(llm, r, growing)) for r, w in grown.items() if r.slot is not None
                            ]
                        grown.clear()
                    for work, request in ended:
                        grown.pop(request, None)
                        if work.scored_from is not None:
                            found.append((work.key, score_of(request)))
                            continue
                        if work.watched:
                            found.append((work.key, self._part(llm, request, growing)))
                        output = gathered.take(work, request)
                        if not gathered.is_open(work):
                            found.append((work.key, output))
                    if found:
                        with self._changed:
                            self._found += [(key, one) for key, one in found if key in self._works]
                            for key, one in found:
                                if not isinstance(one, Growth):
                                    self._works.pop(key, None)
                            self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _part(self, llm: Any, request: Request, growing: dict[Request, GrowingOutput]) -> Growth:
        logprobs = None
        if (output := growing.get(request)) is None:
            output = growing[request] = GrowingOutput(request, llm.tokenizer, llm.reasoning)
            logprobs = prompt_output(request, llm.tokenizer).prompt_logprobs
        if request.finish_reason:
            return Growth(growing.pop(request).finish(), request.metrics, logprobs)
        tokens = llm.engine.running.tokens[request.slot, : llm.engine.running.known[request.slot]]
        return Growth(output.take(tokens[output.num_tokens :].tolist()), request.metrics, logprobs)


def _compiling() -> bool:
    """Whether some thread compiles a program, which may take any time: what few requests want is compiled when the
    first one comes."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code is compile_step.__code__:
                return True
            frame = frame.f_back
    return False


def check_plan(wanted: str, plan: SchedulePlan, device: str, node: str) -> None:
    if (found := plan.identity) != wanted:
        raise ConfigError(
            f"plan: replicas would mix plans: {wanted}, and {found} on {device} of node {node}; accepted: the name of "
            "one plan for all"
        )


def cause_line(error: BaseException) -> str:
    """The cause that a user can act on, without the traces around it."""
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None and cause is not error:
        error = cause
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    if isinstance(error, ValueError):  # ConfigError and WeightsError are ValueErrors
        return " ".join(lines)
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"
