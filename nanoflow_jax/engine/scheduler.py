"""The scheduler: which rows of which requests make up the next step.

Decode rows come first, one per running request whose next token is due; chunks of prompts fill the rest of the token
budget. A request is admitted when the pages of all its tokens so far are there. When a decode row needs a page and
none is free, the request that arrived last gives up its pages and is recomputed later; the one that arrived first
always goes on, so every request ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow_jax.engine.pages import PageAllocator
from nanoflow_jax.engine.request import Request
from nanoflow_jax.schedule.batch import StepShape


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, stop) of a request's sequence, computed by one step."""

    request: Request
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """The chunk reaches the end of what is known: its last row gives the next token."""
        return self.stop == len(self.request.tokens)


@dataclass(frozen=True)
class ScheduledStep:
    """A shape and what fills it: at most `decode_rows` single tokens, at most `prefill_segments` chunks in
    `prefill_rows`."""

    shape: StepShape
    decode: list[Chunk]
    prefill: list[Chunk]


class Scheduler:
    """Owns the queues and the pages. `shapes` are the compiled step shapes; all have the same table width."""

    def __init__(self, shapes: Sequence[StepShape], allocator: PageAllocator, page_size: int):
        self.shapes = sorted(shapes, key=lambda s: (s.rows, s.decode_rows))
        self.allocator, self.page_size = allocator, page_size
        self.max_running = max(s.decode_rows for s in shapes)
        self.waiting: list[Request] = []  # by order of arrival
        self.running: list[Request] = []  # by order of arrival; they hold pages
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> ScheduledStep:
        """The next step. Call only when there is work; at least one row is always scheduled."""
        decode = self._decode_chunks()
        pending = [r for r in self.running if r.remaining > 1]
        self._admit(pending, len(decode))
        due = [r for r in pending if r.remaining > 1]
        # A request admitted with one token to go (a one-token prompt) is a decode row like any other.
        decode += [Chunk(r, r.num_computed, len(r.tokens)) for r in pending if r.remaining == 1]
        shape = self._choose(len(decode), [r.remaining for r in due])
        prefill, budget = [], shape.prefill_rows
        for request in due[: shape.prefill_segments]:
            if not budget:
                break
            stop = min(len(request.tokens), request.num_computed + budget)
            prefill.append(Chunk(request, request.num_computed, stop))
            budget -= stop - request.num_computed
        return ScheduledStep(shape, decode, prefill)

    def _decode_chunks(self) -> list[Chunk]:
        """A row for each running request whose next token is due, pages secured, earliest first."""
        chunks = []
        for request in list(self.running):
            if request.remaining != 1 or not request.pages:  # the latter: preempted by an earlier one just now
                continue
            if self._extend(request):
                chunks.append(Chunk(request, request.num_computed, len(request.tokens)))
        return chunks

    def _extend(self, request: Request) -> bool:
        """Secures the pages of all tokens of `request`, preempting later ones; False when it had to give way itself."""
        while (missing := self.pages_for(len(request.tokens)) - len(request.pages)) > 0:
            if (pages := self.allocator.allocate(missing)) is not None:
                request.pages += pages
                break
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_computed = 0
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        place = next((i for i, r in enumerate(self.waiting) if r.number > request.number), len(self.waiting))
        self.waiting.insert(place, request)

    def _admit(self, pending: list[Request], decode_count: int) -> None:
        """Moves waiting requests to running, in order, while there are slots, prefill rows and pages for all their
        tokens."""
        budget = max(s.prefill_rows for s in self.shapes) - sum(r.remaining for r in pending)
        segments = max(s.prefill_segments for s in self.shapes) - len(pending)
        while self.waiting and len(self.running) < self.max_running and budget > 0 and segments > 0:
            request = self.waiting[0]
            # One spare page per running request, so that admitting one does not at once preempt another.
            spare = len(self.running)
            needed = self.pages_for(len(request.tokens))
            if needed + spare > self.allocator.num_free and (self.running or needed > self.allocator.num_free):
                break
            pages = self.allocator.allocate(needed)
            assert pages is not None
            request.pages = pages
            self.waiting.pop(0)
            self.running.append(request)
            self.running.sort(key=lambda r: r.number)
            pending.append(request)
            budget -= request.remaining
            segments -= 1

    def _choose(self, decode: int, prefill: list[int]) -> StepShape:
        """The smallest shape that holds all rows due; else, with all decode rows, the one with the most prefill
        rows."""
        wide = [s for s in self.shapes if s.decode_rows >= decode]
        total = sum(prefill)
        for shape in wide:
            if shape.prefill_rows >= total and shape.prefill_segments >= len(prefill):
                return shape
        return max(wide, key=lambda s: (s.prefill_rows, -s.rows))

    def computed(self, chunk: Chunk, sampled: int | None) -> None:
        """Books a chunk that a step has computed, and the token it sampled."""
        request = chunk.request
        request.num_computed = chunk.stop
        if sampled is not None:
            request.append(sampled)
        if request.finish_reason:
            self.running.remove(request)
            self._release(request)

    def abort(self, request: Request) -> None:
        """Forgets a request wherever it is; its pages are free again."""
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        self._release(request)

    def _release(self, request: Request) -> None:
        self.allocator.free(request.pages)
        request.pages = []
