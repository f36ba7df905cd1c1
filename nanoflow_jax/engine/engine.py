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
from functools import partial
from typing import Any

import jax
import numpy as np

from nanoflow_jax.engine.offload import OffloadStore
from nanoflow_jax.engine.pages import Key, PagePool
from nanoflow_jax.engine.quarantine import Quarantine
from nanoflow_jax.engine.request import Request, error_line
from nanoflow_jax.engine.runner import Begun, Runner
from nanoflow_jax.engine.scheduler import Hooks, ScheduledStep, Scheduler
from nanoflow_jax.engine.slot_table import SlotTable
from nanoflow_jax.engine.step_batch import build_inputs, constrained_rows
from nanoflow_jax.engine.structured import Constraint, Grammars
from nanoflow_jax.engine.text import WatchedText
from nanoflow_jax.prompts import check_prompt
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.logprobs import TokenLogprobs
from nanoflow_jax.step.sampler import StepOutput
from nanoflow_jax.step.sampler_tables import SamplerTables
from nanoflow_jax.tokenizer import Tokenizer

logger = logging.getLogger("nanoflow_jax")


class NotFinite(ArithmeticError):
    """Logits hold NaN or infinity: weights do, or activations have overflowed."""


@dataclass(frozen=True)
class StepRecord:
    """What one turn of the loop did. Times in seconds."""

    shape: StepShape | None  # of the step dispatched; None: only the last one was booked
    rows_used: int
    tokens: int  # sampled tokens that were booked
    host: float  # of the host's own work
    host_cpu: float  # of that, what this thread spent on a processor: less than `host` where others use it too
    waited: float  # for the device


@dataclass(frozen=True)
class _Flight:
    step: ScheduledStep
    output: StepOutput
    scored: bool  # logprobs of prompt tokens are wanted


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
        self.runner, self.tables, self.offload = runner, tables, offload
        self.max_model_len, self.vocab_size, self.on_step = max_model_len, vocab_size, on_step
        self._tokenizer, self._eos, self._seed, self._count = tokenizer, eos_token_ids, seed, 0
        self.grammars = Grammars(tokenizer, vocab_size, eos_token_ids)
        self.running = SlotTable(
            runner.sizes.slots, max_model_len, runner.page_size, runner.sizes.bias_rows, len(windows)
        )
        self.scheduler = Scheduler(
            shapes,
            PagePool(runner.num_pages, self._evicted if offload is not None else None),
            self.running,
            Hooks(
                self._acquire_biases,
                self._release_biases,
                self._entered,
                None if offload is None else self._restore,
                None if offload is None else offload.count,
            ),
            root,
            deterministic,
            windows,
        )
        self._flight: _Flight | None = None
        self._biases: dict[Request, list[int]] = {}
        self._texts: dict[Request, WatchedText] = {}
        self._quarantine = Quarantine(self.scheduler)
        self.num_steps = self.num_rows = 0  # rows: prompt tokens computed, and one for each token that is generated
        self.failure: Exception | None = None  # of the last step that failed
        self.updated: list[Request] = []  # watched requests that got tokens in the last step

    # -- requests

    @property
    def has_work(self) -> bool:
        return self._flight is not None or self.scheduler.has_work or self._quarantine.has_work

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises ValueError when a prompt can never be served."""
        check_prompt(prompt_token_ids, params, self.max_model_len, self.vocab_size, self._eos)
        if params.structured_outputs is not None:
            self.grammars.constraint(params.structured_outputs, prompt_token_ids)

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
        """Queues a request. The prompt must have passed `check`.

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
        self._texts.pop(request, None)
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
        finished: list[Request] = []
        self.updated = []
        scheduled = rest = None
        try:
            flight, self._flight = self._flight, None
            scheduled = self.scheduler.schedule()
            if scheduled is not None:
                inputs = build_inputs(scheduled, self.running, self.runner.num_pages, self.runner.sizes)
                scored = bool(inputs.targets.max(initial=-1) >= 0)
                if rows := constrained_rows(scheduled, self.running):
                    begun = self.runner.begin(scheduled.shape, inputs)
                    rest = partial(self._finish_step, scheduled, begun, rows, scored)
                else:
                    self._flight = _Flight(scheduled, self.runner.dispatch(scheduled.shape, inputs), scored)
                self.num_steps += 1
                self.num_rows += scheduled.rows_used
            if flight is not None:
                asked = time.perf_counter()
                sampled = np.asarray(flight.output.sampled.tokens)
                waited = time.perf_counter() - asked
                tokens = self._process_output(flight, sampled, finished)
            if rest is not None:
                self._flight = rest(finished)
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

    def _process_output(self, flight: _Flight, sampled: np.ndarray, finished: list[Request]) -> int:
        """Takes over what a step gave. Returns how many tokens were booked."""
        step, output, run = flight.step, flight.output, self.running
        first = step.shape.decode_rows
        chunks = [(first + i, c.slot) for i, c in enumerate(step.prefill) if c.samples]
        rows = np.concatenate([np.flatnonzero(step.samples), np.array([row for row, _ in chunks], np.intp)])
        slots = np.concatenate([step.decode[step.samples], np.array([slot for _, slot in chunks], np.intp)])
        if flight.scored:
            self._process_scores(step, output, finished)
        here = (run.epoch == step.epochs)[slots]
        all_here = here.all()
        if not all_here or (run.sampling.top_logprobs[slots] >= 0).any():
            jax.device_get(output.sampled.logprobs)  # the arrays keep it; where it fails, no token is booked yet
        if not all_here:
            for row, slot in zip(rows[~here].tolist(), slots[~here].tolist(), strict=True):
                orphan = self.scheduler.orphans.pop((slot, int(step.epochs[slot])), None)
                if orphan is not None and orphan.pending:
                    self._process_orphan(orphan, int(sampled[row]), output, row, finished)
            rows, slots = rows[here], slots[here]
        ended = run.append(slots, sampled[rows])
        self._advance(slots, sampled[rows])
        for i in np.flatnonzero(ended | run.watched[slots]).tolist():
            request = run.requests[slots[i]]
            assert request is not None
            if sampled[rows[i]] < 0 and self._again(request):
                continue
            self._process_token(request, int(sampled[rows[i]]), int(run.known[slots[i]]), output, int(rows[i]))
            if request.finish_reason:
                self._end(request, finished)
        for chunk in step.prefill:  # of requests that only wanted their prompt computed
            if not chunk.samples and chunk.stop == run.max_length[chunk.slot] and self._is_current(step, chunk.slot):
                request = run.requests[chunk.slot]
                assert request is not None
                request.finish("length")
                self._end(request, finished)
        return len(rows)

    def _is_current(self, step: ScheduledStep, slot: int) -> bool:
        return bool(self.running.epoch[slot] == step.epochs[slot])

    def _advance(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """Lets the constraints among these slots take the tokens that were booked, all at once."""
        some = np.flatnonzero(self.running.constrained[slots] & (tokens >= 0))
        found, taken = list[Constraint](), list[int]()
        for slot, token in zip(slots[some].tolist(), tokens[some].tolist(), strict=True):
            request = self.running.requests[slot]
            assert request is not None and request.constraint is not None
            before = int(self.running.known[slot]) - request.prompt_length - 1
            if request.constraint.taken == before and token not in request.stop_tokens:
                found.append(request.constraint)
                taken.append(token)
        self.grammars.advance(found, taken)

    def _finish_step(
        self,
        step: ScheduledStep,
        begun: Begun,
        rows: Sequence[tuple[int, int]],
        scored: bool,
        finished: list[Request],
    ) -> _Flight:
        """Dispatches what follows a step's layers: all tokens before it are known, so that each constrained row has a
        mask (no mask is needed where the request has ended)."""

        def stands(request: Request, constraint: Constraint) -> bool:
            try:
                constraint.take(self.running.output_of(request))
            except RuntimeError as error:  # a grammar that has become too large for the matcher
                self._fail(request, error)
                self._end(request, finished)
            return not request.finish_reason and not constraint.is_free

        found = list[tuple[int, Request, Constraint]]()
        for row, slot in rows:
            request = self.running.requests[slot]
            if request is None or request.constraint is None or not self._is_current(step, slot):
                continue
            if stands(request, request.constraint):
                found.append((row, request, request.constraint))
        masks = self.grammars.masks([constraint for _, _, constraint in found])
        allowed = {
            row: mask
            for (row, request, constraint), mask in zip(found, masks, strict=True)
            if stands(request, constraint)
        }
        return _Flight(step, self.runner.finish(begun, allowed), scored)

    def _process_orphan(
        self, request: Request, token: int, output: StepOutput, row: int, finished: list[Request]
    ) -> None:
        """The token of a request that was preempted while the token was being sampled."""
        request.pending = False
        if token < 0 and self._again(request):
            return
        if token >= 0:
            request.tokens = np.append(request.tokens, np.int32(token))
        request.metrics.first_token_time = request.metrics.first_token_time or time.monotonic()
        self._process_token(request, token, len(request.tokens), output, row)
        if request.finish_reason:
            self._end(request, finished)

    def _process_token(self, request: Request, token: int, length: int, output: StepOutput, row: int) -> None:
        """What a booked token means for a request that may have ended, or whose tokens are looked at one by one. What
        goes wrong here (a tokenizer that fails) is this request's own error."""
        try:
            self._finish_or_go_on(request, token, length, output, row)
        except Exception as error:
            self._fail(request, error)

    def _again(self, request: Request) -> bool:
        """Whether a request whose logits are not finite is computed again, once, from its own tokens alone: in pages
        that it shares, NaN may come from the request that filled them (tokens that attention leaves out still reach
        earlier ones through a product of zero and NaN)."""
        if request.alone or not request.shared:
            return False
        request.alone = True
        if request.slot is not None:
            self.scheduler.preempt(request.slot)
        self.scheduler.drop_pending(request)
        self.scheduler.forget(request)
        return True

    def _fail(self, request: Request, error: Exception) -> None:
        request.finish("error", error=error_line(error))
        logger.warning("request %s: %s", request.request_id, request.error)

    def _finish_or_go_on(self, request: Request, token: int, length: int, output: StepOutput, row: int) -> None:
        params = request.params
        if token < 0:
            raise NotFinite(f"after {length} tokens, the logits are not finite, or none is that of an allowed token")
        if params.logprobs is not None:
            assert output.sampled.logprobs is not None
            _add_logprobs(request.logprobs, output.sampled.logprobs, row, row + 1, params.logprobs)
        if request.watched:
            self.updated.append(request)
        stopped = self._stop_string(request, token, length)
        if token in request.stop_tokens:
            request.finish("stop", token if token in params.stop_token_ids else None)
        elif not stopped and request.constraint is not None and self._is_complete(request, request.constraint):
            request.finish("stop")
        elif not stopped and length >= request.max_length:
            request.finish("length")

    def _is_complete(self, request: Request, constraint: Constraint) -> bool:
        constraint.take(self.running.output_of(request))
        return constraint.is_complete

    def _stop_string(self, request: Request, token: int, length: int) -> bool:
        params = request.params
        if not params.detokenize or not (params.stop or request.watched) or token in request.stop_tokens:
            return False
        text = self._texts.get(request)
        if text is None:
            assert self._tokenizer is not None, "stop strings and streams of text need a tokenizer"
            text = self._texts[request] = WatchedText(self._tokenizer, request.prompt_token_ids, params)
        stop = text.add(token, may_stop=length - request.prompt_length >= params.min_tokens)
        request.text = text.text
        if stop is not None:
            request.finish("stop", stop)
        return stop is not None

    def _process_scores(self, step: ScheduledStep, output: StepOutput, finished: list[Request]) -> None:
        """Logprobs of prompt tokens that the step's chunks have given, to orphans too: their token may end them. Those
        that are not finite end their request."""
        run, row, scores = self.running, 0, output.scores
        assert scores is not None
        for chunk in step.prefill:
            count = chunk.stop - chunk.start
            if self._is_current(step, chunk.slot):
                request = run.requests[chunk.slot]
            else:
                request = self.scheduler.orphans.get((chunk.slot, int(step.epochs[chunk.slot])))
            if request is not None and (wanted := request.next_score) is not None:
                first = max(chunk.start, wanted)
                last = min(chunk.stop, request.prompt_length - 1)
                if first < last:
                    at = row + first - chunk.start
                    assert request.params.prompt_logprobs is not None
                    if np.isfinite(np.asarray(scores.logprob)[at : at + last - first]).all():
                        top = request.params.prompt_logprobs
                        _add_logprobs(request.prompt_logprobs, scores, at, at + last - first, top)
                    elif not self._again(request):
                        self._fail(request, NotFinite("the logits of the prompt are not finite"))
                        self._end(request, finished)
            row += count

    def _end(self, request: Request, finished: list[Request]) -> None:
        self.scheduler.remove(request)
        if request.finish_reason == "error":  # NaN may be in its pages
            self.scheduler.forget(request)
        self._quarantine.remove(request)
        self.scheduler.finished(request)
        self._texts.pop(request, None)
        finished.append(request)

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
            self._texts.pop(request, None)
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
        self._biases.clear()
        self.runner.reset()
        self.tables.reset()
        for request in running:
            request.metrics.num_preemptions += 1
        if keep:
            for request in running:
                if request not in scheduler.waiting:
                    scheduler.add(request)
            return []
        gone = [*running, *scheduler.waiting, *self._quarantine.clear()]
        scheduler.waiting.clear()
        self._texts.clear()
        return gone

    # -- hooks of the scheduler

    def _acquire_biases(self, request: Request) -> tuple[int, int] | None:
        none = self.runner.sizes.bias_rows
        rows = self.tables.acquire(request.params, request.stop_tokens)
        if rows is None:
            return None
        self._biases[request] = [row for row in rows if row != none]
        return rows

    def _release_biases(self, request: Request) -> None:
        for row in self._biases.pop(request, ()):
            self.tables.release(row)

    def _entered(self, request: Request) -> None:
        assert request.slot is not None
        if self.running.history[request.slot] == request.slot:
            self.tables.write_history(request.slot, request.prompt_token_ids, request.output_token_ids)

    def _evicted(self, pages: list[int], keys: list[Key]) -> None:
        assert self.offload is not None
        if wanted := self.offload.missing(keys):
            contents = self.runner.extract([pages[i] for i in wanted])
            self.offload.put([keys[i] for i in wanted], contents)

    def _restore(self, keys: list[Key], pages: np.ndarray) -> int:
        assert self.offload is not None
        contents = self.offload.get_for_device(keys)
        self.runner.insert(pages[: len(contents)].tolist(), contents)
        return len(contents)


def _add_logprobs(into: Any, source: TokenLogprobs, start: int, stop: int, top: int) -> None:
    rows = slice(start, stop)
    logprobs, ranks = np.asarray(source.logprob)[rows], np.asarray(source.rank)[rows]
    into.add(logprobs, ranks, np.asarray(source.top_tokens)[rows, :top], np.asarray(source.top_logprobs)[rows, :top])


def step_shapes(
    tokens_per_step: int, decode_slots: int, pages_per_request: int, quantum: int = 8, tables: int = 1
) -> list[StepShape]:
    """The compiled shapes: few decode rows or all of them, each with no prefill, a little, or all that the budget
    leaves.

    A shape is chosen by load, so that one request does not pay for a full step's rows. Rows are multiples of `quantum`,
    as the two sizes given must be.
    """
    few = -(-decode_slots // (8 * quantum)) * quantum
    shapes = []
    for decode in sorted({min(few, decode_slots), decode_slots}):
        most = tokens_per_step - decode
        little = max(-(-64 // quantum), tokens_per_step // (16 * quantum)) * quantum
        for prefill in sorted({0, min(most, little), most}):
            segments = max(1, min(64, prefill // 16))
            shapes.append(StepShape(decode, prefill, segments if prefill else 0, pages_per_request, tables))
    return shapes
