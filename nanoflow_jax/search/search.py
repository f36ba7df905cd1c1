"""The best plan for a model, a GPU and a load: best-first branch and bound.

Stage one fixes a structure: how many nano-batches, where the rows are cut, how each nano-batch's attention output
becomes the residual, whether its KQV and decode attention are in two pieces, and the SMs of decode attention on a lane
of its own. Structures are taken in the order of their lower bound (`bound`); one whose bound is not below the best plan
so far cannot hold a better one. Stage two finds the best order of each of the others (`orders`).

The result does not depend on the time it takes: nothing is cut short by a clock.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise, product
from multiprocessing import get_context

from kernels_pallas.targets import mosaic_supported
from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.cost.demand import StepLoad
from nanoflow_jax.cost.latency import LatencyModel
from nanoflow_jax.cost.shapes import OpCosts, Shapes
from nanoflow_jax.plan.ops import COLLECTIVE, OPS, STRATEGIES
from nanoflow_jax.plan.plan import Lane, NanoBatch, OpPiece, SchedulePlan, needs, row_quantum
from nanoflow_jax.search.bound import least_period
from nanoflow_jax.search.closed_form import Order, Steps
from nanoflow_jax.search.orders import LESS, Chain, Ordered, best_order
from nanoflow_jax.search.simulate import ATTENTION_SHARE
from nanoflow_jax.timeline.jobs import Job, Shares, build_jobs
from nanoflow_jax.timeline.play import Speeds

GRID = 128  # rows: cuts are multiples, a GEMM's tile
COARSE = 256  # of three nano-batches
GATHERING = {"gather", "scatter"}  # strategies whose gathers may be in fp8
ALIKE = "reduce"  # the strategy of one device, where all are alike: the one with the fewest pieces
LANE_SHARES = (0.375, 0.5)  # of the SMs, for decode attention on a lane
SHARES_OF_ONE = tuple(sixteenths / 16 for sixteenths in range(4, 13))  # on one device, where the space is small
ROUND = 8  # structures that are looked at with the same best plan so far, whatever the number of processes
ALONE = 128  # structures that are looked at before other processes are started: that takes seconds
MOST_CUT = 2  # nano-batches, of plans whose KQV and decode attention are also tried in two pieces


@dataclass(frozen=True)
class Structure:
    """Rows of the nano-batches, their strategies, whether each's D.AG is deferred to the next layer (scatter only), in
    how many pieces its KQV and decode attention are; the SMs' share of decode attention on a lane, 0: none; and the
    precision of the plan's gathers."""

    rows: tuple[int, ...]
    strategies: tuple[str, ...]
    deferred: tuple[bool, ...]
    cuts: tuple[int, ...]
    lane: float = 0.0
    gathers: str | None = None

    @property
    def whole(self) -> bool:
        return max(self.cuts) == 1


@dataclass(frozen=True)
class Space:
    """What is searched. batches: numbers of nano-batches; strategies: on one device all are alike; grid: rows that cuts
    are multiples of, by the number of nano-batches; shares: of the SMs, for decode attention on a lane, where the GPU's
    kernel can leave SMs free."""

    batches: tuple[int, ...] = (1, 2, 3)
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    grid: dict[int, int] = field(default_factory=lambda: {1: GRID, 2: GRID, 3: COARSE})
    shares: tuple[float, ...] = LANE_SHARES

    @staticmethod
    def of(devices: int) -> Space:
        """On one device, without a choice of strategies, there is time for finer cuts and more shares."""
        return Space() if devices > 1 else Space(grid=dict.fromkeys((1, 2, 3), GRID), shares=SHARES_OF_ONE)


@dataclass(frozen=True)
class Found:
    """The result.

    period_us   of a layer of the plan; without_lane_us: of the best that leaves decode attention on the main stream
    bound_us    no plan of the space has a layer that is shorter
    structures  of the space, before cuts; ruled_out: by their bounds
    tried       structures, cuts among them, whose best order was sought; open: those of them where it is not proven
    """

    plan: SchedulePlan
    period_us: float
    without_lane_us: float
    bound_us: float
    structures: int
    ruled_out: int
    tried: int
    open: int

    @property
    def gap(self) -> float:
        """How much longer the plan's layer is than the bound, as a share of the bound: 0 when no plan is better."""
        return max(0.0, self.period_us / self.bound_us - 1)


@dataclass
class _Best:
    """The best plan so far. unproven: the least bound of structures whose best order is not proven; whole: of `tried`,
    those without cuts."""

    period: float = math.inf
    structure: Structure | None = None
    order: Order = ()
    tried: int = 0
    whole: int = 0
    open: int = 0
    unproven: float = math.inf


def search(
    name: str,
    config: ModelConfig,
    model: LatencyModel,
    devices: int,
    load: StepLoad,
    *,
    space: Space | None = None,
    workers: int = 1,
    page_bytes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """name: of the plan; load: of the step that it is for; workers: processes, which do not change the result (more
    than one needs a main module that can be imported, as `multiprocessing` says); page_bytes: of an element of the KV
    pages, None: as the activations; progress: called with (structures done, all). Raises ConfigError for a load that
    leaves nothing to cut."""
    space = space or Space.of(devices)
    finder = Finder(name, config, model, devices, load, space, page_bytes)
    structures = list(finder.structures())
    if not structures:
        raise ConfigError(f"search: {load.rows} rows cannot be cut as asked; accepted: fewer nano-batches, more rows")
    shares = space.shares if load.decode_rows and mosaic_supported(model.hardware.capability) else ()
    # Of three nano-batches with a lane, each D.AG stays in its own layer: half the time.
    alike = [s for s in structures if len(s.rows) < 3 or not any(s.deferred)]
    laned = [replace(s, lane=share) for share in shares for s in alike]
    total = len(structures) + len(laned)
    with _Orders(workers) as orders:
        best = finder.best_of(structures, math.inf, orders, lambda done: progress(done, total))
        with_lane = finder.best_of(laned, best.period, orders, lambda done: progress(len(structures) + done, total))
    progress(total, total)
    chosen = with_lane if with_lane.structure else best
    assert chosen.structure is not None
    return Found(
        plan=finder.ordered(finder.plan(chosen.structure), chosen.order),
        period_us=chosen.period,
        without_lane_us=best.period,
        bound_us=min(chosen.period, best.unproven, with_lane.unproven),
        structures=total,
        ruled_out=total - best.whole - with_lane.whole,
        tried=best.tried + with_lane.tried,
        open=best.open + with_lane.open,
    )


class _Orders:
    """Best orders of several structures at once, in processes of their own once there are many."""

    def __init__(self, workers: int):
        self._workers, self._left = workers, ALONE
        self._pool: ProcessPoolExecutor | None = None

    def best(self, problems: Sequence[tuple[Steps, list[Chain], dict[str, tuple[str, ...]], float]]) -> list[Ordered]:
        self._left -= len(problems)
        if self._workers > 1 and self._left < 0 and self._pool is None:
            self._pool = ProcessPoolExecutor(self._workers, get_context("spawn"))
        each = self._pool.map if self._pool else map
        return list(each(best_order, *zip(*problems, strict=True))) if problems else []

    def __enter__(self) -> _Orders:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


class Finder:
    """Structures of a space, their bounds and the best of them; arguments: see `search`."""

    def __init__(
        self, name: str, config: ModelConfig, model: LatencyModel, devices: int, load: StepLoad, space: Space,
        page_bytes: int | None = None,
    ):  # fmt: skip
        self.name, self.model, self.devices = name, model, devices
        self.load, self.space, self.experts = load, space, config.experts is not None
        self.costs = OpCosts(model, Shapes.of(config, devices, page_bytes), load)
        self.shares = Shares(model.hardware.calibration.network_share, ATTENTION_SHARE)
        self.speeds = Speeds(model)
        self.gathers = (None, "fp8") if self.costs.quantised else (None,)
        self.bounds: dict[tuple, float] = {}

    def structures(self) -> Iterator[Structure]:
        """All of the space, whole and without lanes. On one device there is no network to choose a strategy for."""
        rows, quantum = self.load.rows, row_quantum(self.devices)
        strategies = self.space.strategies if self.devices > 1 else (ALIKE,)
        for count in self.space.batches:
            grid = self.space.grid[count]
            for edges in combinations(range(grid, rows, grid), count - 1):
                sizes = tuple(b - a for a, b in zip((0, *edges), (*edges, rows), strict=True))
                for chosen in product(strategies, repeat=count):
                    if any(s == "scatter" and n % quantum for s, n in zip(chosen, sizes, strict=True)):
                        continue
                    ways = [(False, True) if s == "scatter" else (False,) for s in chosen]
                    gathers = self.gathers if GATHERING & set(chosen) and self.devices > 1 else (None,)
                    for deferred, precision in product(product(*ways), gathers):
                        yield Structure(sizes, chosen, deferred, (1,) * count, gathers=precision)

    def best_of(
        self, structures: list[Structure], below: float, orders: _Orders, progress: Callable[[int], None]
    ) -> _Best:
        """The best plan with a period below `below`, by bound. Cuts of a structure are looked at after it: they only
        add kernels, so that its bound holds for them too."""
        best = _Best(below)
        queue: list[tuple[float, int, Structure]] = []
        for number, structure in enumerate(structures):
            heapq.heappush(queue, (self.bound(structure), number, structure))
            progress(number // 2)
        number = len(structures)
        while queue and queue[0][0] < best.period - LESS:
            tried = [heapq.heappop(queue) for _ in range(min(ROUND, len(queue)))]
            tried = [entry for entry in tried if entry[0] < best.period - LESS]
            below = best.period
            for (bound, _, structure), found in zip(
                tried, orders.best([(*self.problem(s), below) for _, _, s in tried]), strict=True
            ):
                best.tried += 1
                if found.order and found.period < best.period - LESS:
                    best.period, best.structure, best.order = found.period, structure, found.order
                if found.bound < found.period - LESS:
                    best.open, best.unproven = best.open + 1, min(best.unproven, max(bound, found.bound))
                if structure.whole:
                    best.whole += 1
                    if len(structure.rows) <= MOST_CUT:
                        for cut in self.cuts(structure):
                            number += 1
                            heapq.heappush(queue, (max(bound, self.bound(cut)), number, cut))
            progress((len(structures) + best.whole) // 2)
        return best

    def cuts(self, s: Structure) -> Iterator[Structure]:
        """The structure with KQV and decode attention of some nano-batches in two pieces."""
        known = {tuple(self.plan(s).splits.items())}
        for cuts in product((1, 2), repeat=len(s.rows)):
            cut = replace(s, cuts=cuts)
            if (splits := tuple(self.plan(cut).splits.items())) not in known:
                known.add(splits)
                yield cut

    def plan(self, s: Structure) -> SchedulePlan:
        """Its order: one nano-batch after the other."""
        batches = tuple(NanoBatch(n, strategy) for n, strategy in zip(s.rows, s.strategies, strict=True))
        total, decode = self.load.rows, self.load.decode_rows
        splits: dict[str, tuple[int, ...]] = {}
        if not s.whole:
            edges, first = [0], 0
            for rows, cut in zip(s.rows, s.cuts, strict=True):
                half = first + round(rows / 2 / GRID) * GRID
                edges += [half] * (cut > 1 and first < half < first + rows) + [first + rows]
                first += rows
            splits["KQV"] = tuple(b - a for a, b in pairwise(edges))
            inner = sorted({min(edge, decode) for edge in edges})
            splits["GEMV"] = tuple(b - a for a, b in pairwise(inner))
        sms = round(s.lane * self.model.hardware.sm_count / 4) * 4
        lanes = {"GEMV": Lane(1, sms)} if s.lane else {}
        splits = {op: sizes for op, sizes in splits.items() if sizes}
        plan = SchedulePlan(self.name, batches, "", total, decode, splits, lanes=lanes, gathers=s.gathers)
        return self.ordered(plan, [name for chain in self.chains(s, plan) for name in chain])

    def ordered(self, plan: SchedulePlan, order: Sequence[str]) -> SchedulePlan:
        """The plan with an order of its chains' pieces. On one device a collective is nothing: its place is right
        behind what it would read."""
        pieces = {p.name: p for p in self._pieces(plan)}
        moved = [name for name in pieces if name not in order]
        behind = {need: name for name in moved for need in needs(pieces[name], pieces)}
        return replace(plan, order=tuple(n for name in order for n in (name, behind.get(name, "")) if n))

    def chains(self, s: Structure, plan: SchedulePlan) -> list[Chain]:
        """What there is to order: on one device all but the collectives."""
        pieces = {p.name: p for p in self._pieces(plan) if self.devices > 1 or OPS[p.op].kind != COLLECTIVE}
        return [_chain(i + 1, deferred, pieces) for i, deferred in enumerate(s.deferred)]

    def jobs(self, plan: SchedulePlan, layers: int = 3) -> tuple[Job, ...]:
        return build_jobs(plan, self.costs, layers, self.shares, one_in_flight=False, alike=True)

    def bound(self, s: Structure) -> float:
        """Whatever the order, so that it does not matter when D.AG is issued."""
        key = (s.rows, s.strategies, s.cuts, s.lane, s.gathers)
        if key not in self.bounds:
            plan = self.plan(s)
            nano_batches = {(p.op, p.piece): p.nano_batch for p in self._pieces(plan)}
            self.bounds[key] = least_period(self.jobs(plan), nano_batches, self.speeds)
        return self.bounds[key]

    def problem(self, s: Structure) -> tuple[Steps, list[Chain], dict[str, tuple[str, ...]]]:
        """What `best_order` needs."""
        plan = self.plan(s)
        pieces = {p.name: p for p in self._pieces(plan)}
        after = {name: tuple(needs(piece, pieces)) for name, piece in pieces.items() if OPS[piece.op].causal}
        return Steps.read(self.jobs(plan), self.model), self.chains(s, plan), after

    def _pieces(self, plan: SchedulePlan) -> tuple[OpPiece, ...]:
        return plan.pieces(
            self.load.decode_rows, self.load.prefill_rows, row_quantum(self.devices), experts=self.experts
        )


def _chain(number: int, deferred: bool, pieces: dict[str, OpPiece]) -> Chain:
    """A nano-batch's pieces in dependency order."""
    ops = sorted(OPS, key=lambda op: op != "D.AG") if deferred else OPS
    own = [piece for piece in pieces.values() if piece.nano_batch == number]
    return tuple(piece.name for op in ops for piece in own if piece.op == op)
