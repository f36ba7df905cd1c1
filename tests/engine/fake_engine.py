"""Drives the real `Engine` on the fake device through a load, checking every step and every answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np

from nanoflow_jax.engine.engine import Engine, StepRecord
from nanoflow_jax.engine.pages import root_key
from nanoflow_jax.engine.request import LogprobRows, Request
from nanoflow_jax.engine.scheduler import ScheduledStep
from nanoflow_jax.prompts import check_prompt
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.slots import SlotSizes
from tests.engine.fake_device import EOS, VOCAB, FakeRunner, FakeStore, FakeTables, Letters, Windows, alone


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    params: SamplingParams
    arrival: int = 0  # turns of the loop before it
    only_prompt: bool = False
    watched: bool = False
    abort_after: int | None = None  # turns after its arrival
    scored_from: int = 0

    @property
    def max_length(self) -> int:
        return len(self.prompt) + (0 if self.only_prompt else self.params.max_tokens or 0)


def _joined(rows: LogprobRows) -> list[float]:
    return list(np.concatenate([[], *(part.logprob for part in rows.parts)]))


def model_len(jobs: Sequence[Job]) -> int:
    """The smallest max_model_len that serves them."""
    return max(max(len(job.prompt) + 1, job.max_length) for job in jobs)


@dataclass(frozen=True)
class Load:
    shapes: Sequence[StepShape]
    num_pages: int
    page_size: int
    jobs: Sequence[Job]
    slots: int = 4
    caching: bool = True
    by_phase: bool = False
    offload: int = 0  # pages; 0: none
    damage: int = 0
    bias_rows: int = 4
    windows: Windows = (None,)  # of each page table


@dataclass
class Drive:
    """One engine with one load."""

    load: Load
    steps: int = 0  # turns of the loop
    requests: dict[int, Request] = field(default_factory=dict)  # by number, which is the place among the jobs

    def __post_init__(self) -> None:
        load = self.load
        self.jobs = sorted(load.jobs, key=lambda job: job.arrival)
        sizes = SlotSizes(load.slots, load.bias_rows, load.shapes[0].table_width)
        self.runner = FakeRunner(sizes, load.num_pages, load.page_size, load.by_phase, load.windows)
        self.tables = FakeTables(self.runner)
        self.store = FakeStore(load.offload, load.damage) if load.offload else None
        fakes: list[Any] = [self.runner, self.tables, Letters(), self.store]
        self.engine = Engine(
            fakes[0],
            load.shapes,
            fakes[1],
            fakes[2],
            max_model_len=model_len(self.jobs),
            vocab_size=VOCAB,
            eos_token_ids=(EOS,),
            seed=0,
            root=root_key("a model") if load.caching else None,
            deterministic=load.by_phase,
            offload=fakes[3],
            windows=load.windows,
            on_step=self._record,
        )
        self.updates: Counter[int] = Counter()
        self.finished: list[Request] = []
        self.tokens_booked = 0
        self.orphans = 0  # preemptions while a token was in flight

    @property
    def bound(self) -> int:
        """Steps that always do: the first to arrive goes on with each."""
        return self.jobs[-1].arrival + sum(job.max_length + 4 for job in self.jobs)

    def go(self, before_step: Callable[[Drive], None] | None = None, *, strict: bool = True) -> Drive:
        """Until all have ended. strict: no step fails."""
        with patch.object(self.engine.scheduler, "schedule", self._checked(self.engine.scheduler.schedule)):
            while self.engine.has_work or len(self.requests) < len(self.jobs):
                self._arrive()
                self._abort()
                if before_step is not None:
                    before_step(self)
                self.turn(strict)
        self.check_idle()
        return self

    def turn(self, strict: bool = True) -> None:
        first = min((r for r in self.requests.values() if not r.finish_reason), key=lambda r: r.number, default=None)
        before = () if first is None else self._progress(first)
        self.finished += self.engine.step()
        self.updates.update(request.number for request in self.engine.updated)
        self.steps += 1
        if strict:
            errors = [r.error for r in self.finished if r.error]
            assert not errors, errors
            assert first is None or first.finish_reason or self._progress(first) > before, "the first does not go on"
            assert self.steps <= self.bound, "no progress"
            self._check_pages()

    def _progress(self, request: Request) -> tuple[int, ...]:
        run, slot = self.engine.running, request.slot
        if slot is None:
            return (len(request.tokens), 0, 0)
        return int(run.known[slot]), 1, int(run.computed[slot])

    def _arrive(self) -> None:
        while len(self.requests) < len(self.jobs) and self.jobs[len(self.requests)].arrival <= self.steps:
            job = self.jobs[len(self.requests)]
            check_prompt(job.prompt, job.params, self.engine.max_model_len, VOCAB, (EOS,))
            request = self.engine.add(
                None, list(job.prompt), job.params, watched=job.watched, scored_from=job.scored_from,
                max_tokens=0 if job.only_prompt else None,
            )  # fmt: skip
            self.requests[request.number] = request

    def _abort(self) -> None:
        for number, request in self.requests.items():
            job = self.jobs[number]
            if job.abort_after is not None and self.steps == job.arrival + job.abort_after:
                self.engine.abort(request)
                self.engine.abort(request)  # harmless

    # -- checks of each step

    def _checked(self, schedule: Callable[[], ScheduledStep | None]) -> Callable[[], ScheduledStep | None]:
        def checked() -> ScheduledStep | None:
            step = schedule()
            self.orphans += len(self.engine.scheduler.orphans)
            if step is not None:
                self._check_step(step)
            return step

        return checked

    def _check_step(self, step: ScheduledStep) -> None:
        shape, run = step.shape, self.engine.running
        rows = sum(c.stop - c.start for c in step.prefill)
        assert shape in self.load.shapes
        assert len(step.decode) + len(step.prefill) > 0, "an empty step"
        assert len(step.decode) <= shape.decode_rows
        assert rows <= shape.prefill_rows
        assert len(step.prefill) <= shape.prefill_segments
        slots = [*step.decode.tolist(), *(c.slot for c in step.prefill)]
        assert len(set(slots)) == len(slots), "a slot is in the step twice"
        numbers = [int(run.number[c.slot]) for c in step.prefill]
        assert numbers == sorted(numbers), "prompts are not in order"
        for slot, position in zip(step.decode.tolist(), step.positions.tolist(), strict=True):
            assert position // self.load.page_size < run.filled[slot].min(), "no page for a row"
            self._check_seen(slot, position)
            if self.load.by_phase:
                assert position >= run.prompt_length[slot], "a prompt's token in a decode row"
        for chunk in step.prefill:
            request = run.requests[chunk.slot]
            assert request is not None
            assert chunk.stop <= run.filled[chunk.slot].min() * self.load.page_size, "no page for a row"
            self._check_seen(chunk.slot, chunk.start)
            if self.load.by_phase:
                assert chunk.stop <= max(chunk.start, run.prompt_length[chunk.slot]), "output in a prefill row"

    def _check_seen(self, slot: int, position: int) -> None:
        """What a row sees is there, and what the first of its page does not is gone."""
        for window, dropped in zip(self.load.windows, self.engine.running.dropped[slot].tolist(), strict=True):
            size = self.load.page_size
            seen = 0 if window is None else max(0, position // size * size - window + 1)
            assert dropped == seen // size, "pages are kept, or given back, that should not be"

    def _check_pages(self) -> None:
        """Each page is available, or with those who run; only full pages of a prefix are with several."""
        run, pool, size = self.engine.running, self.engine.scheduler.pool, self.load.page_size
        users: Counter[int] = Counter()
        for slot in np.flatnonzero(run.active).tolist():
            pages = run.pages_of(slot).tolist()
            assert len(pages) == run.num_pages[slot]
            users.update(pages)
            unfinished = [
                page
                for table, last in zip(run.pages[slot], run.filled[slot], strict=True)
                for page in table[int(run.computed[slot]) // size : last].tolist()
            ]
            assert all(users[page] == 1 for page in unfinished), "a page that is still written has two users"
        assert len(users) + pool.num_available == pool.num_pages, "a page is lost, or two have it"

    def check_idle(self) -> None:
        """Nothing is left behind once all have ended."""
        engine, pool = self.engine, self.engine.scheduler.pool
        assert pool.num_available == pool.num_pages, "pages leaked"
        assert engine.running.num_running == 0
        assert not engine.scheduler.waiting
        assert not engine.scheduler.orphans
        assert not +self.tables.users, "a bias row has still a user"
        assert not engine._booking.texts

    def check_answers(self, failed: Sequence[int] = ()) -> None:
        """Each gives what it would give alone; `failed`: numbers of those that end in an error."""
        ended = Counter(request.number for request in self.finished)
        for number, request in self.requests.items():
            job = self.jobs[number]
            wanted = alone(
                job.prompt, job.params, seed=job.params.seed or 0, max_length=job.max_length,
                phases=self.load.by_phase, scored_from=job.scored_from, windows=self.load.windows,
            )  # fmt: skip
            output = request.output_token_ids
            assert request.slot is None
            assert not request.pending
            if request.finish_reason == "abort":
                assert job.abort_after is not None
                assert output == wanted.output[: len(output)], f"request {number} (aborted)"
                assert ended[number] == 0
                continue
            assert ended[number] == 1, f"request {number} was returned {ended[number]} times"
            if number in failed:
                assert request.finish_reason == "error"
                assert request.error
                assert output == wanted.output[: len(output)], f"request {number} (failed)"
                continue
            assert request.finish_reason == wanted.finish_reason, f"request {number}: {request.error}"
            assert output == wanted.output, f"request {number}"
            assert _joined(request.prompt_logprobs) == wanted.prompt_scores
            if job.params.logprobs is not None:
                assert _joined(request.logprobs) == wanted.logprobs
            if job.watched:
                assert self.updates[number] == len(output)

    def _record(self, record: StepRecord) -> None:
        self.tokens_booked += record.tokens
        if record.shape is not None:
            assert 0 <= record.rows_used <= record.shape.rows
