"""When each step was dispatched and when the device had finished it, and what the time of a run went into.

One step's time is split without remainder. Before the device begins it, it may have waited for the host; while it
runs, each of the step's rows has the same share of the time, and a row is new work, work done again, or empty.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.engine import Engine
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.sampler import StepOutput
from nanoflow_jax.step.slots import StepInputs

PLATEAU = 0.95  # of the usual number of running requests: the ramp is over
SWITCH_SECONDS = 2e-4  # a thread that has seen the device finish must not wait long for the interpreter


@dataclass
class TimedStep:
    """One step. Times are of time.perf_counter; counts of rows are those in use; the rest is the scheduler's state
    when the step was dispatched."""

    shape: StepShape
    decode_rows: int
    prefill_rows: int
    running: int
    waiting: int
    ended: int  # requests, since the run began
    refused: bool  # a request had to wait for pages
    recomputed_tokens: int  # computed again after preemptions, since the run began
    dispatched: float  # before the call that starts it
    finished: float = 0.0  # its tokens were there
    prompt_tokens: int = 0  # of requests admitted since the run began
    cached_tokens: int = 0  # of those, found in kept pages
    dispatching: float = 0.0  # seconds that the call took

    @property
    def rows_used(self) -> int:
        return self.decode_rows + self.prefill_rows


class StepClock:
    """Stands between an engine and its runner and keeps a TimedStep of each step. Use as a context manager; `steps` is
    complete when it is left.

    A thread waits for each step's tokens, so that the engine's own work does not hide when the device had finished.
    """

    def __init__(self, engine: Engine):
        self.steps: list[TimedStep] = []
        self.ended = 0  # the caller counts
        self._engine, self._runner = engine, engine.runner
        self._refused = engine.scheduler.stats.refused_for_pages
        self._queue: queue.SimpleQueue[tuple[TimedStep, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> StepClock:
        engine: Any = self._engine
        engine.runner = self
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.runner = self._runner
        sys.setswitchinterval(self._interval)
        self._queue.put(None)
        self._thread.join()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def dispatch(self, shape: StepShape, inputs: StepInputs) -> StepOutput:
        scheduler, sizes = self._engine.scheduler, self._runner.sizes
        refused = scheduler.stats.refused_for_pages
        step = TimedStep(
            shape,
            decode_rows=int((inputs.slots[: shape.decode_rows] < sizes.slots).sum()),
            prefill_rows=int(inputs.prefill_starts[-1]),
            running=self._engine.running.num_running,
            waiting=len(scheduler.waiting),
            ended=self.ended,
            refused=refused > self._refused,
            recomputed_tokens=scheduler.stats.recomputed_tokens,
            dispatched=time.perf_counter(),
            prompt_tokens=scheduler.stats.prompt_tokens,
            cached_tokens=scheduler.stats.cached_tokens,
        )
        self._refused = refused
        output = self._runner.dispatch(shape, inputs)
        step.dispatching = time.perf_counter() - step.dispatched
        self.steps.append(step)
        self._queue.put((step, output.sampled.tokens))
        return output

    def _watch(self) -> None:
        while (item := self._queue.get()) is not None:
            step, tokens = item
            with suppress(Exception):  # the engine meets the same error and deals with it
                tokens.block_until_ready()
            step.finished = time.perf_counter()


@dataclass(frozen=True)
class Window:
    """The steady part of a run: steps [first, last) of those given."""

    steps: tuple[TimedStep, ...]
    started: float  # when the step before the first had finished
    requests_ended: int
    plateau: int  # running requests, usually
    share_of_run: float

    @property
    def seconds(self) -> float:
        return self.steps[-1].finished - self.started

    @property
    def busy(self) -> np.ndarray:
        """Seconds the device took for each step."""
        return self._spans()[1]

    @property
    def idle(self) -> np.ndarray:
        """Seconds the device had nothing to do before each step."""
        return self._spans()[0]

    def _spans(self) -> tuple[np.ndarray, np.ndarray]:
        finished = np.maximum.accumulate([self.started, *(s.finished for s in self.steps)])
        began = np.clip([s.dispatched for s in self.steps], finished[:-1], finished[1:])
        return began - finished[:-1], finished[1:] - began

    @property
    def recomputed_rows(self) -> int:
        return self.steps[-1].recomputed_tokens - self.steps[0].recomputed_tokens

    @property
    def tokens(self) -> int:
        """Prompt and output tokens computed; those computed again do not count."""
        return sum(s.rows_used for s in self.steps) - self.recomputed_rows

    @property
    def prompt_tokens(self) -> int:
        """Of the requests that were admitted in the window."""
        return self.steps[-1].prompt_tokens - self.steps[0].prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """Of those prompt tokens, the ones found in kept pages, so not computed."""
        return self.steps[-1].cached_tokens - self.steps[0].cached_tokens

    @property
    def served_tokens(self) -> int:
        """Prompt and output tokens that users got the work of: those computed, and those found."""
        return self.tokens + self.cached_tokens


class Unsteady(ConfigError):
    """A run that was too short for a steady state."""


def _window(steps: Sequence[TimedStep], first: int, last: int, plateau: int) -> Window:
    inside, started = tuple(steps[first:last]), steps[first - 1].finished
    share = (inside[-1].finished - started) / (steps[-1].finished - steps[0].dispatched)
    return Window(inside, started, inside[-1].ended - inside[0].ended, plateau, share)


def later_half(steps: Sequence[TimedStep]) -> Window:
    """Of a run without a steady state: its steps while requests waited, from half of its time on."""
    fed = next((i for i, s in enumerate(steps) if i and s.waiting == 0), len(steps))
    fed = max(fed, 2)
    middle = (steps[0].dispatched + steps[fed - 1].finished) / 2
    first = max(1, next((i for i, s in enumerate(steps[:fed]) if s.finished > middle), fed - 1))
    return _window(steps, first, fed, int(np.median([s.running for s in steps[first:fed]])))


def steady_window(steps: Sequence[TimedStep], requests: int, enough: int, *, cut: bool = False) -> Window:
    """From when nearly as many requests run as do later, to when no more wait.

    Raises Unsteady, naming a larger number of requests (`enough`, or more by what was seen), when that is less than
    half of the run's time, or when fewer requests ended in it than ran at once: then it says little about the long run.
    cut: a time limit ended the run, so that more requests would not help.
    """
    fed = next((i for i, s in enumerate(steps) if i and s.waiting == 0), len(steps))
    plateau = int(np.median([s.running for s in steps[fed // 2 : max(fed, 1)]]))
    first = max(1, next((i for i, s in enumerate(steps[:fed]) if s.running >= PLATEAU * plateau), fed))
    window = _window(steps, first, fed, plateau) if first < fed else None
    share, ended = (window.share_of_run, window.requests_ended) if window else (0.0, 0)
    if window is None or share < 0.5 or ended < plateau:
        highest, whole = max(s.running for s in steps), steps[-1].finished - steps[0].dispatched
        what, more = f"{requests} requests are", f"--requests {max(enough, 6 * highest, 2 * requests)} or more"
        if cut:
            what, more = f"{whole:.0f} seconds are", f"--seconds {max(1, round(2 * whole))} or more"
        raise Unsteady(
            f"throughput: {what} too few for a steady state: {share:.0%} of the run's time (half is "
            f"needed) and {ended} ended requests (as many are needed as ran at once, {highest}); accepted: {more}"
        )
    return window


def time_lost(window: Window) -> dict[str, float]:
    """Shares of the window's time, which add up to 1 together with `useful`.

    host           the device had nothing to do: the next step came late
    pages          empty rows of steps in which a request had to wait for KV pages
    shape_padding  empty rows of all other steps
    preemption     rows that computed tokens again after a preemption
    useful         rows that computed tokens for the first time
    """
    busy = window.busy
    used = np.array([s.rows_used / s.shape.rows for s in window.steps])
    refused = np.array([s.refused for s in window.steps])
    empty = (1 - used) * busy
    again = window.recomputed_rows / max(1, sum(s.rows_used for s in window.steps)) * (used * busy).sum()
    seconds = {
        "host": window.idle.sum(),
        "pages": empty[refused].sum(),
        "shape_padding": empty[~refused].sum(),
        "preemption": again,
        "useful": (used * busy).sum() - again,
    }
    return {name: float(value / window.seconds) for name, value in seconds.items()}
