"""The best order of a plan's pieces, proven best: a shortest path through the states of a layer.

A plan's pieces form a chain per nano-batch, and an order is an interleaving of the chains.

Prefixes of an order that have placed the same pieces are compared by the time and by what is under way: one that is
nowhere less than another leads to nothing better, and is dropped. What is left after the last piece are the states that
a layer can leave to the next. The first layer starts with nothing under way, the second with any of these states, and
so on: no order's layer can be shorter in the steady state than the shortest one so found, since work that the layer
before has left only makes a layer longer, by at least `least_loss` per microsecond of it. Each order so found is played
to its steady state. When the shortest of these meets the bound, it is proven; two to six layers do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nanoflow_jax.search.closed_form import (
    NOTHING,
    RUN,
    START,
    START_SIDE,
    WAIT,
    WAIT_BEFORE,
    WAIT_SIDE,
    Order,
    State,
    Step,
    Steps,
)

ROUNDS = 12  # layers that the bound is followed over, at most
LESS = 1e-6  # microseconds that count as better

Chain = tuple[str, ...]  # a nano-batch's pieces, in order


@dataclass(frozen=True)
class Ordered:
    """period: of the best order, empty where none is below what was asked; bound: no order has a shorter one."""

    period: float
    order: Order
    bound: float


def best_order(
    steps: Steps, chains: Sequence[Chain], after: dict[str, tuple[str, ...]], below: float = math.inf
) -> Ordered:
    """The order with the shortest period, if that is below `below`. after: pieces that must come before a piece. Of
    equally good orders the first found wins."""
    path = _Path(steps, chains, after)
    period, order, bound = below, Order(), 0.0
    periods: dict[Order, float] = {}
    starts = [steps.start]
    for _ in range(ROUNDS):
        ends = path.layer(starts, period)
        for _, _, found in ends:
            if found not in periods:
                periods[found] = steps.period(found)
                if periods[found] < period - LESS:
                    period, order = periods[found], found
        bound = max(bound, min((cost for cost, _, _ in ends), default=period))
        if bound >= period - LESS:
            return Ordered(period, order, period)
        starts = path.starts([state for _, state, _ in ends])
    return Ordered(period, order, bound)


Label = tuple[tuple[float, ...], State, Order]  # what paths are compared by, where one has come, and its pieces


@dataclass(frozen=True)
class _Placed:
    """A part of a layer's pieces. rest: what the others cost at least; here, before: slots of this layer's jobs, and of
    the layer before's, that one of the others, or of the next layer, waits for."""

    names: frozenset[str]
    rest: float
    here: tuple[int, ...]
    before: tuple[int, ...]


class _Path:
    """Layers as paths through (pieces placed of each chain, KQV pieces not written)."""

    def __init__(self, steps: Steps, chains: Sequence[Chain], after: dict[str, tuple[str, ...]]):
        self.steps, self.chains, self.after = steps, chains, after
        self.least = {name: self._least([*own, *steps.appends.get(name, ())]) for name, own in steps.of.items()}
        self.known: dict[tuple[int, ...], _Placed] = {}
        self.awaited = {what for own in steps.of.values() for kind, _, what in own if kind == WAIT_BEFORE}

    def _least(self, steps: Sequence[Step]) -> float:
        """What steps cost at least: their own time, and what the network's work takes from others."""
        weights = {RUN: 1.0, START: self.steps.least_loss}
        return sum(weights.get(kind, 0.0) * us for kind, us, _ in steps)

    def layer(self, starts: Sequence[State], below: float) -> list[tuple[float, State, Order]]:
        """Cost, last state and order of every path that is not dropped; those that cost `below` or more are."""
        price = self.steps.least_loss
        paths = {((0,) * len(self.chains), Order()): [((), state, Order()) for state in starts]}
        for _ in range(sum(map(len, self.chains))):
            longer: dict[tuple[tuple[int, ...], Order], list[Label]] = {}
            for (at, unwritten), labels in paths.items():
                for k, name in self._next(at):
                    steps, pending = self.steps.listed((name,), unwritten)
                    number = (*at[:k], at[k] + 1, *at[k + 1 :])
                    placed = self._placed(number)
                    most = below - LESS - placed.rest - sum(self._least(self.steps.appends[other]) for other in pending)
                    kept = longer.setdefault((number, pending), [])
                    for _, state, order in labels:
                        found = self.steps.advance(state, steps)
                        if found.now + price * (found.given - found.done) < most:
                            _keep(kept, self._numbers(found, placed), found, (*order, name))
            paths = longer
        ends = [(state, order) for labels in paths.values() for _, state, order in labels]
        return [(state.now + price * (state.given - state.done), state, order) for state, order in ends]

    def _next(self, at: tuple[int, ...]) -> Iterator[tuple[int, str]]:
        """The chains' next pieces whose needs are placed."""
        names = self._placed(at).names
        for k, chain in enumerate(self.chains):
            if at[k] < len(chain) and names.issuperset(self.after.get(chain[at[k]], ())):
                yield k, chain[at[k]]

    def _placed(self, at: tuple[int, ...]) -> _Placed:
        if at not in self.known:
            names = frozenset(name for chain, n in zip(self.chains, at, strict=True) for name in chain[:n])
            steps = [step for name in names for step in self.steps.of[name]]
            started = {what for kind, _, what in steps if kind in (START, START_SIDE)}
            waited = {what for kind, _, what in steps if kind in (WAIT, WAIT_SIDE)}
            before = self.awaited - {what for kind, _, what in steps if kind == WAIT_BEFORE}
            rest = sum(least for name, least in self.least.items() if name not in names)
            here = tuple(sorted(started - (waited - self.awaited)))
            self.known[at] = _Placed(names, rest, here, tuple(sorted(before)))
        return self.known[at]

    def _numbers(self, state: State, placed: _Placed) -> tuple[float, ...]:
        """The time, and what is left of each job under way and of all of them."""
        now, done, given, side_done, side_given, by, by_before = state
        numbers = [now, given - done, side_given - side_done]
        for slot in placed.here:
            left = by[slot] - (side_done if self.steps.on_side[slot] else done)
            numbers.append(left if left > 0 else 0.0)
        for slot in placed.before:
            left = by_before[slot] - done
            numbers.append(left if left > 0 else 0.0)
        return tuple(numbers)

    def starts(self, ends: Sequence[State]) -> list[State]:
        """What layers leave to the next: the least of it, whatever their time was. The network's work that is left is
        counted already, as `least_loss` of it, and counts from here again. Attention on a lane never outlasts its
        layer."""
        kept: list[Label] = []
        nothing = self.steps.start.here
        for end in ends:
            left = end.given - end.done
            before = tuple(max(0.0, end.here[i] - end.done) if i in self.awaited else 0.0 for i in range(len(nothing)))
            state = State(-self.steps.least_loss * left, 0.0, left, 0.0, 0.0, nothing, before)
            _keep(kept, (left, *before), state, ())
        return [state for _, state, _ in kept]


def _keep(kept: list[Label], numbers: tuple[float, ...], state: State, order: Order) -> None:
    """Adds a state to `kept`, unless one of them is nowhere more; drops those that are nowhere less."""
    first = numbers[0]
    for other, _, _ in kept:
        if other[0] <= first + NOTHING and _nowhere_more(other, numbers):
            return
    kept[:] = [label for label in kept if first > label[0][0] + NOTHING or not _nowhere_more(numbers, label[0])]
    kept.append((numbers, state, order))


def _nowhere_more(these: tuple[float, ...], those: tuple[float, ...]) -> bool:
    for this, that in zip(these, those, strict=True):  # noqa: SIM110 (half the time of `all`)
        if this > that + NOTHING:
            return False
    return True
