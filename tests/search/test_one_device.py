"""One device has no collectives: what a plan, the search and the simulator mean there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import comb

import pytest

from nanoflow_jax.config import configs_root
from nanoflow_jax.cost.demand import Demand, StepLoad
from nanoflow_jax.cost.latency import Prediction, Rate, RooflineModel
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.plan.known import known_plan
from nanoflow_jax.plan.plan import NanoBatch, SchedulePlan
from nanoflow_jax.search.orders import Chain, Order, best_order
from nanoflow_jax.search.predict import average_step
from nanoflow_jax.search.search import SHARES_OF_ONE, Finder, Space, search
from nanoflow_jax.search.simulate import simulate_step
from nanoflow_jax.timeline.play import Speeds
from nanoflow_jax.timeline.timeline import COMPUTE
from nanoflow_jax.workload import load_workload

A100, H100, H200 = (RooflineModel(load_hardware(name)) for name in ("a100_sxm_80", "h100_sxm", "h200"))
LLAMA = model_config("llama_3_1_8b")[1]
LOAD = StepLoad(320, 192, 1024, 512)
PLANS = sorted(path.stem for path in (configs_root() / "plans").glob("*.toml"))
PLANS = [name for name in PLANS if load_plan(name).gathers is None]  # the weights here are in bfloat16


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("model", [A100, H200], ids=["a100", "h200"])
def test_search_on_any_number_of_devices(devices: int, model: RooflineModel) -> None:
    """What is found is a plan, takes the time that was said, and nothing known is faster."""
    space = replace(Space.of(devices), batches=(1, 2))
    found = search("found", LLAMA, model, devices, LOAD, space=space)
    simulated = {
        plan.name: simulate_step(plan, LLAMA, model, devices, LOAD)
        for plan in (found.plan, load_plan("sequential"), load_plan("two_all_reduce"))
    }
    assert simulated["found"].inner.us == pytest.approx(found.period_us, rel=1e-6)
    assert found.period_us <= min(s.inner.us for s in simulated.values()) * (1 + 1e-9)
    assert found.gap == 0
    assert bool(simulated["found"].collectives) == (devices > 1)


def test_no_structure_is_looked_at_twice() -> None:
    """One strategy: rows are all that differs. 512 rows have 3 places for a cut, and a lane 9 shares."""
    found = search("found", LLAMA, H200, 1, LOAD)
    cut = 1 + comb(3, 1) + comb(3, 2)
    assert found.structures == cut * (1 + len(SHARES_OF_ONE))
    structures = list(Finder("p", LLAMA, H200, 1, LOAD, Space.of(1)).structures())
    assert len({s.rows for s in structures}) == len(structures) == cut
    assert search("found", LLAMA, A100, 1, LOAD).structures == cut


def interleavings(chains: Sequence[Chain], after: dict[str, tuple[str, ...]]) -> Iterator[Order]:
    left = {name for chain in chains for name in chain}
    if not left:
        yield ()
    for k, chain in enumerate(chains):
        if chain and left.isdisjoint(after.get(chain[0], ())):
            rest = [other[1:] if i == k else other for i, other in enumerate(chains)]
            yield from ((chain[0], *order) for order in interleavings(rest, after))


def test_the_best_order_beside_a_lane_is_brute_forces() -> None:
    """Every order of every structure of up to two nano-batches, each played by the simulator; bounds are below."""
    space = Space(batches=(1, 2), grid={1: 128, 2: 256}, shares=(0.625,))
    finder = Finder("p", LLAMA, H200, 1, LOAD, space)
    whole = [replace(s, lane=lane) for s in finder.structures() for lane in (0.0, *space.shares)]
    periods = {}
    for structure in whole:
        plan = finder.plan(structure)
        _, chains, after = finder.problem(structure)
        brute = min(
            simulate_step(finder.ordered(plan, order), LLAMA, H200, 1, LOAD).inner.us
            for order in interleavings(chains, after)
        )
        found = best_order(*finder.problem(structure))
        assert found.period == pytest.approx(brute, rel=1e-6)
        assert found.bound == found.period, "proven"
        assert finder.bound(structure) <= brute * (1 + 1e-9)
        periods[structure] = brute
    best = search("found", LLAMA, H200, 1, LOAD, space=space)
    assert best.plan.lanes, "attention beside GEMMs wins"
    assert best.period_us <= min(periods.values()) * (1 + 1e-6)  # cuts may be better still
    assert best.without_lane_us == pytest.approx(min(us for s, us in periods.items() if not s.lane), rel=1e-6)


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_runs_on_one_device(name: str) -> None:
    """Nothing is on the network, nothing waits for it, and strategies that differ in collectives alone are the same."""
    simulated = simulate_step(load_plan(name), LLAMA, H200, 1, LOAD)
    assert not simulated.collectives
    assert simulated.inner.network_us == simulated.inner.exposed_network_us == 0
    assert "network" not in simulated.inner.text()


def test_strategies_without_collectives() -> None:
    """A scatter's shards are all rows; a gather still turns attention's output, which is why the search takes none."""
    us = {
        strategy: simulate_step(SchedulePlan("p", (NanoBatch(None, strategy),)), LLAMA, H200, 1, LOAD).inner.us
        for strategy in ("reduce", "scatter", "gather")
    }
    assert us["reduce"] == pytest.approx(us["scatter"], rel=1e-9)
    assert us["reduce"] < us["gather"]


# -- ops that memory binds


class At:
    """An op that takes 1 us alone."""

    name, needs = "op", ()

    def __init__(self, stream: str, bound: str, share: float, capped: bool = False):
        self.stream, self.share, self.capped = stream, share, capped
        self.prediction = Prediction(1.0, bound, "none")


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("capped", [False, True])
def test_two_ops_that_memory_binds_share_its_bandwidth(share: float, capped: bool) -> None:
    """By the curves alone, two with half of the SMs would have 1.4 times what there is."""
    ops = [At(COMPUTE, "memory", 0.0), At("stream 1", "memory", share, capped)]
    found = Speeds(H200).of(ops, {COMPUTE: 0, "stream 1": 1})  # pyright: ignore[reportArgumentType]
    beside = H200.rate("memory", share, "memory").speed if capped else found["stream 1"]
    assert 0 < found[COMPUTE] < 1
    assert found[COMPUTE] + beside == pytest.approx(1.0)
    gemm = [At(COMPUTE, "compute", 0.0), ops[1]]
    assert Speeds(H200).of(gemm, {COMPUTE: 0, "stream 1": 1})[COMPUTE] == pytest.approx(1 - share)  # pyright: ignore


class Measured(RooflineModel):
    """Where a pair was measured, its speeds hold already what the other takes."""

    def rate(self, kind: str, share: float, beside: str) -> Rate:
        return Rate(0.4, "profile")


def test_measured_pairs_are_not_slowed_again() -> None:
    ops = [At(COMPUTE, "memory", 0.0), At("stream 1", "memory", 0.5)]
    found = Speeds(Measured(H200.hardware)).of(ops, {COMPUTE: 0, "stream 1": 1})  # pyright: ignore[reportArgumentType]
    assert found == {COMPUTE: 0.4, "stream 1": 0.4}


# -- the plans for 8B


@pytest.mark.parametrize(
    ("model", "suffix", "workload"),
    [
        (A100, "", "constant:1024:512"),
        (H100, "", "constant:1024:512"),
        (H100, "_d512", "constant:512:512"),
        (H200, "", "constant:1024:512"),
        (H200, "_d1024", "constant:512:512"),
        (H200, "_d856", "constant:512:1024"),
    ],
    ids=lambda value: value.hardware.name if isinstance(value, RooflineModel) else value,
)
def test_committed_plans_are_the_best_known_and_found(model: RooflineModel, suffix: str, workload: str) -> None:
    """By the model at hand, at the load that each names; another plan, scaled, may be cut off the grid, and gain 0.1 %
    by it. `auto` takes the plan for what workload and memory allow."""
    gpu = model.hardware.name
    plan = load_plan(f"auto_llama_3_1_8b_1x{gpu}{suffix}")
    assert plan.tokens_per_step and plan.decode_tokens
    demand = Demand.of(load_workload(workload), LLAMA.max_position_embeddings)
    load = demand.step(plan.tokens_per_step)
    assert load.decode_rows == plan.decode_tokens
    us = {name: simulate_step(load_plan(name), LLAMA, model, 1, load).inner.us for name in PLANS}
    assert us[plan.name] <= 1.001 * min(us.values())
    assert us["sequential"] / us[plan.name] > (1.08 if plan.lanes else 0.999)
    asked = average_step(LLAMA, model.hardware, 1, demand, 2048)
    assert known_plan(LLAMA, gpu, 1, asked.rows, asked.decode_rows)[0] == plan
