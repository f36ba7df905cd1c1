"""The best order equals brute force and a mixed integer program; the closed form is the simulator; bounds are below."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations, product
from math import comb

import numpy as np
import pytest
from scipy.optimize import linprog

from nanoflow_jax.cost.demand import StepLoad
from nanoflow_jax.cost.latency import Prediction, Rate, RooflineModel
from nanoflow_jax.cost.shapes import OpCosts, Shapes
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.plan.plan import Lane, NanoBatch, SchedulePlan, needs
from nanoflow_jax.search.bound import least_period
from nanoflow_jax.search.closed_form import RUN, START, WAIT, WAIT_ALL, WAIT_BEFORE, Steps
from nanoflow_jax.search.orders import Chain, Order, best_order
from nanoflow_jax.search.search import Finder, Space, Structure
from nanoflow_jax.search.simulate import simulate_step
from nanoflow_jax.timeline.jobs import Shares, build_jobs
from nanoflow_jax.timeline.play import Speeds

A100, H200 = (RooflineModel(load_hardware(name)) for name in ("a100_sxm_80", "h200"))
LLAMA = model_config("llama_3_1_70b")[1]
DECODE_ONLY = StepLoad(512, 0, 1024, 0)
MIXED = StepLoad(320, 192, 1024, 512)
MOST_ORDERS = 20_000  # that brute force plays, of one structure

Problem = tuple[Steps, list[Chain], dict[str, tuple[str, ...]]]


def interleavings(chains: Sequence[Chain], after: dict[str, tuple[str, ...]]) -> Iterator[Order]:
    """Every order of the chains' pieces in which each comes after those that `after` names."""
    left = {name for chain in chains for name in chain}
    if not left:
        yield ()
    for k, chain in enumerate(chains):
        if chain and left.isdisjoint(after.get(chain[0], ())):
            rest = [other[1:] if i == k else other for i, other in enumerate(chains)]
            yield from ((chain[0], *order) for order in interleavings(rest, after))


def problem(structure: Structure, model: RooflineModel = H200, load: StepLoad = MIXED) -> Problem:
    return Finder("p", LLAMA, model, 8, load, Space()).problem(structure)


def drawn(count: int, batches: int, seed: int = 0) -> Iterator[tuple[Structure, RooflineModel]]:
    """Structures of 512 rows with lanes and cuts, on GPUs with other networks than the real ones too."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        edges = sorted(rng.choice([128, 256, 384], batches - 1, replace=False).tolist())
        rows = tuple(b - a for a, b in zip([0, *edges], [*edges, 512], strict=True))
        strategies = tuple(rng.choice(["gather", "reduce", "scatter"], batches).tolist())
        deferred = tuple(s == "scatter" and bool(rng.integers(2)) for s in strategies)
        cuts = (int(rng.integers(1, 3)), *(1,) * (batches - 1))
        model = [A100, H200][rng.integers(2)]
        lane = float(rng.choice([0.0, 0.375, 0.5])) if model is H200 else 0.0
        hardware = model.hardware
        structure = Structure(rows, strategies, deferred, cuts, lane)
        calibration = replace(
            hardware.calibration,
            network_efficiency=hardware.calibration.network_efficiency * float(rng.uniform(0.4, 2)),
            network_share=float(rng.uniform(0.1, 0.4)),
        )
        yield structure, RooflineModel(replace(hardware, calibration=calibration))


def test_the_best_order_is_brute_forces() -> None:
    """Two nano-batches, every order of the pieces; a price that is too high must be found out."""
    too_dear, looked_at = [], set()
    for structure, model in drawn(40, 2):
        load = DECODE_ONLY if "scatter" in structure.strategies else MIXED
        steps, chains, after = problem(structure, model, load)
        if comb(sum(map(len, chains)), len(chains[0])) > MOST_ORDERS:
            continue
        looked_at |= {*structure.strategies, structure.lane > 0, structure.whole}
        brute = min(map(steps.period, interleavings(chains, after)))
        found = best_order(steps, chains, after)
        assert found.period == pytest.approx(brute, rel=1e-9)
        assert steps.period(found.order) == found.period
        assert found.bound == found.period, "proven"
        assert best_order(steps, chains, after, below=brute).order == ()
        wrong = best_order(replace(steps, least_loss=3 * steps.least_loss), chains, after)
        too_dear.append(wrong.bound > brute * (1 + 1e-6) or wrong.period > brute * (1 + 1e-6))
    assert any(too_dear)
    assert looked_at == {"gather", "reduce", "scatter", True, False}


def test_three_nano_batches_have_no_better_order() -> None:
    """Too many orders for brute force: none of 800 drawn at random is better."""
    rng, proven = np.random.default_rng(1), 0
    for structure, model in drawn(4, 3):
        steps, chains, after = problem(replace(structure, cuts=(1, 1, 1)), model)
        found = best_order(steps, chains, after)
        proven += found.bound == found.period
        assert found.bound <= found.period == steps.period(found.order)
        for _ in range(200):
            at, order = [0] * 3, list[str]()
            while any(n < len(chain) for n, chain in zip(at, chains, strict=True)):
                ready = [
                    k
                    for k, chain in enumerate(chains)
                    if at[k] < len(chain) and set(after.get(chain[at[k]], ())) <= set(order)
                ]
                k = ready[rng.integers(len(ready))]
                order.append(chains[k][at[k]])
                at[k] += 1
            assert steps.period(order) >= found.period * (1 - 1e-9)
    assert proven >= 3  # of four: where the layers before differ from the one at hand, the bound may stay below


def test_the_closed_form_is_the_simulator() -> None:
    """Over orders of mixed strategies, lanes and cuts, drawn at random, and a bound below all of them. In some, a
    collective waits for the one in flight: they need the step that says so."""
    rng, waiting = np.random.default_rng(0), 0
    kinds = (("gather", "scatter"), ("reduce", "gather"), ("scatter", "scatter"), ("reduce",) * 3)
    for strategies, lanes in product(kinds, ({}, {"GEMV": Lane(1, 52)})):
        rows = (256, 256) if len(strategies) == 2 else (256, 128, 128)
        plan = SchedulePlan(
            "p", tuple(map(NanoBatch, rows, strategies)), "", 512, 320, {"KQV": (128, 128, *rows[1:])}, lanes=lanes
        )
        jobs = build_jobs(plan, OpCosts(H200, Shapes.of(LLAMA, 8), MIXED), 3, Shares(0.3, 0.4), one_in_flight=False)
        steps = Steps.read(jobs, H200)
        at_once = {name: tuple(step for step in own if step[0] != WAIT_ALL) for name, own in steps.of.items()}
        pieces = {p.name: p for p in plan.pieces(320, 192, 8)}
        bound = least_period(jobs, {(p.op, p.piece): p.nano_batch for p in pieces.values()}, Speeds(H200))
        for _ in range(10):
            order, left = [], dict(pieces)
            while left:
                # The first piece of KQV has the norm of its whole nano-batch: pieces stay in order.
                ready = [n for n, p in left.items() if not (set(needs(p, pieces)) | {_before(n)}) & set(left)]
                order.append(ready[rng.integers(len(ready))])
                del left[order[-1]]
            simulated = simulate_step(replace(plan, order=tuple(order)), LLAMA, H200, 8, MIXED, layers=8).inner.us
            assert steps.period(order) == pytest.approx(simulated, rel=2e-3)
            assert bound <= simulated * (1 + 1e-9)
            waiting += replace(steps, of=at_once).period(order) < 0.99 * simulated
    assert waiting > 3


def _before(name: str) -> str:
    op, _, piece = name.rpartition(".")
    return f"{op}.{int(piece) - 1}" if op == "KQV" and piece == "2" else ""


# -- a mixed integer program


@dataclass(frozen=True)
class Apart(RooflineModel):
    """Ops do not slow each other down, and writing keys and values is free: what the program below can say."""

    def rate(self, kind: str, share: float, beside: str) -> Rate:
        return Rate(1.0, "none")

    def append(self, rows: int, kv_heads: int, head_dim: int, *, kv_bytes: float = 2.0) -> Prediction:
        return Prediction(0.0, "memory", "none")


def by_milp(steps: Steps, chains: Sequence[Chain]) -> float:
    """The least period by HiGHS, as the paper's first stage: start times of one layer that repeats, in any order that
    the chains allow. A collective is a piece that takes no time on the compute stream, and runs from there."""
    names = [name for chain in chains for name in chain]
    chain_of = {name: k for k, chain in enumerate(chains) for name in chain}
    length = {name: sum(us for kind, us, _ in steps.of[name] if kind == RUN) for name in names}
    sent = {name: us for name in names for kind, us, _ in steps.of[name] if kind == START}
    slots = {slot: name for name in names for kind, _, slot in steps.of[name] if kind == START}
    assert not any(length[name] for name in sent)
    pairs = [(a, b) for a, b in combinations(names, 2) if chain_of[a] != chain_of[b]]
    column = {key: i for i, key in enumerate(["T", *names, *pairs])}
    most = sum(length.values()) + sum(sent.values())
    rows, least = [], []

    def after(later: str, earlier: str, us: float, layers: int = 0, first: tuple[str, str] | None = None) -> None:
        """later (so many layers on) starts `us` after earlier; with `first`: only if that pair's first op is first."""
        rows.append(np.zeros(len(column)))
        least.append(us)
        rows[-1][column[later]] += 1
        rows[-1][column[earlier]] -= 1
        rows[-1][column["T"]] += layers
        if first is not None and first in column:  # the pair is 1 when its first op is issued first
            rows[-1][column[first]] -= most
            least[-1] -= most
        elif first is not None:
            rows[-1][column[first[1], first[0]]] += most

    for a, b in permutations(names, 2):
        us = max(length[a], sent.get(a, 0.0) if b in sent else 0.0)  # one collective in flight
        after(b, a, us, layers=1)
        if chain_of[a] != chain_of[b]:
            after(b, a, us, first=(a, b))
        elif names.index(a) < names.index(b):
            after(b, a, us)
    for name in names:
        for kind, _, slot in steps.of[name]:
            if kind in (WAIT, WAIT_BEFORE):
                after(name, slots[slot], sent[slots[slot]], layers=int(kind == WAIT_BEFORE))
    binary = [isinstance(key, tuple) for key in column]
    result = linprog(
        np.eye(len(column))[0],
        A_ub=-np.array(rows),
        b_ub=-np.array(least),
        bounds=[(0.0, 1.0 if b else 3 * most) for b in binary],
        integrality=np.array(binary, dtype=int),
        method="highs",
        options={"mip_rel_gap": 1e-6},
    )
    assert result.success, result.message
    return result.fun


@pytest.mark.parametrize("rows", [(256, 256), (128, 384)])
def test_the_best_order_is_a_milps(rows: tuple[int, int]) -> None:
    """Where the program can say it, it and the search agree; the program takes longer."""
    structure = Structure(rows, ("reduce", "reduce"), (False, False), (1, 1))
    steps, chains, after = problem(structure, Apart(A100.hardware), DECODE_ONLY)
    started = time.perf_counter()
    found = best_order(steps, chains, after)
    between = time.perf_counter()
    program = by_milp(steps, chains)
    taken = time.perf_counter() - between
    print(f"{rows}: {found.period:.1f} us; search {between - started:.3f} s, MILP {taken:.1f} s")
    assert found.bound == found.period == pytest.approx(program, rel=1e-5)
