"""The page allocator: who owns which page of the KV cache."""

from __future__ import annotations


class PageAllocator:
    """Hands out page numbers [0, num_pages). A page has one owner at a time; freeing one twice is a bug and raises."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is the likeliest to be in cache
        self._is_free = [True] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, or None (and nothing taken) when there are not enough."""
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._is_free[page] = False
        return taken

    def free(self, pages: list[int]) -> None:
        for page in pages:
            if self._is_free[page]:
                raise RuntimeError(f"page {page} is freed twice")
            self._is_free[page] = True
            self._free.append(page)
