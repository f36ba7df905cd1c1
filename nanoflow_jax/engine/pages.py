"""The KV pages: who uses which, and which of them hold a prefix that another request may reuse.

A page is in use (by one request or, when it holds a shared prefix, by several), or kept (no one uses it, but it holds
a known prefix), or free. A kept page is taken, the one unused longest first, when the free ones run out.

Keys chain: a page's key is a digest of the page before it and of its own tokens, so that equal keys mean equal text
from the beginning.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

Key = bytes


def key_of_table(key: Key, table: int) -> Key:
    """Of the page that holds the same tokens for the layers of another page table."""
    return key + bytes([table]) if table else key


def root_key(*what: str) -> Key:
    """Where chains start: whatever makes pages of the same tokens differ (model, dtype, plan, ...)."""
    return hashlib.blake2b("\0".join(what).encode(), digest_size=16).digest()


def next_keys(previous: Key, tokens: np.ndarray, page_size: int, prefilled: int) -> list[Key]:
    """Keys of the whole pages of `tokens` [n] int32, which follow the page of key `previous`. `prefilled`: how many of
    the tokens went through prefill rows, where that makes a difference (deterministic mode), else 0."""
    data, step, keys = tokens.astype("<i4", copy=False).tobytes(), 4 * page_size, []
    for end in range(step, len(data) + 1, step):
        of_page = min(max(prefilled, 0), page_size).to_bytes(4, "little")
        prefilled -= page_size
        previous = hashlib.blake2b(previous + of_page + data[end - step : end], digest_size=16).digest()
        keys.append(previous)
    return keys


class PagePool:
    """Page numbers [0, num_pages). `on_evict(pages, keys)` is called before kept pages are reused; it may copy them
    away."""

    def __init__(self, num_pages: int, on_evict: Callable[[list[int], list[Key]], None] | None = None):
        self.num_pages = num_pages
        self._users = np.zeros(num_pages, np.int32)
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # a stack; its first _num_free entries count
        self._num_free = num_pages
        self._kept: OrderedDict[int, None] = OrderedDict()  # the first is evicted first
        self._key_of: dict[int, Key] = {}
        self._page_of: dict[Key, int] = {}
        self._on_evict = on_evict

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: free ones, and kept ones after eviction."""
        return self._num_free + len(self._kept)

    def allocate(self, count: int) -> np.ndarray | None:
        """`count` pages [count] int32, each with one user; or None, and nothing taken, when there are not enough."""
        if count > self.num_available:
            return None
        if (short := count - self._num_free) > 0:
            self._evict(short)
        self._num_free -= count
        taken = self._free[self._num_free : self._num_free + count][::-1].copy()
        self._users[taken] = 1
        return taken

    def _evict(self, count: int) -> None:
        pages = [page for page, _ in zip(self._kept, range(count), strict=False)]
        if self._on_evict is not None:
            self._on_evict(pages, [self._key_of[page] for page in pages])
        for page in pages:
            del self._kept[page]
            del self._page_of[self._key_of.pop(page)]
        self._push(np.array(pages, np.int32))

    def _push(self, pages: np.ndarray) -> None:
        self._free[self._num_free : self._num_free + len(pages)] = pages
        self._num_free += len(pages)

    def release(self, pages: np.ndarray) -> None:
        """One user less of each page, for each time that it is named; pages in order of the sequence, so that its end
        is evicted before its start."""
        np.subtract.at(self._users, pages, 1)
        users = self._users[pages]
        if users.min(initial=0) < 0:
            np.add.at(self._users, pages, 1)  # the counts stay as they were
            raise RuntimeError(f"page {int(pages[users.argmin()])} is freed twice")
        free = []
        for page in dict.fromkeys(pages[users == 0][::-1].tolist()):
            if page in self._key_of:
                self._kept[page] = None
            else:
                free.append(page)
        self._push(np.array(free, np.int32))

    def register(self, pages: Sequence[int], keys: Sequence[Key]) -> None:
        """Makes pages in use findable. A key that another page has already stays there."""
        page_of, key_of = self._page_of, self._key_of
        for page, key in zip(pages, keys, strict=True):
            if key not in page_of and page not in key_of:
                page_of[key] = page
                key_of[page] = key

    def forget(self, keys: Sequence[Key]) -> None:
        """Makes kept pages free: what they hold is of no use. Those that somebody uses stay findable."""
        for key in keys:
            page = self._page_of.get(key)
            if page is not None and page in self._kept:
                del self._kept[page], self._page_of[key], self._key_of[page]
                self._push(np.array([page], np.int32))

    def find(self, keys: Sequence[Key]) -> list[int]:
        """Pages of the longest run of `keys`, from the first on, that are here."""
        found = []
        for key in keys:
            if (page := self._page_of.get(key)) is None:
                break
            found.append(page)
        return found

    def is_kept(self, page: int) -> bool:
        return page in self._kept

    def __contains__(self, key: Key) -> bool:
        return key in self._page_of

    def share(self, pages: Sequence[int]) -> None:
        """One user more of pages that `find` gave."""
        for page in pages:
            if self._users[page] == 0:
                del self._kept[page]
            self._users[page] += 1

    def reset(self) -> None:
        """All pages are free, their contents lost: nobody uses any."""
        self.__init__(self.num_pages, self._on_evict)
