"""The order in which requests go to the engine: sorted in windows, longest first, without a pause between windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

WINDOW = 2048  # items in a window, at most
WINDOW_BYTES = 16 * 2**20  # of their lines
FIRST = 64  # the first window is small, so that the work begins at once; each is twice the one before


def longest_first[Item](
    source: Iterable[Item | None],
    length: Callable[[Item], float],
    num_bytes: Callable[[Item], int] = lambda _: 0,
    window: int = WINDOW,
    window_bytes: int = WINDOW_BYTES,
) -> Iterator[Item | None]:
    """The items of `source`, window by window, in each the longest first.

    Similar lengths so run together, and at the end of the input the long ones have begun before the short ones. While a
    window is handed out the next is read, two items for each given: reading never holds up the caller for a whole
    window. None in the source means "nothing this time" and is passed on as such. At most two windows are held.
    """
    items, more, size = iter(source), True, min(FIRST, window)
    current: list[Item] = []
    following: list[Item] = []
    held = 0

    def pull() -> None:
        nonlocal more, held
        try:
            item = next(items)
        except StopIteration:
            more = False
            return
        if item is not None:
            following.append(item)
            held += num_bytes(item)

    while more or current or following:
        if not current:
            while more and len(following) < min(FIRST, window) and held < window_bytes:
                before = len(following)
                pull()
                if more and len(following) == before:
                    yield None
            current, following, held = _to_pop(following, length), [], 0
            size = min(2 * size, window)
        if more:
            for _ in range(2):
                if more and len(following) < size and held < window_bytes:
                    pull()
            if not more:  # the last items join this window: nothing long is left for the end
                current, following = _to_pop(current[::-1] + following, length), []
        if current:
            yield current.pop()


def _to_pop[Item](items: list[Item], length: Callable[[Item], float]) -> list[Item]:
    """In the order of popping from the end: longest first, equal ones as they came."""
    return sorted(items, key=length, reverse=True)[::-1]
