"""The engine: a loop of schedule, dispatch, book, one step ahead of what the host knows.

While the device runs step n, the host builds and dispatches step n + 1, and only then reads the tokens of step n. A
request that step n ends has a row in step n + 1 all the same; what that row gives is dropped. Where a row of step n + 1
is constrained (`engine.structured`), what follows its layers is dispatched after the tokens of step n are known.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nanoflow_jax.engine.booking import Booking, Flight
from nanoflow_jax.engine.hooks import Hooks
from nanoflow_jax.engine.offload import OffloadStore
from nanoflow_jax.engine.pages import Key, PagePool
from nanoflow_jax.engine.quarantine import Quarantine
from nanoflow_jax.engine.request import Request
from nanoflow_jax.engine.runner import Runner
from nanoflow_jax.engine.scheduler import Scheduler
from nanoflow_jax.engine.slot_table import SlotTable
from nanoflow_jax.engine.step_batch import build_inputs, constrained_rows
from nanoflow_jax.engine.structured import Grammars
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.sampler_tables import SamplerTables
from nanoflow_jax.tokenizer import Tokenizer

logger = logging.getLogger("nanoflow_jax")


@dataclass(frozen=True)
class StepRecord:
    """What one turn of the loop did. Times in seconds."""

    shape: StepShape | None  # of the step dispatched; None: only the last one was booked
    rows_used: int
    tokens: int  # sampled tokens that were booked
    host: float  # of the host's own work
    host_cpu: float  # of that, what this thread spent on a processor: less than `host` where others use it too
    waited: float  # for the device


class Engine:
    """Takes requests at any time; each `step` moves all of them on and returns those that ended.

    root           key of the empty prefix for prefix caching; None: off
    deterministic  output tokens keep to decode rows, also when computed again
    offload        where evicted pages go; None: nowhere
    windows        of each page table (`models.layout.PageTables`)
    on_step        called with a StepRecord after each step
    """

    def __init__(
        self,
        runner: Runner,
        shapes: Sequence[StepShape],
        tables: SamplerTables,
        tokenizer: Tokenizer | None,
        *,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        seed: int,
        root: Key | None = None,
        deterministic: bool = False,
        offload: OffloadStore | None = None,
        windows: tuple[int | None, ...] = (None,),
        on_step: Callable[[StepRecord], None] | None = None,
    ):
        self.runner, self.max_model_len, self.on_step = runner, max_model_len, on_step
        self._eos, self._seed, self._count = eos_token_ids, seed, 0
        self.grammars = Grammars(tokenizer, vocab_size, eos_token_ids)
        self.running = SlotTable(
            runner.sizes.slots, max_model_len, runner.page_size, runner.sizes.bias_rows, len(windows)
        )
        hooks = Hooks(runner, tables, self.running, offload)
        pool = PagePool(runner.num_pages, hooks.evict)
        self.scheduler = Scheduler(shapes, pool, self.running, hooks, root, deterministic, windows)
        self._booking = Booking(self.scheduler, self.grammars, tokenizer, lambda ended: self._quarantine.remove(ended))
        self._quarantine = Quarantine(self.scheduler)
        self._flight: Flight | None = None
        self.num_steps = self.num_rows = 0  # rows: prompt tokens computed, and one for each token that is generated
        self.failure: Exception | None = None  # of the last step that failed
        self.updated: list[Request] = []  # watched requests that got tokens in the last step

    # -- requests

    @property
    def has_work(self) -> bool:
        return self._flight is not None or self.scheduler.has_work or self._quarantine.has_work

    def add(
        self,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        index: int = 0,
        watched: bool = False,
        max_tokens: int | None = None,
        scored_from: int = 0,
    ) -> Request:
        """Queues a request. The prompt must have passed `LLM.check`.

        index       among the completions of one prompt: each has a seed of its own
        watched     report it in `updated` whenever it gets a token
        max_tokens  replaces the params'; 0 computes the prompt only (for its logprobs)
        scored_from with prompt_logprobs: those of the tokens after this position of the prompt
        """
        number = self._count
        self._count += 1
        limit = self.max_model_len
        allowed = params.max_tokens if max_tokens is None else max_tokens
        if allowed is not None:
            limit = min(limit, len(prompt_token_ids) + allowed)
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self._eos))
        seed = params.seed
        if seed is None or index:
            spawn = [self._seed, number] if seed is None else [seed, index]
            seed = int(np.random.SeedSequence(spawn).generate_state(1, np.uint32)[0])
        form = params.structured_outputs
        constraint = None
        if form is not None and allowed != 0:
            constraint = self.grammars.constraint(form, prompt_token_ids, stops)
        request = Request(
            number, str(number), prompt, prompt_token_ids, params, seed, frozenset(stops), limit, index, watched,
            scored_from, constraint,
        )  # fmt: skip
        self._quarantine.add(request)
        return request

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is."""
        self._quarantine.remove(request)
        self.scheduler.remove(request)
        self._booking.texts.pop(request, None)
        if not request.finish_reason:
            request.finish("abort")
        if not self.scheduler.has_work and not self._quarantine.has_work:
            self._flight = None  # nobody waits for its tokens

    def abort_all(self) -> None:
        """Ends every request and starts afresh, whatever state an interruption left. The contents of the pages are
        lost."""
        for request in self._drop_everything():
            if not request.finish_reason:
                request.finish("abort")

    # -- the loop

    def step(self) -> list[Request]:
        """Dispatches the next step, then books the one before it. Returns the requests that have ended.

        When a step fails, the requests in it are tried in smaller groups until the one at fault is found: it ends with
        finish_reason "error", the others go on. Raises the error itself when requests keep failing one by one.
        """
        start, start_cpu, waited, tokens = time.perf_counter(), time.thread_time(), 0.0, 0
        self.updated, finished = self._booking.begin()
        scheduled = begun = None
        scored, constrained = False, list[tuple[int, int]]()
        try:
            flight, self._flight = self._flight, None
            scheduled = self.scheduler.schedule()
            if scheduled is not None:
                inputs = build_inputs(scheduled, self.running, self.runner.num_pages, self.runner.sizes)
                scored = bool(inputs.targets.max(initial=-1) >= 0)
                if constrained := constrained_rows(scheduled, self.running):
                    begun = self.runner.begin(scheduled.shape, inputs)
                else:
                    self._flight = Flight(scheduled, self.runner.dispatch(scheduled.shape, inputs), scored)
                self.num_steps += 1
                self.num_rows += scheduled.rows_used
            if flight is not None:
                asked = time.perf_counter()
                sampled = np.asarray(flight.output.sampled.tokens)
                waited = time.perf_counter() - asked
                tokens = self._booking.book(flight, sampled)
            if scheduled is not None and begun is not None:
                allowed = self._booking.masks(scheduled, constrained)
                self._flight = Flight(scheduled, self.runner.finish(begun, allowed), scored)
            self._quarantine.progressed()
            if not self.scheduler.has_work and not self._quarantine.has_work:
                self._flight = None  # all its rows belong to requests that have ended
        except Exception as error:
            finished += self._recover(error)
        if self.on_step is not None:
            used = scheduled.rows_used if scheduled is not None else 0
            total, cpu = time.perf_counter() - start, time.thread_time() - start_cpu
            self.on_step(StepRecord(scheduled and scheduled.shape, used, tokens, total - waited, cpu, waited))
        return finished

    # -- failures

    def _recover(self, error: Exception) -> list[Request]:
        """After an exception anywhere in a step: all running requests are computed again, in suspicion's order."""
        self.failure = error
        admitting = self.scheduler.admitting
        suspects = [r for r in self.running.requests if r is not None]
        suspects += [r for r in (*self.scheduler.orphans.values(), admitting) if r is not None and r not in suspects]
        self._drop_everything(keep=True)
        failed = self._quarantine.failed(suspects, error)
        for request in failed:
            logger.warning("request %s: %s", request.request_id, request.error)
            self._booking.texts.pop(request, None)
        return failed

    def _drop_everything(self, keep: bool = False) -> list[Request]:
        """Empties device and pages. keep: requests go back to the queue with the tokens the host knows; else all are
        returned, forgotten."""
        self._flight = None
        scheduler = self.scheduler
        running = self.running.reset()
        for request in [*running, *scheduler.orphans.values()]:
            request.pending = False
        scheduler.orphans.clear()
        scheduler.pool.reset()
        scheduler.admitting = None
        self.runner.reset()
        scheduler.hooks.reset()
        for request in running:
            request.metrics.num_preemptions += 1
        if keep:
            for request in running:
                if request not in scheduler.waiting:
                    scheduler.add(request)
            return []
        gone = [*running, *scheduler.waiting, *self._quarantine.clear()]
        scheduler.waiting.clear()
        self._booking.texts.clear()
        return gone


def step_shapes(
    tokens_per_step: int, decode_slots: int, pages_per_request: int, quantum: int = 8, tables: int = 1
) -> list[StepShape]:
    """The compiled shapes: few decode rows or all of them, each with no prefill, a little, or all that the budget
    leaves; what is not a quarter of the next larger one is not worth compiling.

    A shape is chosen by load, so that one request does not pay for a full step's rows. Rows are multiples of `quantum`,
    as the two sizes given must be.
    """
    few = -(-decode_slots // (8 * quantum)) * quantum
    shapes = []
    for decode in [few, decode_slots] if 4 * few <= decode_slots else [decode_slots]:
        most = tokens_per_step - decode
        little = max(-(-64 // quantum), tokens_per_step // (16 * quantum)) * quantum
        for prefill in sorted({0, little if 4 * little <= most else most, most}):
            segments = max(1, min(64, prefill // 16))
            shapes.append(StepShape(decode, prefill, segments if prefill else 0, pages_per_request, tables))
    return shapes
