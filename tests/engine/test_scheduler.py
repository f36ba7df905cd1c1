"""The scheduler under random load: every request ends, no page is shared or leaked, no budget is exceeded.

The model is a pure function of a request's tokens and no JAX runs, so thousands of steps cost a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_jax.engine.engine import step_shapes
from nanoflow_jax.engine.pages import PageAllocator
from nanoflow_jax.engine.request import Request
from nanoflow_jax.engine.sampling_params import SamplingParams
from nanoflow_jax.engine.scheduler import Chunk, ScheduledStep, Scheduler
from nanoflow_jax.schedule.batch import StepShape

VOCAB = 50
END = 7


def next_token(tokens: list[int]) -> int:
    """The fake model: depends on every token and its place."""
    state = len(tokens)
    for place, token in enumerate(tokens):
        state = (state * 31 + token * (place + 3) + 11) % 100_003
    return state % VOCAB


def alone(prompt: list[int], max_length: int) -> list[int]:
    """What a request must give, whatever its neighbours."""
    tokens = list(prompt)
    while len(tokens) < max_length:
        tokens.append(next_token(tokens))
        if tokens[-1] == END:
            break
    return tokens


def request(number: int, prompt: list[int], max_length: int) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=None)
    return Request(number, str(number), None, prompt, params, 0, frozenset({END}), max_length)


@dataclass
class Load:
    """Requests as (arrival step, prompt length, tokens to generate), and the engine that they meet."""

    shapes: list[StepShape]
    num_pages: int
    page_size: int
    requests: list[tuple[int, int, int]]


@st.composite
def loads(draw: st.DrawFn) -> Load:
    page_size = draw(st.sampled_from([1, 2, 3, 4, 16]))
    requests = draw(
        st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40), st.integers(1, 25)), min_size=1, max_size=24)
    )
    longest = max(prompt + new for _, prompt, new in requests)
    needed = -(-longest // page_size)  # the pool holds the longest request; often hardly more
    num_pages = needed + draw(st.one_of(st.integers(0, 4), st.integers(0, 3 * needed)))
    if draw(st.booleans()):
        decode = draw(st.integers(1, 3)) * 8
        shapes = step_shapes(decode + draw(st.integers(1, 8)) * 8, decode, needed)
    else:
        rows = sorted(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True)))
        prefill = [0, *sorted(draw(st.lists(st.integers(1, 30), min_size=1, max_size=3, unique=True)))]
        segments = draw(st.integers(1, 5))
        shapes = [StepShape(d, p, segments if p else 0, needed) for d in rows for p in prefill]
    return Load(shapes, num_pages, page_size, requests)


@dataclass
class Run:
    """Drives a scheduler with the fake model and checks every step."""

    load: Load
    scheduler_class: type[Scheduler] = Scheduler
    preemptions: int = 0
    steps: int = 0
    computed: dict[int, list[int]] = field(default_factory=dict)  # request -> positions since it was last admitted
    # page * page_size + slot -> (request, position, token)
    kv: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    def go(self) -> list[Request]:
        load = self.load
        pages = PageAllocator(load.num_pages)
        scheduler = self.scheduler_class(load.shapes, pages, load.page_size)
        arrivals = sorted(load.requests)
        everyone: list[Request] = []
        # The first in line goes on with every step, so steps are bounded by the tokens of all, one by one.
        bound = arrivals[-1][0] + sum(prompt + new for _, prompt, new in arrivals) + len(arrivals)
        clock = 0
        while scheduler.has_work or len(everyone) < len(arrivals):
            while len(everyone) < len(arrivals) and arrivals[len(everyone)][0] <= clock:
                number = len(everyone)
                _, length, new = arrivals[number]
                prompt = [(number * 13 + place * 5) % VOCAB for place in range(length)]
                everyone.append(request(number, prompt, length + new))
                scheduler.add(everyone[-1])
            clock += 1
            assert clock <= bound, "no progress"
            if scheduler.has_work:
                self._step(scheduler, everyone)
        assert pages.num_free == load.num_pages, "pages leaked"
        self.preemptions = scheduler.num_preemptions
        return everyone

    def _step(self, scheduler: Scheduler, everyone: list[Request]) -> None:
        first = next(r for r in everyone if r.finish_reason is None)
        before = first.num_computed, len(first.tokens)
        preemptions = {r.number: r.metrics.num_preemptions for r in everyone}
        step = scheduler.schedule()
        self.steps += 1
        for r in everyone:
            if r.metrics.num_preemptions > preemptions[r.number]:
                self.computed[r.number] = []
        assert first.metrics.num_preemptions == preemptions[first.number], "the first to arrive was preempted"
        self._check(step, scheduler, everyone)
        for chunk in [*step.decode, *step.prefill]:
            self._compute(chunk)
            token = next_token(chunk.request.tokens) if chunk.samples else None
            scheduler.computed(chunk, token)
        assert (first.num_computed, len(first.tokens)) > before, "the first to arrive did not move"

    def _check(self, step: ScheduledStep, scheduler: Scheduler, everyone: list[Request]) -> None:
        shape = step.shape
        rows = sum(c.stop - c.start for c in step.prefill)
        assert len(step.decode) + rows > 0, "an empty step"
        assert shape in self.load.shapes
        assert len(step.decode) <= shape.decode_rows
        assert rows <= shape.prefill_rows
        assert len(step.prefill) <= shape.prefill_segments
        # Nothing smaller would hold it.
        for other in self.load.shapes:
            holds = (
                other.decode_rows >= len(step.decode)
                and other.prefill_rows >= rows
                and other.prefill_segments >= len(step.prefill)
            )
            assert not holds or other.rows >= shape.rows, f"{other} is smaller than {shape} and holds the step"
        # Decode rows first: one each for all that can go on, by arrival; then chunks, by arrival.
        assert all(c.stop - c.start == 1 and c.samples for c in step.decode)
        scheduled = [c.request.number for c in [*step.decode, *step.prefill]]
        assert len(scheduled) == len(set(scheduled)), "a request is in the step twice"
        due = {r.number for r in scheduler.running if r.remaining == 1}
        assert due <= {c.request.number for c in step.decode}, "a running request's decode row is left out"
        prefill = [c.request.number for c in step.prefill]
        assert prefill == sorted(prefill)
        # Pages: those of running requests are theirs alone, enough for every scheduled token, and no page is lost.
        owned = [page for r in scheduler.running for page in r.pages]
        assert len(owned) == len(set(owned)), "a page has two owners"
        assert len(owned) + scheduler.allocator.num_free == self.load.num_pages, "a page is lost"
        assert not any(r.pages for r in everyone if r not in scheduler.running), "only running requests hold pages"
        for c in [*step.decode, *step.prefill]:
            assert c.request in scheduler.running
            assert c.start == c.request.num_computed, "chunks of a request are contiguous"
            assert c.stop <= len(c.request.tokens)
            assert len(c.request.pages) * self.load.page_size >= c.stop, "no page for a scheduled token"
            assert len(c.request.pages) <= shape.pages_per_request, "more pages than the table is wide"

    def _compute(self, chunk: Chunk) -> None:
        """Writes the chunk's tokens to their slots; a token that is sampled from must find its whole sequence there."""
        r, size = chunk.request, self.load.page_size
        self.computed.setdefault(r.number, []).extend(range(chunk.start, chunk.stop))
        for position in range(chunk.start, chunk.stop):
            slot = r.pages[position // size] * size + position % size
            self.kv[slot] = (r.number, position, r.tokens[position])
        for position in range(chunk.stop):
            slot = r.pages[position // size] * size + position % size
            assert self.kv.get(slot) == (r.number, position, r.tokens[position]), "another's, or no, key and value"
        if chunk.samples:
            assert self.computed[r.number] == list(range(len(r.tokens))), "every token exactly once, in order"


def check_answers(load: Load, everyone: list[Request]) -> None:
    for r, (_, length, new) in zip(everyone, sorted(load.requests), strict=True):
        assert r.finish_reason == ("stop" if r.tokens[-1] == END and len(r.tokens) > length else "length")
        assert r.tokens == alone(r.prompt_token_ids, length + new)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(loads())
def test_any_load_is_served(load: Load) -> None:
    """All invariants hold at each step, and each request gives what it would give alone."""
    check_answers(load, Run(load).go())


def crowded() -> Load:
    """Twelve requests of 30 tokens in a pool that holds two and a half."""
    return Load(step_shapes(32, 16, 9), 20, 4, [(i // 4, 6 + i, 18) for i in range(12)])


def test_a_crowd_preempts_and_still_ends() -> None:
    """The load that the broken twins below are judged by does preempt, chunk and queue."""
    run = Run(crowded())
    check_answers(run.load, run.go())
    assert run.preemptions > 0


def test_a_request_as_long_as_the_pool_runs_beside_others() -> None:
    """A request that needs every page gets them in the end."""
    load = Load(step_shapes(16, 8, 10), 10, 4, [(0, 5, 35), (0, 5, 35), (1, 39, 1)])
    check_answers(load, Run(load).go())


def test_chunks_cover_a_long_prompt_in_order() -> None:
    """A prompt of 100 tokens in steps of 24 prefill rows: chunks of 24 and the rest, then decode rows."""
    scheduler = Scheduler([StepShape(8, 24, 2, 8)], PageAllocator(8), 16)
    r = request(0, list(range(8, 48)) * 2 + [1] * 20, 102)
    scheduler.add(r)
    seen = []
    while scheduler.has_work:
        step = scheduler.schedule()
        for chunk in [*step.decode, *step.prefill]:
            seen.append((chunk.start, chunk.stop, bool(step.decode)))
            scheduler.computed(chunk, 1 if chunk.samples else None)
    assert seen == [
        (0, 24, False),
        (24, 48, False),
        (48, 72, False),
        (72, 96, False),
        (96, 100, False),
        (100, 101, True),
    ]


def test_the_smallest_shape_is_chosen() -> None:
    """One row in the small shape, nine decode rows in the wide one, a prompt in the one that holds it."""
    shapes = [StepShape(8, 0, 0, 4), StepShape(16, 0, 0, 4), StepShape(8, 16, 1, 4), StepShape(16, 64, 4, 4)]
    scheduler = Scheduler(shapes, PageAllocator(64), 16)
    assert scheduler._choose(1, []) == shapes[0]
    assert scheduler._choose(9, []) == shapes[1]
    assert scheduler._choose(3, [16]) == shapes[2]
    assert scheduler._choose(3, [17]) == shapes[3]
    assert scheduler._choose(3, [2, 2]) == shapes[3]
    assert scheduler._choose(9, [500]) == shapes[3]


def test_abort_frees_pages_wherever_the_request_is() -> None:
    scheduler = Scheduler([StepShape(2, 8, 2, 4)], PageAllocator(4), 4)
    requests = [request(i, [1, 2, 3], 8) for i in range(4)]
    for r in requests:
        scheduler.add(r)
    for chunk in (step := scheduler.schedule()).prefill:
        scheduler.computed(chunk, 1)
    assert step.prefill and scheduler.running and scheduler.waiting
    for r in requests:
        scheduler.abort(r)
        scheduler.abort(r)  # harmless
    assert not scheduler.has_work
    assert scheduler.allocator.num_free == 4


class _SharesPages(Scheduler):
    """Broken: a request that is extended takes a page of the first one."""

    def _extend(self, request: Request) -> bool:
        if request is not self.running[0] and self.pages_for(len(request.tokens)) > len(request.pages):
            request.pages.append(self.running[0].pages[0])
            return True
        return super()._extend(request)


class _KeepsProgress(Scheduler):
    """Broken: a preempted request believes that its keys and values are still there."""

    def _preempt(self, request: Request) -> None:
        computed = request.num_computed
        super()._preempt(request)
        request.num_computed = computed - 1


class _EvictsTheFirst(Scheduler):
    """Broken: the first to arrive gives way."""

    def _extend(self, request: Request) -> bool:
        while (missing := self.pages_for(len(request.tokens)) - len(request.pages)) > 0:
            if (pages := self.allocator.allocate(missing)) is not None:
                request.pages += pages
                break
            victim = self.running[0]
            self._preempt(victim)
            if victim is request:
                return False
        return True


class _LeaksPages(Scheduler):
    """Broken: a page of each request that ends is not given back."""

    def _release(self, request: Request) -> None:
        self.allocator.free(request.pages[1:])
        request.pages = []


class _TakesTheLargest(Scheduler):
    """Broken: always the largest shape."""

    def _choose(self, decode: int, prefill: list[int]) -> StepShape:
        return self.shapes[-1]


class _OverfillsRows(Scheduler):
    """Broken: the last chunk goes to the end of its prompt, whatever the budget."""

    def schedule(self) -> ScheduledStep:
        step = super().schedule()
        chunks = [Chunk(c.request, c.start, len(c.request.tokens)) for c in step.prefill]
        return ScheduledStep(step.shape, step.decode, chunks)


class _ForgetsDecode(Scheduler):
    """Broken: a decode row is left out while there are prompts."""

    def schedule(self) -> ScheduledStep:
        step = super().schedule()
        return ScheduledStep(step.shape, step.decode[:-1] if step.prefill else step.decode, step.prefill)


BROKEN = [
    _SharesPages, _KeepsProgress, _EvictsTheFirst, _LeaksPages, _TakesTheLargest, _OverfillsRows, _ForgetsDecode,
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_schedulers_are_found(broken: type[Scheduler]) -> None:
    """Each twin fails a check on a load that preempts, or on one with a few segments and long prompts."""
    busy = Load([StepShape(4, 0, 0, 20), StepShape(4, 8, 1, 20)], 30, 4, [(0, 20, 10)] * 6)
    with pytest.raises((AssertionError, RuntimeError)):
        for load in (crowded(), busy):
            check_answers(load, Run(load, broken).go())
