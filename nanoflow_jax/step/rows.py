"""Values that exist in row pieces: which piece holds which rows of the step, and how an op gets the rows it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class RowSpan:
    """How to make rows of a value from whole pieces: take its view of each, if it has one, cut (start, stop) of that,
    then concatenate.

    The cutting is left to the op that reads the rows, so that the compiler fuses it there.
    """

    cuts: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]  # rows of the whole pieces
    views: tuple[Callable[[Any], Any] | None, ...]

    def __call__(self, *pieces: Any) -> Any:
        """Of arrays, or of trees whose leaves all have the rows in front."""
        parts = []
        for x, (a, b), size, view in zip(pieces, self.cuts, self.sizes, self.views, strict=True):
            rows = x if view is None else view(x)
            if rows.shape[0] != size:
                raise ValueError(f"a piece of {size} rows was given {rows.shape[0]}")
            parts.append(rows if (a, b) == (0, size) else jax.tree.map(lambda x, a=a, b=b: x[a:b], rows))
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


class Rows[V]:
    """Pieces (start, stop, value) over the rows of a step; a value is an array [stop - start, ...], or whatever stands
    for one."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int, V, Callable[[V], V] | None]] = []

    def put(self, start: int, stop: int, value: V, view: Callable[[V], V] | None = None) -> None:
        """Sets rows [start, stop); pieces they overlap are gone. view: what makes the rows of an array that holds
        more."""
        self._pieces = [p for p in self._pieces if p[1] <= start or stop <= p[0]]
        self._pieces.append((start, stop, value, view))
        self._pieces.sort(key=lambda p: p[0])

    def get(self, start: int, stop: int) -> tuple[RowSpan, list[V]]:
        """Rows [start, stop) as a span and the pieces to call it on. Raises ValueError when some are not there yet."""
        cuts, sizes, views, pieces, at = [], [], [], [], start
        for first, last, value, view in self._pieces:
            if first <= at < min(last, stop):
                cuts.append((at - first, min(last, stop) - first))
                sizes.append(last - first)
                views.append(view)
                pieces.append(value)
                at = min(last, stop)
        if at != stop:
            raise ValueError(f"rows {at}:{stop} are not there yet; the plan's order is wrong")
        return RowSpan(tuple(cuts), tuple(sizes), tuple(views)), pieces
