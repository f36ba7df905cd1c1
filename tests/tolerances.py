"""The one table of tolerances: how far a row may be from the reference, relative to the norm of the reference's row."""

from __future__ import annotations

from typing import Any

import numpy as np

TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}


def row_errors(got: Any, want: Any) -> np.ndarray:
    """|got - want| / |want| of each row (last axis), in float64.

    Infinite where a row of `got` is not finite, or where the reference's row is zero and that of `got` is not.
    Raises AssertionError for different shapes, for no rows at all, and for a reference that is not finite.
    """
    a, b = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    assert a.shape == b.shape, f"shapes differ: {a.shape} against the reference's {b.shape}"
    assert a.size, "nothing to compare"
    assert np.isfinite(b).all(), "the reference is not finite"
    finite = np.isfinite(a).all(axis=-1)
    distance = np.linalg.norm(np.where(finite[..., None], a, 0.0) - b, axis=-1)
    norm = np.linalg.norm(b, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.where(distance == 0, 0.0, distance / norm)
    return np.where(finite, errors, np.inf)


def assert_rows_close(got: Any, want: Any, dtype: str) -> None:
    """Fails, naming the worst row, unless every row is within the tolerance of `dtype`."""
    errors, limit = row_errors(got, want), TOLERANCES[dtype]
    worst = np.unravel_index(np.argmax(errors), errors.shape)
    place = tuple(map(int, worst))
    assert errors[worst] <= limit, (
        f"row {place} is off by {errors[worst]:.3g}, tolerance {limit:g} in {dtype}; "
        f"{(errors > limit).sum()} of {errors.size} rows fail"
    )
