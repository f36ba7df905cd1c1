"""The scheduler: which rows of which requests make up the next step.

Decode rows come first, one per running request whose next token is due; chunks of prompts fill the rest of the token
budget. It runs one step ahead of the host's knowledge: a token being sampled counts as there, and its row is filled on
the device. When a decode row needs a page and none is left, the request that arrived last gives up its pages and is
computed again later (or finds its pages again); the one that arrived first always goes on, so every request ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanoflow_jax.engine.admission import Expectation, peak_growth
from nanoflow_jax.engine.hooks import Hooks
from nanoflow_jax.engine.pages import Key, PagePool, next_keys
from nanoflow_jax.engine.request import Request
from nanoflow_jax.engine.slot_table import SlotTable
from nanoflow_jax.engine.windows import Windows
from nanoflow_jax.step.batch import StepShape


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, stop) of a slot's sequence, computed in prefill rows. An empty one only brings the page table."""

    slot: int
    start: int
    stop: int
    samples: bool  # its last row gives the next token


@dataclass(frozen=True)
class ScheduledStep:
    """A shape and what fills it."""

    shape: StepShape
    decode: np.ndarray  # [n] intp: slots of the decode rows
    positions: np.ndarray  # [n] int32: of their tokens
    samples: np.ndarray  # [n] bool: False where a known token is computed again
    prefill: list[Chunk]
    epochs: np.ndarray  # [slots]: as they were when this was scheduled

    @property
    def rows_used(self) -> int:
        return len(self.decode) + sum(c.stop - c.start for c in self.prefill)


@dataclass
class SchedulerStats:
    """Counts since the engine began."""

    preemptions: int = 0
    prompt_tokens: int = 0  # of admitted requests, at their first admission
    cached_tokens: int = 0  # of those, found in kept pages
    restored_tokens: int = 0  # found in offloaded pages, at any admission
    recomputed_tokens: int = 0  # computed again after a preemption
    refused_for_pages: int = 0  # steps in which a request had to wait for pages


@dataclass
class Scheduler:
    """Owns the queues and the pages. `shapes` are the compiled step shapes; all have the same table width.

    root      key of the empty prefix; None: no prefix is shared or found again
    by_phase  tokens of the output always go through decode rows, also when they are computed again (deterministic
              mode: prefill rows might round differently)
    windows   of the layers of each page table, None where they see all; what lies below one is given back, and pages
              of a prompt are taken chunk by chunk
    """

    shapes: Sequence[StepShape]
    pool: PagePool
    running: SlotTable
    hooks: Hooks
    root: Key | None = None
    by_phase: bool = False
    windows: tuple[int | None, ...] = (None,)
    waiting: deque[Request] = field(default_factory=deque)  # by order of arrival
    admitting: Request | None = None  # whose admission is under way
    orphans: dict[tuple[int, int], Request] = field(default_factory=dict)  # (slot, epoch): preempted, token in flight
    stats: SchedulerStats = field(default_factory=SchedulerStats)

    def __post_init__(self) -> None:
        self.shapes = sorted(self.shapes, key=lambda s: (s.rows, s.decode_rows))
        self.page_size = self.running.page_size
        self._most_prefill = max(s.prefill_rows for s in self.shapes)
        self._most_segments = max(s.prefill_segments for s in self.shapes)
        self.expectation = Expectation()
        self._windows = Windows(self.windows, self.page_size)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or self.running.num_running > 0

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def add(self, request: Request) -> None:
        """Queues a request by its number. A new one goes to the end of what may be a long queue, one that was
        preempted is among the first."""
        if not self.waiting or self.waiting[-1].number < request.number:
            self.waiting.append(request)
        else:
            place = next(i for i, other in enumerate(self.waiting) if other.number > request.number)
            self.waiting.insert(place, request)

    # -- the next step

    def schedule(self) -> ScheduledStep | None:
        """The next step, or None when nothing can run before the step in flight has been booked."""
        run = self.running
        self._drop_pages()
        decode = self._secure_pages(self._due())
        prefilling = run.in_order(run.active & ((run.computed < run.prefill_end) | ~run.in_table)).tolist()
        self._admit(prefilling)
        if not len(decode) and not prefilling:
            return None
        shape = self._choose(len(decode), [int(run.prefill_end[s] - run.computed[s]) for s in prefilling])
        positions = run.computed[decode]
        samples = (positions + 1 == run.length[decode]) & (run.length[decode] < run.max_length[decode])
        run.computed[decode] += 1
        run.length[decode] += samples
        chunks = self._chunks(prefilling, shape)
        return ScheduledStep(shape, decode, positions, samples, chunks, run.epoch.copy())

    def _due(self) -> np.ndarray:
        """Slots whose next row is a decode row."""
        run = self.running  # of an empty slot, length is 0
        more = (run.computed + 1 < run.length) | (run.length < run.max_length)
        return np.flatnonzero((run.computed < run.length) & more & (run.computed >= run.prefill_end) & run.in_table)

    def _drop_pages(self) -> None:
        """Gives back the pages below windows. Steps in flight may still read them: they run before whatever is written
        there."""
        run = self.running
        for table in np.flatnonzero(~self._windows.whole).tolist():
            first = self._windows.first_kept(table, run.computed)
            slots = np.flatnonzero(first > run.dropped[:, table])
            if len(slots):
                self.pool.release(run.drop(table, slots, first[slots]))

    def _secure_pages(self, due: np.ndarray) -> np.ndarray:
        """Gives each due slot the pages of its next token, and each that prefills those of its next chunk; slots
        preempted for that are no longer due."""
        run = self.running
        lacking, total = self._lacking(due)
        while (pages := self.pool.allocate(total)) is None:
            victim = int(np.where(run.active, run.number, -1).argmax())
            self.preempt(victim)
            due = due[due != victim]
            lacking, total = self._lacking(due)
        at = 0
        for table, slots, counts in lacking:
            run.fill(table, slots, counts, pages[at : (at := at + int(counts.sum()))])
        return due

    def _lacking(self, due: np.ndarray) -> tuple[list[tuple[int, np.ndarray, np.ndarray]], int]:
        """Of each table that lacks some: slots, and how many pages each lacks; and how many all lack."""
        run, found, total = self.running, [], 0
        slots, entries = due, run.computed[due] // self.page_size + 1
        if not self._windows.whole.all():  # elsewhere a prompt has all its pages
            prefilling = np.flatnonzero(run.active & (run.computed < run.prefill_end))
            chunks = self._chunk_entries(run.computed[prefilling], run.prefill_end[prefilling])
            slots, entries = np.append(slots, prefilling), np.append(entries, chunks)
        for table in range(len(self.windows)):
            counts = entries - run.filled[slots, table]
            some = np.flatnonzero(counts > 0)
            if len(some):
                found.append((table, slots[some], counts[some]))
                total += int(counts[some].sum())
        return found, total

    def _chunk_entries(self, computed: Any, end: Any) -> Any:
        """Entries of a page table that the largest chunk from `computed` on needs."""
        return -(-np.minimum(end, computed + self._most_prefill) // self.page_size)

    def _chunks(self, prefilling: list[int], shape: StepShape) -> list[Chunk]:
        run, budget, chunks = self.running, shape.prefill_rows, []
        for slot in prefilling[: shape.prefill_segments]:
            start, end = int(run.computed[slot]), int(run.prefill_end[slot])
            stop = min(max(start, end), start + budget)
            if stop == start and run.in_table[slot]:
                break
            last = stop == int(run.length[slot]) and stop > start
            samples = last and stop < int(run.max_length[slot])
            chunks.append(Chunk(slot, start, stop, samples))
            budget -= stop - start
            run.computed[slot] = stop
            run.length[slot] += samples
            run.in_table[slot] = True
            self._register(slot, start, stop)
        return chunks

    def _choose(self, decode: int, prefill: list[int]) -> StepShape:
        """The smallest shape that holds all rows due; else, with all decode rows, the one with the most prefill
        rows."""
        wide = [s for s in self.shapes if s.decode_rows >= decode]
        total = sum(prefill)
        for shape in wide:
            if shape.prefill_rows >= total and shape.prefill_segments >= len(prefill):
                return shape
        return max(wide, key=lambda s: (s.prefill_rows, -s.rows))

    # -- admission

    def _admit(self, prefilling: list[int]) -> None:
        """Moves waiting requests to slots, in order, while there are slots, prefill rows, and pages: for their tokens
        now, and for what all running ones are expected to grow to."""
        run = self.running
        budget = self._most_prefill
        budget -= int((run.prefill_end[prefilling] - run.computed[prefilling]).sum()) if prefilling else 0
        segments = self._most_segments - len(prefilling)
        while self.waiting and not run.is_full and budget > 0 and segments > 0:
            request = self.waiting[0]
            if request.pending or self._is_computed_now(request, prefilling):
                break  # its last token, or its prompt's pages, are still on their way
            self.admitting = request
            slot = self._try_admit(request)
            self.admitting = None
            if slot is None:
                break
            self.waiting.popleft()
            prefilling.append(slot)
            budget -= int(run.prefill_end[slot] - run.computed[slot])
            segments -= 1

    def _is_computed_now(self, request: Request, prefilling: list[int]) -> bool:
        """Whether a slot is still computing pages that the request will find: those of the same prompt, as of several
        completions of one."""
        run, pages = self.running, len(self._keys(request))
        return pages > 0 and any(
            int(run.computed[slot]) // self.page_size < pages
            and (other := run.requests[slot]) is not None
            and other.prompt_token_ids == request.prompt_token_ids
            for slot in prefilling
        )

    def _try_admit(self, request: Request) -> int | None:
        run, pool, size = self.running, self.pool, self.page_size
        keys = self._keys(request)
        count, hits = self._windows.find(pool, keys)
        offloaded = self.hooks.offloaded(keys[count:])
        end = min(request.prompt_length, len(request.tokens)) if self.by_phase else len(request.tokens)
        chunk = int(self._chunk_entries(count * size, end))
        entries = (self.pages_for(len(request.tokens)), max(chunk, count))  # of tables that keep all, and of others
        lacking = [entries[window is not None] - count for window in self.windows]
        shared = [page for pages in hits for page in pages]
        # Shared pages that nobody uses now will not be available any more.
        available = pool.num_available - sum(pool.is_kept(page) for page in shared)
        needed = sum(lacking)
        own = [new + len(old) for new, old in zip(lacking, hits, strict=True)]
        if needed > available or not self._fits_later(request, own, needed, available):
            self.stats.refused_for_pages += 1
            return None
        biases = self.hooks.biases(request)
        if biases is None:
            return None
        pool.share(shared)
        pages = pool.allocate(needed)
        assert pages is not None
        restored = 0
        if offloaded:
            wanted = keys[count : count + offloaded]
            restored = self.hooks.restore(wanted, pages[:offloaded])
            pool.register(pages[:restored].tolist(), wanted[:restored])
        found = (count + restored) * size
        request.shared = found > 0
        self._count(request, count * size, restored * size)
        owned, at = [], 0
        for old, new in zip(hits, lacking, strict=True):
            owned.append((count - len(old), np.concatenate([np.array(old, np.int32), pages[at : at + new]])))
            at += new
        slot = run.enter(request, owned, found, end, biases, self._windows.pages(request.max_length))
        self.hooks.enter(request)
        return slot

    def _count(self, request: Request, cached: int, restored: int) -> None:
        stats = self.stats
        stats.restored_tokens += restored
        if request.metrics.num_preemptions:
            stats.recomputed_tokens += len(request.tokens) - cached - restored
        else:
            request.metrics.num_cached_tokens = cached + restored
            stats.prompt_tokens += request.prompt_length
            stats.cached_tokens += cached

    def _fits_later(self, request: Request, own: list[int], needed: int, available: int) -> bool:
        """Whether, by what is expected of their lengths, all running requests and this one will find their pages. own:
        that it would enter with, of each table; of them, `needed` new ones.

        With nothing running the answer is yes: the pool holds any one request.
        """
        run = self.running
        if run.num_running == 0:
            return True
        # First the cheap question: would there be enough if all became as long as they may?
        growing = max(0, self._windows.pages(request.max_length) - sum(own))
        if needed + growing + int(np.maximum(run.most_pages - run.num_pages, 0).sum()) <= available:
            return True
        slots = np.flatnonzero(run.active)
        entered = self.pages_for(len(request.tokens))  # soon, at least
        length = np.append(run.length[slots], len(request.tokens))
        produced = length - np.append(run.prompt_length[slots], request.prompt_length)
        most = np.append(run.max_length[slots], request.max_length) - length + produced
        filled = np.vstack([run.filled[slots], [entered] * len(own)])
        held = np.vstack([(run.filled - run.dropped)[slots], own])
        left = self.expectation.remaining(produced, most)
        return needed + peak_growth(left, length, filled, held, self._windows) <= available

    # -- prefixes

    def _keys(self, request: Request) -> list[Key]:
        """Keys of the pages that a request might find: all full ones, but never the one with its last token, which
        must be computed to go on, nor one whose logprobs are wanted."""
        if self.root is None or request.alone:
            return []
        last = len(request.tokens) - 1 if request.next_score is None else request.next_score
        self._extend_keys(request, request.tokens, last // self.page_size)
        return request.keys[: last // self.page_size]

    def _extend_keys(self, request: Request, tokens: np.ndarray, pages: int) -> None:
        """Computes the keys of the request's first `pages` pages that it lacks."""
        keys, first = request.keys, len(request.keys) * self.page_size
        if first < pages * self.page_size:
            assert self.root is not None
            prefilled = request.prompt_length - first if self.by_phase else 0
            new = tokens[first : pages * self.page_size]
            keys += next_keys(keys[-1] if keys else self.root, new, self.page_size, prefilled)

    def _register(self, slot: int, start: int, stop: int) -> None:
        """Makes the pages that tokens [start, stop) have filled findable, for steps after this one."""
        if self.root is None or stop // self.page_size == start // self.page_size:
            return
        run = self.running
        request = run.requests[slot]
        assert request is not None
        first, last = start // self.page_size, stop // self.page_size
        self._extend_keys(request, run.tokens[slot], last)
        self._windows.register(self.pool, run.pages[slot], run.dropped[slot], request.keys, first, last)

    def forget(self, request: Request) -> None:
        """What the request's pages hold is of no use to another."""
        self._windows.forget(self.pool, request.keys)

    # -- leaving

    def preempt(self, slot: int) -> Request:
        """Takes a slot's pages; its request waits to be admitted again."""
        run = self.running
        request, epoch = run.requests[slot], int(run.epoch[slot])
        assert request is not None
        request.pending = bool(run.length[slot] > run.known[slot])
        if request.pending:
            self.orphans[slot, epoch] = request
        self.leave(slot)
        request.metrics.num_preemptions += 1
        self.stats.preemptions += 1
        self.add(request)
        return request

    def leave(self, slot: int) -> Request:
        """Takes a request out of its slot and gives back its pages; those that its output has filled become findable
        now, not one by one in the step's own time."""
        run = self.running
        computed = min(int(run.known[slot]) - 1, int(run.computed[slot]))  # the newest token may not be
        if computed > run.prefill_end[slot]:
            self._register(slot, int(run.prefill_end[slot]), computed)
        pages = run.pages_of(slot)
        request = run.leave(slot)
        self.hooks.release(request)
        self.pool.release(pages)
        if len(request.keys) > len(request.tokens) // self.page_size:
            request.keys = request.keys[: len(request.tokens) // self.page_size]
        return request

    def finished(self, request: Request) -> None:
        self.expectation.saw(len(request.tokens) - request.prompt_length, request.max_length - request.prompt_length)

    def remove(self, request: Request) -> None:
        """Forgets a request wherever it is; its pages are free again."""
        if request.slot is None or request is self.admitting:  # no other one is in the queue
            with suppress(ValueError):
                self.waiting.remove(request)
        if request.slot is not None:
            self.leave(request.slot)
        self.drop_pending(request)

    def drop_pending(self, request: Request) -> None:
        """The token that was in flight when a request was preempted is not wanted any more."""
        if request.pending:
            request.pending = False
            self.orphans = {k: r for k, r in self.orphans.items() if r is not request}
