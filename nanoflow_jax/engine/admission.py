"""How many pages the running requests will need: learnt from the lengths of those that have ended."""

from __future__ import annotations

import numpy as np

from nanoflow_jax.engine.windows import Windows

MEMORY = 256  # finished requests that count; older ones fade
PRIOR_SHARE = 0.5  # of the tokens it may produce, before anything is known
PRIOR_WEIGHT = 8


class Expectation:
    """The share of its allowed output that a request is expected to use, a fading mean."""

    def __init__(self) -> None:
        self._sum, self._weight = PRIOR_SHARE * PRIOR_WEIGHT, float(PRIOR_WEIGHT)

    def saw(self, produced: int, allowed: int) -> None:
        """A request has ended after `produced` of `allowed` tokens."""
        if allowed < 1:
            return
        fade = 1 - 1 / MEMORY
        self._sum = self._sum * fade + produced / allowed
        self._weight = self._weight * fade + 1

    @property
    def share(self) -> float:
        return self._sum / self._weight

    def remaining(self, produced: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """Tokens [n] still expected of requests that have produced some. One past the mean is expected to go half as
        far again."""
        left = np.ceil(allowed * self.share) - produced
        left = np.where(left > 0, left, np.maximum(produced >> 1, 1))
        return np.minimum(left, allowed - produced).astype(np.int64)


def peak_pages(remaining: np.ndarray, spare: np.ndarray, held: np.ndarray, page_size: int, tables: int = 1) -> int:
    """The most pages, beyond those held now, that requests [n] will need at once, each growing a token per step.

    remaining  tokens that each will still produce; then its pages are free
    spare      tokens that its last page still takes
    held       pages it has now
    tables     page tables that grow

    The peak is just before one of them ends (as in LightLLM's past-future scheduler): when the one with r tokens
    remaining ends, all with at least r have grown by r, and those with less have given theirs back.
    """
    falling = remaining.max(initial=0) - remaining
    if falling.max(initial=0) < 2**16:
        falling = falling.astype(np.uint16)  # then NumPy sorts by counting, three times as fast
    order = np.argsort(falling, kind="stable")
    remaining, spare, held = remaining[order], spare[order], held[order]
    # Growth of request i by r tokens takes ceil((r - spare_i) / page_size) pages; bounded from above, summed over all.
    count = np.arange(1, len(remaining) + 1)
    taken = np.maximum(count * remaining - np.cumsum(spare) + count * (page_size - 1), 0) // page_size
    given_back = held.sum() - np.cumsum(held)
    return int(max(0, (taken * tables - given_back).max(initial=0)))


def peak_growth(
    remaining: np.ndarray, length: np.ndarray, filled: np.ndarray, held: np.ndarray, windows: Windows
) -> int:
    """The most pages in all tables, beyond those held now, that requests [n] will need at once.

    remaining     [n] tokens that each will still produce
    length        [n] tokens that it has
    filled, held  [n, tables] entries up to which it has pages, and pages that it holds
    """
    size, all_held = windows.page_size, held.sum(axis=1)

    def of(tables: np.ndarray) -> int:
        """Where these tables grow with every page."""
        if not tables.any():
            return 0
        spare = filled[:, tables].min(axis=1) * size - length
        return peak_pages(remaining, spare, all_held, size, int(tables.sum()))

    bound = of(np.ones_like(windows.whole))
    if windows.whole.all():
        return bound
    # Those with a window stop growing: another bound, and the smaller one holds.
    windowed = ~windows.whole
    at_most = np.minimum((-(-(length + remaining) // size))[:, None], windows.kept[windowed])
    return min(bound, of(windows.whole) + int(np.maximum(at_most - held[:, windowed], 0).sum()))
