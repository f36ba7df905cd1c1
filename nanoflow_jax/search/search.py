"""The best plan for a model, a GPU and a load.

Stage one fixes a structure: how many nano-batches, where the rows are cut, and how each nano-batch's attention output
becomes the residual. Structures are taken in the order of their lower bound (`bound`); one whose bound is not below
the best plan so far cannot hold a better one. For each, stage two tries every order (`orders`). What is found is then
refined beyond that space: KQV and decode attention of a nano-batch in two pieces, and, where the GPU has the kernel,
decode attention on a lane of its own with a share of the SMs.

The result does not depend on the time it takes: nothing is cut short by a clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, pairwise, product

from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.schedule.ops import STRATEGIES
from nanoflow_jax.schedule.plan import Lane, NanoBatch, OpPiece, SchedulePlan, needs, row_quantum
from nanoflow_jax.search.bound import least_period
from nanoflow_jax.search.jobs import Job, Shares, build_jobs
from nanoflow_jax.search.latency import LatencyModel
from nanoflow_jax.search.load import StepLoad
from nanoflow_jax.search.orders import Chain, Steps, best_order
from nanoflow_jax.search.shapes import OpCosts, Shapes
from nanoflow_jax.search.simulate import ATTENTION_SHARE, simulate_step

GRID = 128  # rows: cuts are multiples, a GEMM's tile
COARSE = 256  # of three nano-batches
LANE_SHARES = (0.25, 0.375, 0.5)  # of the SMs, for decode attention on a lane
LANE_GAIN = 0.99  # a lane must be at least so much better: the kernel has to be there too
REFINED = 2  # structures that are refined, of each number of nano-batches


@dataclass(frozen=True)
class Structure:
    """Rows of the nano-batches, their strategies, whether each's D.AG is deferred to the next layer (scatter only), and
    in how many pieces its KQV and decode attention are."""

    rows: tuple[int, ...]
    strategies: tuple[str, ...]
    deferred: tuple[bool, ...]
    cuts: tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """What is searched. batches: numbers of nano-batches; grid: rows that cuts are multiples of, by that number."""

    batches: tuple[int, ...] = (1, 2, 3)
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    grid: dict[int, int] = field(default_factory=lambda: {1: GRID, 2: GRID, 3: COARSE})
    lanes: bool = True  # where the GPU's kernel can leave SMs free


@dataclass(frozen=True)
class Found:
    """The result. period_us: of a layer of the plan; bound_us: no plan of the space has a shorter one; proven: all
    orders of every structure that could hold a better plan were tried, but for the refinements."""

    plan: SchedulePlan
    period_us: float
    bound_us: float
    proven: bool
    structures: int
    tried: int
    refinement: str

    @property
    def gap(self) -> float:
        """How much shorter than the bound's a layer could be at most, as a share of the bound."""
        return self.period_us / self.bound_us - 1


def search(
    name: str,
    config: ModelConfig,
    model: LatencyModel,
    devices: int,
    load: StepLoad,
    *,
    space: Space | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """name: of the plan; load: of the step that it is for; progress: called with (structures done, all). Raises
    ConfigError for a load that leaves nothing to cut."""
    space = space or Space()
    finder = _Finder(name, config, model, devices, load, space)
    ranked = sorted(((finder.bound(s), i, s) for i, s in enumerate(finder.structures())), key=lambda r: r[:2])
    if not ranked:
        raise ConfigError(f"search: {load.rows} rows cannot be cut as asked; accepted: fewer nano-batches, more rows")
    best: dict[int, list[tuple[float, Structure, tuple[str, ...]]]] = {}  # by number of nano-batches
    shortest, tried, proven, least = math.inf, 0, True, ranked[0][0]
    for done, (bound, _, structure) in enumerate(ranked):
        progress(done, len(ranked))
        if bound >= shortest:
            break
        period, order, complete = finder.best(structure)
        tried, proven, shortest = tried + 1, proven and complete, min(shortest, period)
        same = [*best.get(len(structure.rows), []), (period, structure, order)]
        best[len(structure.rows)] = sorted(same, key=lambda found: found[0])[:REFINED]
    progress(len(ranked), len(ranked))
    period, plan, refinement = finder.refine(sorted(chain.from_iterable(best.values()), key=lambda found: found[0]))
    if space.lanes and finder.has_lane:
        least = min(least, *(finder.bound(s, share) for _, _, s in ranked for share in LANE_SHARES))
    return Found(plan, period, least, proven, len(ranked), tried, refinement)


class _Finder:
    def __init__(self, name: str, config: ModelConfig, model: LatencyModel, devices: int, load: StepLoad, space: Space):
        self.name, self.config, self.model, self.devices = name, config, model, devices
        self.load, self.space = load, space
        self.costs = OpCosts(model, Shapes.of(config, devices), load)
        share = model.hardware.calibration.network_share
        self.shares = Shares(share, ATTENTION_SHARE)
        self.speeds = {
            kind: (model.rate(kind, 1 - share, "network").speed, model.rate("network", share, kind).speed)
            for kind in ("compute", "memory")
        }
        self.bounds: dict[tuple, float] = {}
        self.has_lane = model.hardware.capability == (9, 0) and load.decode_rows > 0

    def structures(self) -> Iterator[Structure]:
        """All of the space, without refinements. On one device there is no network to choose a strategy for."""
        rows, quantum = self.load.rows, row_quantum(self.devices)
        strategies = self.space.strategies if self.devices > 1 else self.space.strategies[:1]
        for count in self.space.batches:
            grid = self.space.grid[count]
            for edges in combinations(range(grid, rows, grid), count - 1):
                sizes = tuple(b - a for a, b in zip((0, *edges), (*edges, rows), strict=True))
                for chosen in product(strategies, repeat=count):
                    if any(s == "scatter" and n % quantum for s, n in zip(chosen, sizes, strict=True)):
                        continue
                    ways = [(False, True) if s == "scatter" else (False,) for s in chosen]
                    for deferred in product(*ways):
                        yield Structure(sizes, chosen, deferred, (1,) * count)

    def plan(self, s: Structure, lane: Lane | None = None) -> SchedulePlan:
        """Its order: one nano-batch after the other."""
        batches = tuple(NanoBatch(n, strategy) for n, strategy in zip(s.rows, s.strategies, strict=True))
        total, decode = self.load.rows, self.load.decode_rows
        splits: dict[str, tuple[int, ...]] = {}
        if any(cut > 1 for cut in s.cuts):
            edges, first = [0], 0
            for rows, cut in zip(s.rows, s.cuts, strict=True):
                half = first + round(rows / 2 / GRID) * GRID
                edges += [half] * (cut > 1 and first < half < first + rows) + [first + rows]
                first += rows
            splits["KQV"] = tuple(b - a for a, b in pairwise(edges))
            inner = sorted({min(edge, decode) for edge in edges})
            splits["GEMV"] = tuple(b - a for a, b in pairwise(inner))
        lanes = {"GEMV": lane} if lane else {}
        splits = {op: sizes for op, sizes in splits.items() if sizes}
        plan = SchedulePlan(self.name, batches, "", total, decode, splits, lanes=lanes)
        return replace(plan, order=tuple(name for blocks in self.chains(s, plan) for block in blocks for name in block))

    def chains(self, s: Structure, plan: SchedulePlan) -> list[Chain]:
        pieces = {p.name: p for p in self._pieces(plan)}
        return [_chain(number, s.deferred[number - 1], pieces) for number in range(1, len(s.rows) + 1)]

    def jobs(self, plan: SchedulePlan, layers: int = 3) -> tuple[Job, ...]:
        return build_jobs(plan, self.costs, layers, self.shares)

    def bound(self, s: Structure, lane_share: float | None = None) -> float:
        """Whatever the order, so that it does not matter when D.AG is issued."""
        key = (s.rows, s.strategies, s.cuts, lane_share)
        if key not in self.bounds:
            lane = Lane(1, self._sms(lane_share)) if lane_share else None
            self.bounds[key] = least_period(self.jobs(self.plan(s, lane)), self.model)
        return self.bounds[key]

    def best(self, s: Structure) -> tuple[float, tuple[str, ...], bool]:
        """Period and order, and whether all orders were tried."""
        plan = self.plan(s)
        pieces = {p.name: p for p in self._pieces(plan)}
        after = {name: tuple(needs(piece, pieces)) for name, piece in pieces.items() if piece.op == "PF"}
        return best_order(Steps.read(self.jobs(plan), self.speeds), self.chains(s, plan), after)

    def refine(self, best: Sequence[tuple[float, Structure, tuple[str, ...]]]) -> tuple[float, SchedulePlan, str]:
        """The best plan with its order, once cuts and lanes are tried on the best structures."""
        period, structure, order = best[0]
        said = "no cut of KQV and decode attention helped"
        for _, base, _ in best:
            for cuts in product((1, 2), repeat=len(base.rows)):
                cut = replace(base, cuts=cuts)
                if max(cuts) == 1 or self.plan(cut).splits == self.plan(base).splits or self.bound(cut) >= period:
                    continue
                found = self.best(cut)
                if found[0] < period * (1 - 1e-6):
                    said = f"KQV and decode attention in {' + '.join(map(str, cuts))} pieces gain over whole ones"
                    period, order, structure = found[0], found[1], cut
        plan = replace(self.plan(structure), order=order)
        if not (self.space.lanes and self.has_lane):
            return period, plan, said
        with_lane = min((self._lane(plan, structure, share) for share in LANE_SHARES), key=lambda found: found[0])
        said += f"; decode attention on a lane of its own: {with_lane[0]:.0f} us a layer"
        return (*with_lane, said) if with_lane[0] < LANE_GAIN * period else (period, plan, said)

    def _lane(self, plan: SchedulePlan, s: Structure, share: float) -> tuple[float, SchedulePlan]:
        """The plan with decode attention on a lane, its pieces moved ahead or back while that helps."""
        best = replace(plan, lanes={"GEMV": Lane(1, self._sms(share))})
        period = self._simulated(best)
        while True:
            moved = None
            for name in (name for name in best.order if name.startswith("GEMV.") and not name.startswith("GEMV.AG")):
                for order in _moves(best.order, name):
                    try:
                        tried = replace(best, order=order)
                    except ConfigError:
                        continue
                    if (found := self._simulated(tried)) < period * (1 - 1e-6):
                        period, moved = found, tried
            if moved is None:
                return period, best
            best = moved

    def _simulated(self, plan: SchedulePlan) -> float:
        return simulate_step(plan, self.config, self.model, self.devices, self.load, layers=5).inner.us

    def _sms(self, share: float) -> int:
        return round(share * self.model.hardware.sm_count / 4) * 4

    def _pieces(self, plan: SchedulePlan) -> tuple[OpPiece, ...]:
        return plan.pieces(self.load.decode_rows, self.load.prefill_rows, row_quantum(self.devices))


def _moves(order: tuple[str, ...], name: str) -> Iterator[tuple[str, ...]]:
    rest = [other for other in order if other != name]
    for at in range(len(order)):
        yield (*rest[:at], name, *rest[at:])


def _chain(number: int, deferred: bool, pieces: dict[str, OpPiece]) -> Chain:
    """A nano-batch's pieces as blocks in dependency order; collectives that only take a result belong to its op."""
    names: dict[str, list[str]] = {}
    for piece in pieces.values():
        if piece.nano_batch == number:
            names.setdefault(piece.op, []).append(piece.name)
    blocks: list[tuple[str, ...]] = [(name,) for op in ("KQV", "GEMV", "PF") for name in names.get(op, ())]
    if "GEMV.AG" in names:
        blocks[-1] += tuple(names["GEMV.AG"])
    scattered = "O.RS" in names
    eager = "O.RS" if scattered else "O.AG" if "O.AG" in names else "O.AR" if "O.AR" in names else ""
    blocks.append((*names["O"], *names.get(eager, ())))
    if scattered:
        blocks.append(tuple(names["O.AG"]))
    blocks.append(tuple(names["UG"]))
    blocks.append((*names["D"], *names.get("D.AR", ()), *names.get("D.RS", ())))
    if "D.AG" in names:
        blocks.insert(0 if deferred else len(blocks), tuple(names["D.AG"]))
    return tuple(blocks)
