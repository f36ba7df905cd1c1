"""What the tokens of a step mean for its requests: who goes on, who has ended, and with what."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from nanoflow_jax.engine.request import Request, error_line
from nanoflow_jax.engine.scheduler import ScheduledStep, Scheduler
from nanoflow_jax.engine.structured import Constraint, Grammars
from nanoflow_jax.engine.text import WatchedText
from nanoflow_jax.step.sampler import StepOutput
from nanoflow_jax.tokenizer import Tokenizer

logger = logging.getLogger("nanoflow_jax")


class NotFinite(ArithmeticError):
    """Logits hold NaN or infinity: weights do, or activations have overflowed."""


@dataclass(frozen=True)
class Flight:
    """A step that has been dispatched. scored: logprobs of prompt tokens are wanted."""

    step: ScheduledStep
    output: StepOutput
    scored: bool


class Booking:
    """Books steps, one after another. What goes wrong with one request is that request's own error."""

    def __init__(
        self,
        scheduler: Scheduler,
        grammars: Grammars,
        tokenizer: Tokenizer | None,
        on_end: Callable[[Request], None],
    ):
        self._scheduler, self._running, self._on_end = scheduler, scheduler.running, on_end
        self._grammars, self._tokenizer = grammars, tokenizer
        self.texts: dict[Request, WatchedText] = {}
        self.begin()

    def begin(self) -> tuple[list[Request], list[Request]]:
        """For the next step: lists that will hold the watched requests that get tokens, and those that end."""
        self._updated, self._finished = list[Request](), list[Request]()
        return self._updated, self._finished

    def book(self, flight: Flight, sampled: np.ndarray) -> int:
        """Takes over what a step gave. Returns how many tokens were booked."""
        step, output, run = flight.step, flight.output, self._running
        first = step.shape.decode_rows
        chunks = [(first + i, c.slot) for i, c in enumerate(step.prefill) if c.samples]
        rows = np.concatenate([np.flatnonzero(step.samples), np.array([row for row, _ in chunks], np.intp)])
        slots = np.concatenate([step.decode[step.samples], np.array([slot for _, slot in chunks], np.intp)])
        if flight.scored:
            self._book_scores(step, output)
        here = (run.epoch == step.epochs)[slots]
        all_here = here.all()
        if not all_here or (run.sampling.top_logprobs[slots] >= 0).any():
            jax.device_get(output.sampled.logprobs)  # the arrays keep it; where it fails, no token is booked yet
        if not all_here:
            for row, slot in zip(rows[~here].tolist(), slots[~here].tolist(), strict=True):
                orphan = self._scheduler.orphans.pop((slot, int(step.epochs[slot])), None)
                if orphan is not None and orphan.pending:
                    self._book_orphan(orphan, int(sampled[row]), output, row)
            rows, slots = rows[here], slots[here]
        ended = run.append(slots, sampled[rows])
        self._advance(slots, sampled[rows])
        for i in np.flatnonzero(ended | run.watched[slots]).tolist():
            request = run.requests[slots[i]]
            assert request is not None
            self._book_token(request, int(sampled[rows[i]]), int(run.known[slots[i]]), output, int(rows[i]))
        for chunk in step.prefill:  # of requests that only wanted their prompt computed
            if not chunk.samples and chunk.stop == run.max_length[chunk.slot] and self._is_current(step, chunk.slot):
                request = run.requests[chunk.slot]
                assert request is not None
                request.finish("length")
                self._end(request)
        return len(rows)

    def masks(self, step: ScheduledStep, rows: Sequence[tuple[int, int]]) -> dict[int, np.ndarray]:
        """Of constrained rows (row and slot), once all tokens before the step are known: the tokens that they may have.
        No mask is needed where the request has ended."""
        found = list[tuple[int, Request, Constraint]]()
        for row, slot in rows:
            request = self._running.requests[slot]
            if request is None or request.constraint is None or not self._is_current(step, slot):
                continue
            if self._wants_mask(request, request.constraint):
                found.append((row, request, request.constraint))
        masks = self._grammars.masks([constraint for _, _, constraint in found])
        return {
            row: mask
            for (row, request, constraint), mask in zip(found, masks, strict=True)
            if self._wants_mask(request, constraint)
        }

    def _wants_mask(self, request: Request, constraint: Constraint) -> bool:
        try:
            constraint.take(self._running.output_of(request))
        except RuntimeError as error:  # a grammar that has become too large for the matcher
            self._fail(request, error)
            self._end(request)
        return not request.finish_reason and not constraint.is_free

    def _is_current(self, step: ScheduledStep, slot: int) -> bool:
        return bool(self._running.epoch[slot] == step.epochs[slot])

    def _advance(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """Lets the constraints among these slots take the tokens that were booked, all at once."""
        some = np.flatnonzero(self._running.constrained[slots] & (tokens >= 0))
        found, taken = list[Constraint](), list[int]()
        for slot, token in zip(slots[some].tolist(), tokens[some].tolist(), strict=True):
            request = self._running.requests[slot]
            assert request is not None and request.constraint is not None
            before = int(self._running.known[slot]) - request.prompt_length - 1
            if request.constraint.taken == before and token not in request.stop_tokens:
                found.append(request.constraint)
                taken.append(token)
        self._grammars.advance(found, taken)

    def _book_orphan(self, request: Request, token: int, output: StepOutput, row: int) -> None:
        """The token of a request that was preempted while the token was being sampled."""
        request.pending = False
        if token >= 0:
            request.tokens = np.append(request.tokens, np.int32(token))
        request.metrics.first_token_time = request.metrics.first_token_time or time.monotonic()
        self._book_token(request, token, len(request.tokens), output, row)

    def _book_token(self, request: Request, token: int, length: int, output: StepOutput, row: int) -> None:
        """What a booked token means for a request that may have ended, or whose tokens are looked at one by one. What
        goes wrong here (a tokenizer that fails) is this request's own error."""
        if token < 0 and self._again(request):
            return
        try:
            self._finish_or_go_on(request, token, length, output, row)
        except Exception as error:
            self._fail(request, error)
        if request.finish_reason:
            self._end(request)

    def _again(self, request: Request) -> bool:
        """Whether a request whose logits are not finite is computed again, once, from its own tokens alone: in pages
        that it shares, NaN may come from the request that filled them (tokens that attention leaves out still reach
        earlier ones through a product of zero and NaN)."""
        if request.alone or not request.shared:
            return False
        request.alone = True
        if request.slot is not None:
            self._scheduler.preempt(request.slot)
        self._scheduler.drop_pending(request)
        self._scheduler.forget(request)
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
            request.logprobs.add(output.sampled.logprobs, row, row + 1, params.logprobs)
        if request.watched:
            self._updated.append(request)
        stopped = self._stop_string(request, token, length)
        if token in request.stop_tokens:
            request.finish("stop", token if token in params.stop_token_ids else None)
        elif stopped:
            return
        elif request.constraint is not None and self._is_complete(request, request.constraint):
            request.finish("stop")
        elif length >= request.max_length:
            request.finish("length")

    def _is_complete(self, request: Request, constraint: Constraint) -> bool:
        constraint.take(self._running.output_of(request))
        return constraint.is_complete

    def _stop_string(self, request: Request, token: int, length: int) -> bool:
        params = request.params
        if not params.detokenize or not (params.stop or request.watched) or token in request.stop_tokens:
            return False
        text = self.texts.get(request)
        if text is None:
            assert self._tokenizer is not None, "stop strings and streams of text need a tokenizer"
            text = self.texts[request] = WatchedText(self._tokenizer, request.prompt_token_ids, params)
        stop = text.add(token, may_stop=length - request.prompt_length >= params.min_tokens)
        request.text = text.text
        if stop is not None:
            request.finish("stop", stop)
        return stop is not None

    def _book_scores(self, step: ScheduledStep, output: StepOutput) -> None:
        """Logprobs of prompt tokens that the step's chunks have given, to orphans too: their token may end them. Those
        that are not finite end their request."""
        row, scores = 0, output.scores
        assert scores is not None
        for chunk in step.prefill:
            if self._is_current(step, chunk.slot):
                request = self._running.requests[chunk.slot]
            else:
                request = self._scheduler.orphans.get((chunk.slot, int(step.epochs[chunk.slot])))
            if request is not None and (wanted := request.next_score) is not None:
                first = max(chunk.start, wanted)
                count = min(chunk.stop, request.prompt_length - 1) - first
                if count > 0:
                    at, top = row + first - chunk.start, request.params.prompt_logprobs
                    assert top is not None
                    if np.isfinite(np.asarray(scores.logprob)[at : at + count]).all():
                        request.prompt_logprobs.add(scores, at, at + count, top)
                    elif not self._again(request):
                        self._fail(request, NotFinite("the logits of the prompt are not finite"))
                        self._end(request)
            row += chunk.stop - chunk.start

    def _end(self, request: Request) -> None:
        self._scheduler.remove(request)
        if request.finish_reason == "error":  # NaN may be in its pages
            self._scheduler.forget(request)
        self._on_end(request)
        self._scheduler.finished(request)
        self.texts.pop(request, None)
        self._finished.append(request)
