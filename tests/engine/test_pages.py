"""The page allocator: whatever is asked of it, in any order, a page has exactly one owner or is free."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from nanoflow_jax.engine.pages import PageAllocator


class _Allocations(RuleBasedStateMachine):
    """Random allocations, partial and whole frees and double frees, against a model that is a dict of owners."""

    allocator_class: type[PageAllocator] = PageAllocator

    @initialize(num_pages=st.integers(1, 24))
    def make(self, num_pages: int) -> None:
        self.pages = self.allocator_class(num_pages)
        self.num_pages = num_pages
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, 26))
    def allocate(self, count: int) -> None:
        free = self.pages.num_free
        taken = self.pages.allocate(count)
        if count > free:
            assert taken is None, "more pages than there were"
            assert self.pages.num_free == free, "a refused allocation must take nothing"
        else:
            assert taken is not None and len(taken) == count
            self.held.append(taken)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if not self.held:
            return
        owner = data.draw(st.integers(0, len(self.held) - 1))
        pages = data.draw(st.permutations(self.held.pop(owner)))
        cut = data.draw(st.integers(0, len(pages)))
        self.pages.free(pages[:cut])
        self.held.append(pages[cut:])

    @rule(data=st.data())
    def free_twice(self, data: st.DataObject) -> None:
        held = {page for pages in self.held for page in pages}
        if not (free := sorted(set(range(self.num_pages)) - held)):
            return
        page, before = data.draw(st.sampled_from(free)), self.pages.num_free
        with pytest.raises(RuntimeError, match=f"page {page} is freed twice"):
            self.pages.free([page])
        assert self.pages.num_free == before

    @invariant()
    def every_page_has_one_place(self) -> None:
        held = [page for pages in self.held for page in pages]
        assert len(held) == len(set(held)), "a page has two owners"
        assert set(held) <= set(range(self.num_pages)), "a page was invented"
        assert self.pages.num_free == self.num_pages - len(held), "a page was lost"

    def teardown(self) -> None:
        if not hasattr(self, "pages"):
            return
        for pages in self.held:
            self.pages.free(pages)
        everything = self.pages.allocate(self.num_pages)
        assert everything is not None
        assert sorted(everything) == list(range(self.num_pages)), "all pages come back"


_SETTINGS = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)


def test_a_page_is_never_leaked_shared_or_invented() -> None:
    run_state_machine_as_test(_Allocations, settings=_SETTINGS)


class _TakesBeforeItRefuses(PageAllocator):
    """Broken: gives what there is and says no."""

    def allocate(self, count: int) -> list[int] | None:
        taken = super().allocate(min(count, self.num_free))
        return taken if taken is not None and len(taken) == count else None


class _ForgetsDoubleFree(PageAllocator):
    """Broken: the same page may stand on the free list twice."""

    def free(self, pages: list[int]) -> None:
        self._free += pages


class _LosesAPage(PageAllocator):
    """Broken: keeps the last page of a larger free."""

    def free(self, pages: list[int]) -> None:
        super().free(pages[:-1] if len(pages) > 2 else pages)


@pytest.mark.parametrize("broken", [_TakesBeforeItRefuses, _ForgetsDoubleFree, _LosesAPage])
def test_broken_allocators_are_found(broken: type[PageAllocator]) -> None:
    machine = type("Broken", (_Allocations,), {"allocator_class": broken})
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_state_machine_as_test(machine, settings=settings(_SETTINGS, report_multiple_bugs=False, print_blob=False))


def test_double_free_in_one_call_raises() -> None:
    allocator = PageAllocator(4)
    pages = allocator.allocate(2)
    assert pages is not None
    with pytest.raises(RuntimeError, match="freed twice"):
        allocator.free([pages[0], pages[0]])
