"""The engine under random load, on a simulated device: each request gives what it gives alone, each ends, no page is
lost, no budget exceeded.

No JAX runs, so thousands of steps cost seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_jax.engine import engine, scheduler
from nanoflow_jax.engine.engine import step_shapes
from nanoflow_jax.engine.hooks import Hooks
from nanoflow_jax.engine.pages import PagePool
from nanoflow_jax.engine.request import Request
from nanoflow_jax.engine.scheduler import ScheduledStep, Scheduler
from nanoflow_jax.engine.slot_table import SlotTable
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.slots import SlotSizes, StepInputs
from tests.engine.fake_device import VOCAB, FakeRunner, alone, letters
from tests.engine.fake_engine import Drive, Job, Load, model_len

BASES = [[(number * 13 + place * place * 7 + place * 5) % VOCAB for place in range(60)] for number in range(3)]


@st.composite
def sampling(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 25))
    plain = draw(st.booleans())
    if plain:
        return SamplingParams(temperature=0.0, seed=draw(st.integers(0, 2)), max_tokens=max_tokens)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.7])),
        top_k=draw(st.sampled_from([-1, 5])),
        seed=draw(st.integers(0, 3)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.sampled_from([(), (3,), tuple(range(10, 22))])),
        stop=draw(st.sampled_from([None, None, letters([5]), [letters([1, 2]), letters([8]), letters([30])]])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.5])),
        logit_bias=draw(st.sampled_from([None, {1: 2.0}, {2: -1.0}])),
        logprobs=draw(st.sampled_from([None, 0, 2])),
        prompt_logprobs=draw(st.sampled_from([None, None, 1])),
    )


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    base = draw(st.sampled_from(BASES))
    shared = draw(st.integers(0, 40))
    own = draw(st.lists(st.integers(0, VOCAB - 1), min_size=0 if shared else 1, max_size=6))
    params = draw(sampling())
    return Job(
        (*base[:shared], *own),
        params,
        arrival=draw(st.sampled_from([0, 0, 0, 1, 2, 5, 30])),
        only_prompt=draw(st.integers(0, 5)) == 0 and shared + len(own) > 1,
        watched=draw(st.booleans()),
        abort_after=draw(st.one_of(st.none(), st.none(), st.integers(0, 30))),
        scored_from=draw(st.integers(0, shared)) if params.prompt_logprobs is not None else 0,
    )


@pytest.mark.parametrize(
    ("tokens", "slots", "rows"),
    [
        (2048, 1280, [(160, 0), (160, 128), (160, 1888), (1280, 0), (1280, 128), (1280, 768)]),
        (256, 64, [(8, 0), (8, 248), (64, 0), (64, 192)]),  # 64 prompt rows would be more than a quarter
        (256, 16, [(16, 0), (16, 240)]),  # and so would 8 decode rows
    ],
)
def test_step_shapes(tokens: int, slots: int, rows: list[tuple[int, int]]) -> None:
    assert [(shape.decode_rows, shape.prefill_rows) for shape in step_shapes(tokens, slots, 8)] == rows


@st.composite
def loads(draw: st.DrawFn) -> Load:
    page_size = draw(st.sampled_from([1, 2, 3, 4, 16]))
    their_jobs = draw(st.lists(jobs(), min_size=1, max_size=16))
    needed = -(-model_len(their_jobs) // page_size)  # the pool holds the longest request; often hardly more
    windows = draw(st.sampled_from([(None,), (None,), (None, 3), (2,), (1, None), (5, None, 9)]))
    if draw(st.booleans()):
        slots = draw(st.integers(1, 2)) * 8
        shapes = step_shapes(slots + draw(st.integers(1, 8)) * 8, slots, needed, tables=len(windows))
    else:
        rows = sorted(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True)))
        prefill = [0, *sorted(draw(st.lists(st.integers(1, 30), min_size=1, max_size=3, unique=True)))]
        segments = draw(st.integers(1, 5))
        slots = rows[-1]
        shapes = [StepShape(d, p, segments if p else 0, needed, len(windows)) for d in rows for p in prefill]
    by_phase = draw(st.booleans())
    if by_phase and draw(st.booleans()):
        shapes = [max(shapes, key=lambda s: s.rows)]
    chunk = max(shape.prefill_rows for shape in shapes)
    least = sum(
        needed if w is None else min(needed, -(-(w - 1) // page_size) + -(-chunk // page_size) + 1) for w in windows
    )
    num_pages = least + draw(st.one_of(st.integers(0, 4), st.integers(0, 3 * least)))
    caching = draw(st.booleans())
    return Load(
        shapes, num_pages, page_size, their_jobs, slots, caching, by_phase,
        offload=draw(st.sampled_from([0, 3, 1000])) if caching and windows == (None,) else 0,
        damage=draw(st.sampled_from([0, 0, 3])),
        bias_rows=draw(st.sampled_from([2, 5])),
        windows=windows,
    )  # fmt: skip


@settings(max_examples=120, deadline=None, derandomize=True)
@given(loads())
def test_any_load_is_served(load: Load) -> None:
    """All invariants hold at each step, and each request gives what it would give alone."""
    Drive(load).go().check_answers()


def preempted_twice(first: int, second: int) -> Drive:
    """One request that loses its slot and all its pages before turn `first`, and its slot again before `second`, when
    it may not have computed all its known tokens again."""

    def preempt(drive: Drive) -> None:
        scheduler, request = drive.engine.scheduler, drive.requests[0]
        if drive.steps in (first, second) and request.slot is not None:
            scheduler.preempt(request.slot)
            if drive.steps == first:
                scheduler.pool._evict(len(scheduler.pool._kept))
                drive.runner.contents += np.uint64(1)

    return Drive(Load([StepShape(2, 8, 1, 8)], 20, 4, [Job(tuple(BASES[0][:6]), plain(20))], 2, by_phase=True)).go(
        preempt, strict=False
    )


TWICE = [(first, second) for first in range(1, 18) for second in range(first + 1, first + 18)]


def test_preempted_while_computing_again() -> None:
    for first, second in TWICE:
        preempted_twice(first, second).check_answers()


def _registers_what_is_not_computed_again(original: Any) -> Any:
    def leave(self: Scheduler, slot: int) -> Request:
        run = self.running
        if (stop := int(run.known[slot]) - 1) > (first := int(run.prefill_end[slot])):
            self._register(slot, first, stop)
        return original(self, slot)

    return leave


def test_pages_that_were_not_computed_again_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the test above: it takes what is known for what is computed."""
    monkeypatch.setattr(Scheduler, "leave", _registers_what_is_not_computed_again(Scheduler.leave))
    with pytest.raises(AssertionError):
        for first, second in TWICE:
            preempted_twice(first, second).check_answers()


def plain(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0, **fields)


def crowd(**fields: Any) -> Load:
    """Twelve requests of 24 to 35 tokens, three prefixes among them, in a pool that holds two and a half."""
    their_jobs = [
        Job(
            (*BASES[i % 3][: 6 + i], i),
            plain(18, frequency_penalty=i % 2, min_tokens=9, stop_token_ids=(i % 3,)),
            i // 4,
        )
        for i in range(12)
    ]
    shapes = [StepShape(8, 0, 0, 9), StepShape(8, 24, 4, 9)]
    return Load(shapes, 22, 4, their_jobs, 8, **fields)


def turns(by_phase: bool = False) -> Load:
    """Prompts one after another, each the conversation so far: its prefix is there, in part from the output."""
    start = BASES[0][:8]
    base = (*start, *alone(start, plain(20), seed=0, max_length=28, phases=by_phase).output)
    their_jobs = [Job(base[: 8 + 4 * i], plain(8), 14 * i) for i in range(6)]
    their_jobs += [Job(base[:24], plain(6), 90), Job(base[:24], plain(6), 90), Job(base[:12], plain(1), 105)]
    return Load([StepShape(4, 16, 4, 10)], 40, 4, their_jobs, 4, by_phase=by_phase)


def pieces() -> Load:
    """The same pages of text behind different beginnings, and a long prompt that is left half computed."""
    first, second, third = BASES[0][:8], BASES[1][:8], BASES[2][:8]
    prompts = [first + second, second + third, third + second, second + first + [1], third]
    their_jobs = [Job(tuple(prompt), plain(3), 8 * i) for i, prompt in enumerate(prompts)]
    their_jobs += [Job(tuple(BASES[1][20:45]), plain(3), 60, abort_after=1), Job(tuple(BASES[1][20:45]), plain(3), 65)]
    return Load([StepShape(2, 6, 2, 8)], 60, 4, their_jobs, 2)


LOADS = {
    "crowd": crowd(),
    "crowd by phase": crowd(by_phase=True),
    "crowd without caching": crowd(caching=False),
    "crowd with offload": crowd(offload=100),
    "turns": turns(),
    "turns by phase": turns(by_phase=True),
    "pieces": pieces(),
}


@pytest.mark.parametrize("name", LOADS)
def test_the_loads_that_twins_are_judged_by(name: str) -> None:
    """Each is served, and does what it is there for: preempts, finds prefixes, restores pages."""
    drive = Drive(LOADS[name]).go()
    drive.check_answers()
    stats = drive.engine.scheduler.stats
    if name.startswith("crowd"):
        assert stats.preemptions > 1
        assert drive.orphans > 0
    assert (stats.cached_tokens > 0) == ("without" not in name)
    assert (stats.restored_tokens > 0) == ("offload" in name)


# -- broken twins: each is (where, name, what stands there instead, given the original)

Twin = tuple[Any, str, Callable[[Any], Any]]


def _key_ignores_parent(original: Any) -> Any:
    def keys(previous: bytes, tokens: np.ndarray, page_size: int, prefilled: int) -> list[bytes]:
        pages = [tokens[at : at + page_size] for at in range(0, len(tokens) - page_size + 1, page_size)]
        return [original(b"", page, page_size, prefilled - i * page_size)[0] for i, page in enumerate(pages)]

    return keys


def _key_ignores_phase(original: Any) -> Any:
    return lambda previous, tokens, page_size, prefilled: original(previous, tokens, page_size, 0)


def _evicts_without_forgetting(original: Any) -> Any:
    def evict(self: PagePool, count: int) -> None:
        pages = list(self._kept)[:count]
        for page in pages:
            del self._kept[page]
            self._key_of.pop(page)
        self._push(np.array(pages, np.int32))

    return evict


def _releases_twice(original: Any) -> Any:
    def release(self: PagePool, pages: np.ndarray) -> None:
        original(self, pages)
        if len(pages) > 1:
            original(self, pages[:1])

    return release


def _leaks(original: Any) -> Any:
    return lambda self, pages: original(self, pages[:-1])


def _believes_in_the_table(original: Any) -> Any:
    def enter(self: SlotTable, *args: Any) -> int:
        slot = original(self, *args)
        self.in_table[slot] = bool(self.computed[slot] >= self.prefill_end[slot])
        return slot

    return enter


def _keeps_the_epoch(original: Any) -> Any:
    def leave(self: SlotTable, slot: int) -> Request:
        request = original(self, slot)
        self.epoch[slot] -= 1
        return request

    return leave


def _hits_the_last_page(original: Any) -> Any:
    def keys(self: Scheduler, request: Request) -> list[bytes]:
        found = original(self, request)
        index = len(found)
        if self.root is not None and len(request.tokens) == (index + 1) * self.page_size:
            self._extend_keys(request, request.tokens, index + 1)
            found = request.keys[: index + 1]
        return found

    return keys


def _drops_orphans(original: Any) -> Any:
    def preempt(self: Scheduler, slot: int) -> Request:
        request = original(self, slot)
        self.orphans.clear()
        return request

    return preempt


def _forgets_that_it_waits(original: Any) -> Any:
    def preempt(self: Scheduler, slot: int) -> Request:
        request = original(self, slot)
        if request.pending:
            request.tokens = np.append(request.tokens, np.int32(0))  # what comes is taken for granted
            request.pending = False
        return request

    return preempt


def _grows_without_saying(original: Any) -> Any:
    """A new page is in the host's table and not among the pages that the step writes to."""

    def build(step: ScheduledStep, running: SlotTable, num_pages: int, sizes: SlotSizes) -> StepInputs:
        inputs = original(step, running, num_pages, sizes)
        for row, (slot, position) in enumerate(zip(step.decode.tolist(), step.positions.tolist(), strict=True)):
            inputs.write_pages[row] = running.pages[slot, 0, max(0, position // running.page_size - 1)]
        return inputs

    return build


def _trusts_the_host(original: Any) -> Any:
    """Sends a token for rows whose token only the device knows."""

    def build(*args: Any) -> StepInputs:
        inputs = original(*args)
        inputs.token_ids[:] = np.maximum(inputs.token_ids, 0)
        return inputs

    return build


def _swaps_settings(original: Any) -> Any:
    """Rows that sample have the settings of the row beside them."""

    def build(*args: Any) -> StepInputs:
        inputs = original(*args)
        inputs.sampling.history[:] = np.roll(inputs.sampling.history, 1)
        return inputs

    return build


def _registers_what_is_not_computed(original: Any) -> Any:
    def leave(self: Scheduler, slot: int) -> Request:
        known, first = int(self.running.known[slot]), int(self.running.prefill_end[slot])
        if known > first:
            self._register(slot, first, known)
        return original(self, slot)

    return leave


def _registers_half_a_page(original: Any) -> Any:
    def register(self: Scheduler, slot: int, start: int, stop: int) -> None:
        original(self, slot, start, -(-stop // self.page_size) * self.page_size)

    return register


def _evicts_the_first(original: Any) -> Any:
    def preempt(self: Scheduler, slot: int) -> Request:
        return original(self, int(self.running.number.argmin()))

    return preempt


def _restores_nothing(original: Any) -> Any:
    return lambda self, pages, contents: None


def _overfills(original: Any) -> Any:
    def chunks(self: Scheduler, prefilling: list[int], shape: StepShape) -> list[Any]:
        return original(self, prefilling, replace(shape, prefill_rows=shape.prefill_rows + 3))

    return chunks


def _forgets_a_row(original: Any) -> Any:
    return lambda self: original(self)[1:]


def _books_late(original: Any) -> Any:
    """The length limit is seen one token late."""

    def append(self: SlotTable, slots: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        ended = original(self, slots, tokens)
        return ended & ~(self.known[slots] == self.max_length[slots])

    return append


def _keeps_biases(original: Any) -> Any:
    return lambda self, request: None


TWINS: dict[str, Twin] = {
    "key ignores its parent": (scheduler, "next_keys", _key_ignores_parent),
    "key ignores the phase": (scheduler, "next_keys", _key_ignores_phase),
    "evicted pages are still found": (PagePool, "_evict", _evicts_without_forgetting),
    "a page is released twice": (PagePool, "release", _releases_twice),
    "a page leaks": (PagePool, "release", _leaks),
    "tables that were not brought": (SlotTable, "enter", _believes_in_the_table),
    "a slot's next request is taken for its last": (SlotTable, "leave", _keeps_the_epoch),
    "the page of the last token is found": (Scheduler, "_keys", _hits_the_last_page),
    "tokens of orphans are dropped": (Scheduler, "preempt", _drops_orphans),
    "tokens of orphans are not awaited": (Scheduler, "preempt", _forgets_that_it_waits),
    "growth that the device does not learn": (engine, "build_inputs", _grows_without_saying),
    "tokens that the host does not know": (engine, "build_inputs", _trusts_the_host),
    "another row's history": (engine, "build_inputs", _swaps_settings),
    "a page registered before it is computed": (Scheduler, "leave", _registers_what_is_not_computed),
    "a page registered before it is full": (Scheduler, "_register", _registers_half_a_page),
    "the first is preempted": (Scheduler, "preempt", _evicts_the_first),
    "restored pages are empty": (FakeRunner, "insert", _restores_nothing),
    "too many rows": (Scheduler, "_chunks", _overfills),
    "a decode row is forgotten": (Scheduler, "_due", _forgets_a_row),
    "the end is not seen": (SlotTable, "append", _books_late),
    "biases are kept": (Hooks, "release", _keeps_biases),
}


@pytest.mark.parametrize("name", TWINS)
def test_broken_twins_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fails a check on one of the loads above."""
    where, attribute, twin = TWINS[name]
    monkeypatch.setattr(where, attribute, twin(getattr(where, attribute)))
    with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError)):
        for load in LOADS.values():
            Drive(load).go().check_answers()


def test_a_long_sequence_holds_what_its_windows_see() -> None:
    """A prompt of 300 tokens in chunks of 8, then 100 tokens: full pages grow, those of a window of 10 do not."""
    jobs = [Job(tuple(range(30)) * 10, plain(100))]
    drive = Drive(Load([StepShape(2, 8, 1, 100, 2)], 130, 4, jobs, 2, windows=(None, 10)))
    most = [0, 0]

    def watch(drive: Drive) -> None:
        held = (drive.engine.running.filled - drive.engine.running.dropped).max(axis=0).tolist()
        phase = int(drive.engine.running.computed.max()) > 310
        most[phase] = max(most[phase], held[1])

    drive.go(watch).check_answers()
    assert most == [5, 4]  # 9 tokens before a chunk and its 8, which starts with a page; then 9 and their row


def test_what_fell_out_of_a_window_is_not_found() -> None:
    """The pages below it are others' by now; those inside it are found when a chat goes on from its end."""
    params = plain(40)
    prompt = tuple(BASES[0][:9])
    said = alone(prompt, params, seed=params.seed or 0, max_length=49, phases=False, windows=(6,)).output
    assert len(said) == 40
    early = Job((*prompt, *said[:20], 1), plain(4), arrival=60)
    late = Job((*prompt, *said, 1), plain(4), arrival=60)
    other = Job(tuple(BASES[1][:9]), plain(100))
    drive = Drive(Load([StepShape(3, 8, 2, 60, 1)], 60, 2, [Job(prompt, params), other, early, late], 3, windows=(6,)))
    drive.go().check_answers()
    assert drive.requests[2].metrics.num_cached_tokens <= 8  # of the prompt
    assert drive.requests[3].metrics.num_cached_tokens == 48


def test_two_sequences_leave_a_shared_page_at_once() -> None:
    jobs = [Job(tuple(BASES[0][:12]), plain(20), arrival=at) for at in (0, 3, 3)]
    Drive(Load([StepShape(4, 16, 4, 40, 2)], 60, 4, jobs, 4, windows=(None, 9))).go().check_answers()
