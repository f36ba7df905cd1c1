"""The best order of a plan's pieces, by a closed form of the simulator for plans without a lane of their own.

A plan's pieces form a chain per nano-batch, and an order is an interleaving of the chains. A collective that only
takes a result is issued right behind the op that makes it: later would only delay the network. (The tests compare with
all orders.) With two streams and first-in-first-out collectives the network's state is one number, the work that it
has been given and has not done, so that a layer is a short sum instead of a simulation; the two agree exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nanoflow_jax.search.jobs import COMPUTE, NETWORK, Job

RUN, START, WAIT, WAIT_BEFORE = range(4)
EAGER = ("GEMV.AG", "O.AR", "O.RS", "D.AR", "D.RS")  # and O.AG of a gather
LAYERS = 4
EXHAUSTIVE = 30_000  # orders of a structure that are all tried; above: local search


@dataclass(frozen=True)
class Steps:
    """What each piece of a layer does, by its name: (RUN, us, speed, network's speed meanwhile), (START, us, name) of
    its collective, (WAIT, 0, name) for a collective of this layer, (WAIT_BEFORE, 0, name) for one of the layer
    before."""

    of: dict[str, tuple[tuple, ...]]
    appends: dict[str, tuple[tuple, ...]]  # of KQV pieces: written by the first attention op that comes after

    @staticmethod
    def read(jobs: Sequence[Job], speeds: dict[str, tuple[float, float]]) -> Steps:
        """From the jobs of a step of three layers or more; the second stands for all. speeds: by the kind of a compute
        job, its speed beside a collective and the collective's."""
        found: dict[str, list[tuple]] = {}
        for job in jobs:
            if job.piece.layer != 1:
                continue
            steps = found.setdefault(f"{job.piece.op}.{job.piece.piece}", [])
            for need in job.needs:
                other = jobs[need].piece
                if jobs[need].stream == NETWORK:
                    kind = WAIT if other.layer == 1 else WAIT_BEFORE
                    steps.append((kind, 0.0, f"{other.op}.{other.piece}"))
            if job.stream == COMPUTE:
                steps.append((RUN, job.prediction.us, *speeds[job.prediction.bound]))
            else:
                steps.append((START, job.prediction.us, f"{job.piece.op}.{job.piece.piece}"))
        done = {name: tuple(_merged(steps)) for name, steps in found.items()}
        appends = {name.replace("KV.APPEND", "KQV"): done.pop(name) for name in list(done) if name.startswith("KV.")}
        return Steps(done, appends)

    def period(self, order: Sequence[str]) -> float:
        """Microseconds of a layer in the steady state."""
        steps: list[tuple] = []
        unwritten: list[tuple] = []
        for name in order:
            if name.startswith(("GEMV.", "PF.")) and not name.startswith("GEMV.AG"):
                steps += unwritten
                unwritten.clear()
            steps += self.of[name]
            unwritten += self.appends.get(name, ())
        now = done = issued = begin = 0.0
        before: dict[str, float] = {}
        for _ in range(LAYERS):
            begin, here = now, {}
            for step in steps:
                kind = step[0]
                if kind == RUN:
                    _, us, speed, network = step
                    backlog = issued - done
                    if backlog <= 1e-9:
                        now += us
                    elif us * network <= backlog * speed:
                        spent = us / speed
                        now += spent
                        done += network * spent
                    else:
                        spent = backlog / network
                        now += spent + us - speed * spent
                        done = issued
                elif kind == START:
                    issued += step[1]
                    here[step[2]] = issued
                else:
                    until = (here if kind == WAIT else before).get(step[2], 0.0)
                    if until > done:
                        now += until - done
                        done = until
            before = here
        return now - begin


def _merged(steps: list[tuple]) -> Iterator[tuple]:
    """Kernels of the same kind that follow one another become one."""
    last: tuple | None = None
    for step in steps:
        if step[0] == RUN and last is not None and last[0] == RUN and last[2:] == step[2:]:
            last = (RUN, last[1] + step[1], *step[2:])
            continue
        if last is not None:
            yield last
        last = step
    if last is not None:
        yield last


Chain = tuple[tuple[str, ...], ...]  # blocks in order; a block is issued whole: an op, and its eager collectives


def interleavings(chains: Sequence[Chain], after: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Every order of the chains' blocks in which each piece comes after those that `after` names."""
    at = [0] * len(chains)
    order: list[str] = []
    placed: set[str] = set()

    def extend() -> Iterator[tuple[str, ...]]:
        finished = True
        for k, chain in enumerate(chains):
            if at[k] == len(chain):
                continue
            finished = False
            block = chain[at[k]]
            if any(need not in placed for name in block for need in after.get(name, ())):
                continue
            at[k] += 1
            order.extend(block)
            placed.update(block)
            yield from extend()
            del order[-len(block) :]
            placed.difference_update(block)
            at[k] -= 1
        if finished:
            yield tuple(order)

    yield from extend()


def count(chains: Sequence[Chain]) -> int:
    """Interleavings, without `after`."""
    total, found = 0, 1
    for chain in chains:
        for i in range(1, len(chain) + 1):
            total += 1
            found = found * total // i
    return found


def best_order(
    steps: Steps, chains: Sequence[Chain], after: dict[str, tuple[str, ...]], limit: int = EXHAUSTIVE
) -> tuple[float, tuple[str, ...], bool]:
    """Period, order, and whether all orders were tried. The first of equally good orders wins."""
    if count(chains) <= limit:
        best = min(interleavings(chains, after), key=steps.period)
        return steps.period(best), best, True
    return _climb(steps, chains, after)


def _climb(
    steps: Steps, chains: Sequence[Chain], after: dict[str, tuple[str, ...]]
) -> tuple[float, tuple[str, ...], bool]:
    """From the chains side by side: the best move of one block to another place, until none helps."""
    order = [(k, i) for i in range(max(map(len, chains))) for k in range(len(chains)) if i < len(chains[k])]

    def names(order: Sequence[tuple[int, int]]) -> tuple[str, ...]:
        return tuple(name for k, i in order for name in chains[k][i])

    def allowed(order: Sequence[tuple[int, int]]) -> bool:
        seen: set[str] = set()
        for name in names(order):
            if any(need not in seen for need in after.get(name, ())):
                return False
            seen.add(name)
        return True

    if not allowed(order):  # one chain after the other always is
        order = [(k, i) for k in range(len(chains)) for i in range(len(chains[k]))]
    best = steps.period(names(order))
    while True:
        moved: list[tuple[int, int]] | None = None
        for a in range(len(order)):
            rest = order[:a] + order[a + 1 :]
            own = [j for j, (k, _) in enumerate(rest) if k == order[a][0]]
            low = max((j + 1 for j in own if rest[j][1] < order[a][1]), default=0)
            high = min((j for j in own if rest[j][1] > order[a][1]), default=len(rest))
            for b in range(low, high + 1):
                tried = [*rest[:b], order[a], *rest[b:]]
                if tried != order and allowed(tried) and (period := steps.period(names(tried))) < best - 1e-6:
                    best, moved = period, tried
        if moved is None:
            return best, names(order), False
        order = moved
