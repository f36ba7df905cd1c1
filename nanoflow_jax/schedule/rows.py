"""Values that exist in row pieces: which piece holds which rows of the step, and how an op gets the rows it needs."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class RowSpan:
    """How to make rows of a value from whole pieces: cut (start, stop) of each, then concatenate.

    The cutting is left to the op that reads the rows, so that the compiler fuses it there.
    """

    cuts: tuple[tuple[int, int], ...]

    def __call__(self, *pieces: jax.Array) -> jax.Array:
        whole = zip(pieces, self.cuts, strict=True)
        parts = [x if (a, b) == (0, x.shape[0]) else x[a:b] for x, (a, b) in whole]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


class Rows:
    """Pieces (start, stop, array [stop - start, ...]) of one value over the rows of a step."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int, jax.Array]] = []

    def put(self, start: int, stop: int, value: jax.Array) -> None:
        """Sets rows [start, stop); pieces they overlap are gone."""
        if value.shape[0] != stop - start:
            raise ValueError(f"rows {start}:{stop} given {value.shape[0]} rows")
        self._pieces = [p for p in self._pieces if p[1] <= start or stop <= p[0]]
        self._pieces.append((start, stop, value))
        self._pieces.sort(key=lambda p: p[0])

    def get(self, start: int, stop: int) -> tuple[RowSpan, list[jax.Array]]:
        """Rows [start, stop) as a span and the pieces to call it on. Raises ValueError when some are not there yet."""
        cuts, pieces, at = [], [], start
        for first, last, value in self._pieces:
            if first <= at < min(last, stop):
                cuts.append((at - first, min(last, stop) - first))
                pieces.append(value)
                at = min(last, stop)
        if at != stop:
            raise ValueError(f"rows {at}:{stop} are not there yet; the plan's order is wrong")
        return RowSpan(tuple(cuts)), pieces
