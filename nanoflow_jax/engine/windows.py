"""What page tables whose layers have a window keep of a sequence, and what of it a request can find again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nanoflow_jax.engine.pages import Key, PagePool, key_of_table


class Windows:
    """Of each page table (`models.layout.PageTables`): the tokens that a row of its layers sees, None where they see
    all. An entry is a table's place for a page.

    whole  [tables] bool: nothing is ever given back
    kept   [tables]: pages that a sequence keeps while it decodes, at most
    """

    def __init__(self, of_tables: Sequence[int | None], page_size: int):
        self.of_tables, self.page_size = tuple(of_tables), page_size
        self.whole = np.array([window is None for window in of_tables])
        most = np.iinfo(np.int32).max
        self._kept = [most if w is None else -(-(w - 1) // page_size) + 1 for w in of_tables]
        self.kept = np.array(self._kept)

    def pages(self, tokens: int) -> int:
        """Of a sequence of so many tokens that decodes, in all tables, at most."""
        entries = -(-tokens // self.page_size)
        return sum(min(entries, kept) for kept in self._kept)

    def pages_while_chunked(self, tokens: int, chunk: int) -> int:
        """Of a sequence of so many tokens whose prompt comes in chunks of so many at most, in all tables, at most."""
        entries, of_chunk = -(-tokens // self.page_size), -(-chunk // self.page_size)
        return sum(min(entries, kept + of_chunk) for kept in self._kept)

    def first_kept(self, table: int, computed: Any) -> Any:
        """The first entry that is kept of sequences [...] with so many tokens computed: what the first row of the
        newest page sees. No row to come sees more, nor does a request that goes on from the pages that are whole."""
        window = self.of_tables[table]
        if window is None:
            return np.zeros_like(computed)
        return np.maximum(computed // self.page_size * self.page_size - window + 1, 0) // self.page_size

    def find(self, pool: PagePool, keys: list[Key]) -> tuple[int, list[list[int]]]:
        """The longest prefix that a request can go on from: how many of `keys` it has, and of each table its pages, of
        which the last is of the last key."""
        if self.of_tables == (None,):
            pages = pool.find(keys)
            return len(pages), [pages]
        own = [_of_table(keys, table) for table in range(len(self.of_tables))]
        count = len(keys)
        for table in np.flatnonzero(self.whole).tolist():
            count = len(pool.find(own[table][:count]))
        windowed = np.flatnonzero(~self.whole).tolist()
        while missing := [i for i in (self._missing(pool, own[t], t, count) for t in windowed) if i is not None]:
            count = min(missing)  # it goes on before that page, at the latest
        return count, [pool.find(of[self._first(t, count) : count]) for t, of in enumerate(own)]

    def _first(self, table: int, count: int) -> int:
        """The first entry that a sequence of so many whole pages needs."""
        return int(self.first_kept(table, count * self.page_size))

    def _missing(self, pool: PagePool, own: list[Key], table: int, count: int) -> int | None:
        """The last entry that it lacks."""
        return next((i for i in reversed(range(self._first(table, count), count)) if own[i] not in pool), None)

    def register(
        self, pool: PagePool, pages: np.ndarray, dropped: np.ndarray, keys: list[Key], first: int, last: int
    ) -> None:
        """Makes entries [first, last) of a sequence findable, where it still has them. pages [tables, entries]; dropped
        [tables]: entries that it has given back; keys: of its entries."""
        for table, gone in enumerate(dropped.tolist()):
            start = max(gone, first)
            pool.register(pages[table, start:last].tolist(), _of_table(keys[start:last], table))

    def forget(self, pool: PagePool, keys: Sequence[Key]) -> None:
        """What pages with these keys hold is of no use."""
        for table in range(len(self.of_tables)):
            pool.forget(_of_table(keys, table))


def _of_table(keys: Sequence[Key], table: int) -> list[Key]:
    return [key_of_table(key, table) for key in keys] if table else list(keys)
