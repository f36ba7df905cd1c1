"""The order of requests: every one once, longest first within a window, few held, no long one left for the end."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.evaluate.windows import FIRST, longest_first


@given(st.lists(st.one_of(st.none(), st.integers(0, 50)), max_size=400), st.integers(1, 100), st.integers(1, 400))
def test_every_item_once_and_bounded(items: list[int | None], window: int, window_bytes: int) -> None:
    taken = given_out = 0

    def source():
        nonlocal taken
        for item in items:
            taken += 1
            yield item

    found = []
    for item in longest_first(source(), float, lambda _: 7, window, window_bytes):
        given_out += item is not None
        found.append(item)
        held = len([i for i in items[:taken] if i is not None]) - given_out
        assert held <= 2 * min(window, window_bytes // 7 + 1) + 2
    assert sorted(i for i in found if i is not None) == sorted(i for i in items if i is not None)


def test_windows_are_sorted_and_the_end_is_short() -> None:
    rng = random.Random(3)
    items = [(rng.randrange(1000), i) for i in range(1000)]
    found = [item for item in longest_first(iter(items), lambda x: x[0], window=128) if item is not None]
    first = found[:FIRST]
    assert first == sorted(items[:FIRST], key=lambda x: -x[0]), "the first window begins after few lines"
    descents = sum(a[0] >= b[0] for a, b in itertools.pairwise(found))
    assert descents >= len(items) - 12, "a rise only where a window begins"
    tail = [length for length, _ in found[-64:]]
    assert max(tail) < 600 < max(length for length, _ in items[-64:]), "long ones of the end have begun before"


def test_equal_lengths_keep_the_order_of_the_input() -> None:
    assert list(longest_first(iter(range(500)), lambda _: 1.0, window=100)) == list(range(500))
