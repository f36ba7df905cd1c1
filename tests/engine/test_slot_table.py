"""State by slot: who has which slot, and booking of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_jax.engine.request import Request
from nanoflow_jax.engine.slot_table import NEVER, STOPS, SlotTable
from nanoflow_jax.sampling_params import SamplingParams

SLOTS, LIMIT, PAGE = 4, 32, 4


def request(
    number: int, prompt: list[int], stops: frozenset[int] = frozenset(), params: SamplingParams | None = None
) -> Request:
    params = params or SamplingParams(max_tokens=8)
    return Request(number, str(number), None, prompt, params, number + 100, stops, len(prompt) + 8)


def enter(running: SlotTable, r: Request, biases: tuple[int, int] = (0, 0)) -> int:
    pages = np.arange(-(-len(r.tokens) // PAGE), dtype=np.int32) + 10 * r.number
    return running.enter(r, [(0, pages)], 0, len(r.tokens), biases, len(pages))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, SLOTS - 1), st.integers(0, 5)), max_size=40))
def test_slots_keep_requests_apart(events: list[tuple[int, int, int]]) -> None:
    """Requests come, get tokens and leave, in any order; each leaves with its own, and a slot's epoch tells its
    requests apart."""
    running, mine = SlotTable(SLOTS, LIMIT, PAGE, 5), {}
    epochs: set[tuple[int, int]] = set()
    for number, (kind, which, token) in enumerate(events):
        if kind == 0 and not running.is_full:
            r = request(number, [token] * (1 + which))
            slot = enter(running, r)
            assert (slot, int(running.epoch[slot])) not in epochs
            epochs.add((slot, int(running.epoch[slot])))
            mine[slot] = [token] * (1 + which)
        elif mine and kind == 1:
            slots = np.array(sorted(mine), np.int32)[: which + 1]
            slots = slots[[len(mine[s]) < 12 for s in slots.tolist()]]
            tokens = (token + slots).astype(np.int32)
            running.append(slots, tokens)
            for slot, new in zip(slots.tolist(), tokens.tolist(), strict=True):
                mine[slot].append(new)
        elif mine and kind == 2:
            slot = sorted(mine)[which % len(mine)]
            left = running.leave(slot)
            assert left.slot is None
            assert left.tokens.tolist() == mine.pop(slot)
        assert running.num_running == len(mine)
        assert running.is_full == (len(mine) == SLOTS)
        assert set(np.flatnonzero(running.active).tolist()) == set(mine)
        assert all((running.number[s] == NEVER) == (running.requests[s] is None) for s in range(SLOTS))
        numbers = running.number[running.in_order(running.active)]
        assert (np.diff(numbers) > 0).all()
        for slot, tokens in mine.items():
            assert running.tokens[slot, : running.known[slot]].tolist() == tokens


@pytest.mark.parametrize("number_of_stops", [1, STOPS, STOPS + 3])
def test_ends_are_seen(number_of_stops: int) -> None:
    """Every stop token among the first STOPS, and the length; a request with more of them is watched."""
    stops = list(range(20, 20 + number_of_stops))
    for token in stops[:STOPS]:
        running = SlotTable(SLOTS, LIMIT, PAGE, 5)
        slots = np.array([enter(running, request(i, [1, 2], frozenset(stops if i else []))) for i in range(2)])
        assert running.watched[slots[1]] == (number_of_stops > STOPS)
        assert running.append(slots, np.array([token, token])).tolist() == [False, True]
    running = SlotTable(SLOTS, LIMIT, PAGE, 5)
    slot = np.array([enter(running, request(0, [1, 2]))])
    assert [bool(running.append(slot, np.array([5]))[0]) for _ in range(8)] == [False] * 7 + [True]


def test_a_slot_has_the_settings_of_its_request() -> None:
    """All of them, also after another had the slot."""
    running = SlotTable(1, LIMIT, PAGE, 5)
    fancy = SamplingParams(
        temperature=0.5, top_p=0.25, top_k=3, min_p=0.125, presence_penalty=1.0, frequency_penalty=-1.0,
        repetition_penalty=2.0, logprobs=4, min_tokens=2, stop="x",
    )  # fmt: skip
    for params, history, watched in ((fancy, 0, True), (SamplingParams(top_k=-1), 1, False)):
        r = request(3, [1, 2, 3], params=params)
        slot = enter(running, r, biases=(5, 6))
        assert slot == 0
        s, p = running.sampling, r.params
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            assert getattr(s, name)[0] == np.float32(getattr(p, name)), name
        assert (s.top_k[0], s.seed[0]) == (max(p.top_k, 0), 103)
        assert s.top_logprobs[0] == (-1 if p.logprobs is None else p.logprobs)
        assert (running.history[0], running.watched[0]) == (history, watched)
        assert (running.min_length[0], running.bias_below[0], running.bias[0]) == (3 + p.min_tokens, 5, 6)
        assert running.pages_of(0).tolist() == [30]
        assert not running.in_table[0]
        running.leave(slot)
        assert running.pages_of(0).tolist() == []
