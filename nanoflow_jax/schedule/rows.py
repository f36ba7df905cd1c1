"""Values that exist in row pieces: which piece holds which rows of the step, and how an op gets the rows it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

View = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class RowSpan:
    """How to make rows of a value from whole pieces: take its view of each, if it has one, cut (start, stop) of that,
    then concatenate.

    The cutting is left to the op that reads the rows, so that the compiler fuses it there.
    """

    cuts: tuple[tuple[int, int], ...]
    views: tuple[View | None, ...]

    def __call__(self, *pieces: jax.Array) -> jax.Array:
        parts = []
        for x, (a, b), view in zip(pieces, self.cuts, self.views, strict=True):
            rows = x if view is None else view(x)
            parts.append(rows if (a, b) == (0, rows.shape[0]) else rows[a:b])
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


class Rows:
    """Pieces (start, stop, array [stop - start, ...]) of one value over the rows of a step."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int, jax.Array, View | None]] = []

    def put(self, start: int, stop: int, value: jax.Array, view: View | None = None) -> None:
        """Sets rows [start, stop); pieces they overlap are gone. view: what makes the rows of an array that holds
        more."""
        if view is None and value.shape[0] != stop - start:
            raise ValueError(f"rows {start}:{stop} given {value.shape[0]} rows")
        self._pieces = [p for p in self._pieces if p[1] <= start or stop <= p[0]]
        self._pieces.append((start, stop, value, view))
        self._pieces.sort(key=lambda p: p[0])

    def get(self, start: int, stop: int) -> tuple[RowSpan, list[jax.Array]]:
        """Rows [start, stop) as a span and the pieces to call it on. Raises ValueError when some are not there yet."""
        cuts, views, pieces, at = [], [], [], start
        for first, last, value, view in self._pieces:
            if first <= at < min(last, stop):
                cuts.append((at - first, min(last, stop) - first))
                views.append(view)
                pieces.append(value)
                at = min(last, stop)
        if at != stop:
            raise ValueError(f"rows {at}:{stop} are not there yet; the plan's order is wrong")
        return RowSpan(tuple(cuts), tuple(views)), pieces
