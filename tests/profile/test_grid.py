"""Sampled times: exact, monotone, continuous where the samples end, and never silent about what was not measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_jax.profile.grid import Curve, Place, SampleGrid


def estimate(place: Place) -> float:
    """Like a roofline: a latency and work that multiplies."""
    return 2.0 + 0.01 * float(np.prod(place))


@st.composite
def samples(draw: st.DrawFn) -> dict[Place, float]:
    """Noisy times on a grid of two axes, some of it not measured."""
    axes = [sorted(draw(st.sets(st.integers(1, 64), min_size=1, max_size=4))) for _ in range(2)]
    places = [tuple(map(float, place)) for place in itertools.product(*axes)]
    kept = draw(st.lists(st.booleans(), min_size=len(places), max_size=len(places)))
    kept[draw(st.integers(0, len(places) - 1))] = True
    noise = draw(st.lists(st.floats(0.5, 2.0), min_size=len(places), max_size=len(places)))
    return {p: estimate(p) * n for p, keep, n in zip(places, kept, noise, strict=True) if keep}


def grid_of(found: dict[Place, float]) -> SampleGrid:
    return SampleGrid.of(found, estimate, [True, True])


def exact(grid: SampleGrid, found: dict[Place, float]) -> bool:
    """Samples that grow already are answered as they are, and as measured."""
    for place in found:
        below = [v for p, v in found.items() if all(a <= b for a, b in zip(p, place, strict=True))]
        above = [v for p, v in found.items() if all(a >= b for a, b in zip(p, place, strict=True))]
        got, measured = grid.at(place)
        middle = (max(below) + min(above)) / 2
        if not measured or got != pytest.approx(middle, rel=1e-12):
            return False
    return True


def monotone(at: Callable[[Place], float], places: list[Place]) -> bool:
    pairs = itertools.product(places, places)
    smaller = [(a, b) for a, b in pairs if all(x <= y for x, y in zip(a, b, strict=True))]
    return all(at(a) <= at(b) * (1 + 1e-9) for a, b in smaller)


PLACES = st.lists(st.tuples(st.floats(0.25, 200), st.floats(0.25, 200)), min_size=2, max_size=6)


@given(samples(), PLACES)
@settings(max_examples=60, deadline=None)
def test_exact_at_samples_and_monotone_everywhere(found: dict[Place, float], places: list[Place]):
    grid = grid_of(found)
    assert exact(grid, found)
    crossed = [(a[0], b[1]) for a, b in itertools.product(places, places)]
    assert monotone(lambda place: grid.at(place)[0], crossed)


@given(samples(), st.floats(0.25, 64))
@settings(max_examples=60, deadline=None)
def test_continuous_where_the_samples_end(found: dict[Place, float], other: float):
    grid = grid_of(found)
    last = grid.axes[0][-1]
    inside, outside = grid.at((last, other))[0], grid.at((last * (1 + 1e-9), other))[0]
    assert outside == pytest.approx(inside, rel=1e-6)


@given(samples())
@settings(max_examples=60, deadline=None)
def test_what_lies_outside_is_told(found: dict[Place, float]):
    grid = grid_of(found)
    (rows, columns), first = grid.axes, min(found)
    assert not grid.at((rows[-1] + 1, first[1]))[1]
    assert not grid.at((first[0], columns[-1] + 1))[1]
    assert not grid.at((min(p[0] for p in found) / 2, first[1]))[1]
    for node in itertools.product(rows, columns):
        assert grid.at(node)[1] == (node in found)


def test_between_samples_is_measured_and_beside_a_hole_is_not():
    found = {(1.0, 1.0): 1.0, (1.0, 2.0): 2.0, (2.0, 1.0): 3.0, (2.0, 2.0): 5.0, (4.0, 1.0): 6.0}
    grid = grid_of(found)
    assert grid.at((1.5, 1.5)) == (pytest.approx((1 + 2 + 3 + 5) / 4), True)
    assert grid.at((3.0, 1.0)) == (pytest.approx(4.5), True)
    assert not grid.at((3.0, 1.5))[1]
    assert grid.correction == 0
    assert SampleGrid.of({(1.0,): 4.0, (2.0,): 2.0}, estimate, [True]).correction == pytest.approx(0.5)


def test_broken_twins_fail():
    """Axes that are swapped are not exact; a grid without the isotonic step is not monotone."""
    found = {(1.0, 1.0): 1.0, (1.0, 2.0): 9.0, (2.0, 1.0): 2.0, (2.0, 2.0): 10.0}
    swapped = grid_of({(b, a): value for (a, b), value in found.items()})
    assert exact(grid_of(found), found) and not exact(swapped, found)
    noisy = {(1.0, 1.0): 5.0, (2.0, 1.0): 3.0}
    grid = grid_of(noisy)
    raw = grid.values.copy()
    raw[grid.measured] = list(noisy.values())
    places: list[Place] = [(1.0, 1.0), (1.5, 1.0), (2.0, 1.0)]
    assert monotone(lambda place: grid.at(place)[0], places)
    assert not monotone(lambda place: replace(grid, values=raw).at(place)[0], places)


@given(st.lists(st.tuples(st.floats(0.01, 0.99), st.floats(0, 1)), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_speeds_grow_with_the_share(points: list[tuple[float, float]]):
    curve = Curve.of(points)
    shares = np.linspace(0.001, 1, 50)
    speeds = [curve.at(share)[0] for share in shares]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(speeds)) and speeds[0] >= 0 and speeds[-1] == 1
    assert [curve.at(s)[1] for s in shares] == [min(points)[0] <= s <= max(points)[0] for s in shares]
