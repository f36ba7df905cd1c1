"""Times sampled on a regular grid: exact at the samples, monotone along every axis, and never silent about what was
not measured.

Samples are noisy, and time grows with size. What a grid holds is therefore the closest values that grow along every
axis (closest in the largest change): halfway between the largest sample at or below a node and the smallest at or above
it. Samples that grow already stay as they are. Between nodes: multilinear. Nodes that were not measured, because they
did not fit or the run was stopped, and nodes at size 0, come from the nearest measured one and an estimate's ratio.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Place = tuple[float, ...]


@dataclass(frozen=True)
class SampleGrid:
    """axes: coordinates of the nodes, ascending; values: at the nodes; measured: which are samples; estimate: gives
    ratios where nothing was measured, and grows along every axis; correction: the largest change of a sample, as a
    share of it."""

    axes: tuple[tuple[float, ...], ...]
    values: np.ndarray[Any, Any]
    measured: np.ndarray[Any, Any]
    estimate: Callable[[Place], float]
    correction: float

    @staticmethod
    def of(samples: Mapping[Place, float], estimate: Callable[[Place], float], zeros: Sequence[bool]) -> SampleGrid:
        """zeros: the axes that get a node at 0. Raises ValueError when there is no sample."""
        if not samples:
            raise ValueError("samples: at least one is needed")
        axes = tuple(
            tuple(sorted({place[i] for place in samples} | ({0.0} if zero else set()))) for i, zero in enumerate(zeros)
        )
        raw = np.full([len(axis) for axis in axes], np.nan)
        for place, value in samples.items():
            raw[tuple(axis.index(x) for axis, x in zip(axes, place, strict=True))] = value
        measured = ~np.isnan(raw)
        values = (_running(raw, np.fmax, False) + _running(raw, np.fmin, True)) / 2
        correction = float(np.abs(values[measured] / raw[measured] - 1).max())
        values[~measured] = np.nan
        _fill(values, measured, axes, estimate)
        return SampleGrid(axes, values, measured, estimate, correction)

    def at(self, place: Place) -> tuple[float, bool]:
        """The value at a place, and whether it rests on samples alone.

        Beyond the last node of an axis: the value there times the estimate's growth from there.
        """
        inside = tuple(min(max(x, axis[0]), axis[-1]) for axis, x in zip(self.axes, place, strict=True))
        corners = [_between(axis, x) for axis, x in zip(self.axes, inside, strict=True)]
        value, measured = 0.0, inside == place
        for chosen in itertools.product(*corners):
            node, weight = tuple(i for i, _ in chosen), float(np.prod([w for _, w in chosen]))
            value += weight * float(self.values[node])
            measured = measured and bool(self.measured[node])
        if inside != place:
            value *= self.estimate(place) / self.estimate(inside)
        return value, measured


def _between(axis: Sequence[float], x: float) -> list[tuple[int, float]]:
    """Nodes on both sides of x and their weights; one node when x is there."""
    i = bisect_right(axis, x) - 1
    if axis[i] == x:
        return [(i, 1.0)]
    share = (x - axis[i]) / (axis[i + 1] - axis[i])
    return [(i, 1.0 - share), (i + 1, share)]


def _running(values: np.ndarray[Any, Any], largest: np.ufunc, backwards: bool) -> np.ndarray[Any, Any]:
    """The extreme over all nodes at or below (backwards: at or above) each, nodes without a value left out."""
    for axis in range(values.ndim):
        flipped = np.flip(values, axis) if backwards else values
        found = largest.accumulate(flipped, axis)
        values = np.flip(found, axis) if backwards else found
    return values


def _fill(
    values: np.ndarray[Any, Any],
    measured: np.ndarray[Any, Any],
    axes: Sequence[Sequence[float]],
    estimate: Callable[[Place], float],
) -> None:
    """Gives every node a value, keeping all axes monotone."""

    def place(node: Any) -> Place:
        return tuple(axis[i] for axis, i in zip(axes, node, strict=True))

    samples = np.argwhere(measured)
    for node in np.argwhere(~measured):
        nearest = samples[np.abs(samples - node).sum(axis=1).argmin()]
        scaled = values[tuple(nearest)] * estimate(place(node)) / estimate(place(nearest))
        least = np.nanmax(values[tuple(slice(0, i + 1) for i in node)], initial=0.0)
        most = np.nanmin(values[tuple(slice(i, None) for i in node)], initial=np.inf)
        values[tuple(node)] = min(max(scaled, least), most)


@dataclass(frozen=True)
class Curve:
    """P(R) through measured points: monotone, straight lines between them and to (0, 0) and (1, 1)."""

    shares: tuple[float, ...]
    speeds: tuple[float, ...]

    @staticmethod
    def of(points: Sequence[tuple[float, float]]) -> Curve:
        """points: (share in (0, 1), speed in [0, 1]); of several at one share the mean counts."""
        shares = tuple(sorted({share for share, _ in points}))
        means = np.array([np.mean([speed for at, speed in points if at == share]) for share in shares])
        grown = (np.maximum.accumulate(means) + np.minimum.accumulate(means[::-1])[::-1]) / 2
        return Curve(shares, tuple(float(x) for x in grown))

    def at(self, share: float) -> tuple[float, bool]:
        """The speed, and whether the share lies between measured ones."""
        speed = float(np.interp(share, (0.0, *self.shares, 1.0), (0.0, *self.speeds, 1.0)))
        return speed, self.shares[0] <= share <= self.shares[-1]
