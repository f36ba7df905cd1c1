"""The page pool: whatever is asked of it, in any order, each page is in use, kept or free; and keys that chain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nanoflow_jax.engine.pages import Key, PagePool, next_keys, root_key

KEYS = [bytes([number]) * 4 for number in range(8)]


class _Pool(RuleBasedStateMachine):
    """Random use, against a model: how many users each page has, the kept pages in order, and who has which key."""

    pool_class: type[PagePool] = PagePool

    @initialize(num_pages=st.integers(1, 10))
    def make(self, num_pages: int) -> None:
        self.pool = self.pool_class(num_pages, self.on_evict)
        self.num_pages = num_pages
        self.start_afresh()

    def start_afresh(self) -> None:
        self.held: list[list[int]] = []  # sequences of pages, as requests have them
        self.users: Counter[int] = Counter()
        self.kept: list[int] = []
        self.key_of: dict[int, Key] = {}
        self.evicted: list[tuple[int, Key]] = []

    def on_evict(self, pages: list[int], keys: list[Key]) -> None:
        for page, key in zip(pages, keys, strict=True):
            assert key in self.pool, "the contents are still there"
            self.evicted.append((page, key))

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        available, free = self.pool.num_available, self.num_pages - len(self.users) - len(self.kept)
        self.evicted = []
        taken = self.pool.allocate(count)
        if count > available:
            assert taken is None, "more pages than there were"
            assert self.pool.num_available == available, "a refused allocation must take nothing"
            assert not self.evicted
            return
        assert taken is not None
        assert taken.dtype == np.int32
        going = self.kept[: max(0, count - free)]
        assert self.evicted == [(page, self.key_of[page]) for page in going], "those unused longest, with their keys"
        for page in going:
            self.kept.remove(page)
            del self.key_of[page]
        pages = taken.tolist()
        assert len(set(pages)) == count
        assert not set(pages) & set(self.users), "a page that is in use"
        assert not set(pages) & set(self.kept), "a page that is kept, though free ones are left"
        self.users.update(pages)
        self.held += [pages] if pages else []

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(np.array(pages, np.int32))
        self.users.subtract(pages)
        self.users = +self.users
        self.kept += [page for page in reversed(pages) if page not in self.users and page in self.key_of]

    @rule(data=st.data())
    def release_twice(self, data: st.DataObject) -> None:
        if not (unused := sorted(set(range(self.num_pages)) - set(self.users))):
            return
        page, before = data.draw(st.sampled_from(unused)), self.pool.num_available
        with pytest.raises(RuntimeError, match=f"page {page} is freed twice"):
            self.pool.release(np.array([page], np.int32))
        assert self.pool.num_available == before

    @precondition(lambda self: self.users)
    @rule(which=st.integers(0, 9), first=st.integers(0, 7))
    def register(self, which: int, first: int) -> None:
        """The pages of a sequence, from the first on."""
        pages = self.held[which % len(self.held)][: len(KEYS)]
        keys = (KEYS[first:] + KEYS[:first])[: len(pages)]
        self.pool.register(pages, keys)
        for page, key in zip(pages, keys, strict=True):
            if page not in self.key_of and key not in self.key_of.values():
                self.key_of[page] = key

    @rule(first=st.integers(0, 7), count=st.integers(0, 4), registered=st.booleans())
    def find_and_share(self, first: int, count: int, registered: bool) -> None:
        page_of = {key: page for page, key in self.key_of.items()}
        some = list(page_of) if registered and page_of else KEYS
        keys = (some[first % len(some) :] + some)[: min(count, len(some))]
        wanted = []
        for key in keys:
            if key not in page_of:
                break
            wanted.append(page_of[key])
        found = self.pool.find(keys)
        assert found == wanted
        self.pool.share(found)
        self.kept = [page for page in self.kept if page not in found]
        self.users.update(found)
        if found:
            self.held.append(found)

    @rule(dice=st.integers(0, 29))
    def reset(self, dice: int) -> None:
        if dice == 0:
            self.pool.reset()
            self.start_afresh()

    @invariant()
    def every_page_has_one_place(self) -> None:
        assert self.pool.num_available == self.num_pages - len(self.users), "a page is lost, or has two places"
        assert len(self.pool._kept) == len(self.kept)
        assert [self.pool.is_kept(page) for page in range(self.num_pages)] == [
            page in self.kept for page in range(self.num_pages)
        ]
        assert {key for key in KEYS if key in self.pool} == set(self.key_of.values())

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for pages in self.held:
            self.pool.release(np.array(pages, np.int32))
        everything = self.pool.allocate(self.num_pages)
        assert everything is not None
        assert sorted(everything.tolist()) == list(range(self.num_pages)), "all pages come back"


_SETTINGS = settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)


def test_a_page_is_used_or_kept_or_free() -> None:
    run_state_machine_as_test(_Pool, settings=_SETTINGS)


class _TakesBeforeItRefuses(PagePool):
    """Broken: gives what there is and says no."""

    def allocate(self, count: int) -> np.ndarray | None:
        taken = super().allocate(min(count, self.num_available))
        return taken if taken is not None and len(taken) == count else None


class _LosesAPage(PagePool):
    """Broken: keeps the last page of a larger release."""

    def release(self, pages: np.ndarray) -> None:
        super().release(pages[:-1] if len(pages) > 2 else pages)


class _EvictsTheNewest(PagePool):
    def _evict(self, count: int) -> None:
        for page in reversed(list(self._kept)):
            self._kept.move_to_end(page)
        super()._evict(count)


class _FindsEvicted(PagePool):
    """Broken: an evicted page is still found by its key."""

    def _evict(self, count: int) -> None:
        there = dict(self._page_of)
        super()._evict(count)
        self._page_of = there


class _SharesWithoutSaying(PagePool):
    def share(self, pages: list[int]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for page in pages:
            self._kept.pop(page, None)


class _KeepsTheWrongEnd(PagePool):
    """Broken: the beginning of a sequence is evicted before its end."""

    def release(self, pages: np.ndarray) -> None:
        super().release(pages[::-1])


class _MovesKeys(PagePool):
    """Broken: a key goes to the page that was computed last."""

    def register(self, pages: Sequence[int], keys: Sequence[Key]) -> None:
        for page, key in zip(pages, keys, strict=True):
            if page not in self._key_of:
                if (old := self._page_of.pop(key, None)) is not None:
                    del self._key_of[old]
                super().register([page], [key])


BROKEN = [
    _TakesBeforeItRefuses, _LosesAPage, _EvictsTheNewest, _FindsEvicted, _SharesWithoutSaying, _KeepsTheWrongEnd,
    _MovesKeys,
]  # fmt: skip


# It is enough that they fail: no time is spent on the smallest example.
_BROKEN_SETTINGS = settings(
    _SETTINGS, report_multiple_bugs=False, print_blob=False, phases=[Phase.generate], max_examples=200
)


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_pools_are_found(broken: type[PagePool]) -> None:
    machine = type("Broken", (_Pool,), {"pool_class": broken})
    with pytest.raises((AssertionError, RuntimeError, KeyError, pytest.fail.Exception)):
        run_state_machine_as_test(machine, settings=_BROKEN_SETTINGS)


# -- keys


def chain(tokens: list[int], prefilled: int, page_size: int, root: Key) -> list[Key]:
    """Keys of the full pages of a sequence whose first `prefilled` tokens went through prefill rows."""
    return next_keys(root, np.array(tokens, np.int32), page_size, prefilled)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2), max_size=12), st.integers(-2, 12), st.integers(1, 3), st.integers(0, 4))
def test_keys_may_be_computed_in_parts(tokens: list[int], prefilled: int, size: int, pages: int) -> None:
    """A chain can be taken up after any of its pages."""
    whole, first = chain(tokens, prefilled, size, b"root"), tokens[: pages * size]
    begun = chain(first, prefilled, size, b"root")
    rest = chain(tokens[pages * size :], prefilled - pages * size, size, begun[-1] if begun else b"root")
    assert len(whole) == len(tokens) // size
    assert whole == begun + rest


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_keys_are_equal_exactly_where_the_text_so_far_is(data: st.DataObject) -> None:
    """The text so far, how much of it was prefilled, and the root."""
    size = data.draw(st.integers(1, 3))
    text = st.lists(st.integers(0, 2), max_size=9)
    common = data.draw(text)
    sequences = [(common + data.draw(text), data.draw(st.integers(0, 9)), data.draw(st.booleans())) for _ in range(2)]
    one, two = (chain(tokens, prefilled, size, root_key("a", "b" * b)) for tokens, prefilled, b in sequences)
    for index in range(min(len(one), len(two))):
        seen = [(tokens[: (index + 1) * size], min(p, (index + 1) * size), b) for tokens, p, b in sequences]
        assert (one[index] == two[index]) == (seen[0] == seen[1])
    assert len(set(one)) == len(one), "pages of one sequence never share a key"


def test_roots_differ_by_every_part() -> None:
    roots = [root_key(*parts) for parts in (("a", "b"), ("ab",), ("a", "b", ""), ("b", "a"), ("a",))]
    assert len(set(roots)) == len(roots)


def test_keys_do_not_depend_on_the_integers_layout() -> None:
    page = np.arange(8, dtype=np.int32)
    assert next_keys(b"x", page, 8, 0) == next_keys(b"x", np.arange(16, dtype=np.int32)[:8], 8, 0)
    assert next_keys(b"x", page, 8, 0) == next_keys(b"x", page.astype(np.int64), 8, 0)
