"""The simulator against hand-made timelines, its own invariants over random plans, and a whole model."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_jax.config import ConfigError
from nanoflow_jax.cost.demand import Demand, StepLoad
from nanoflow_jax.cost.latency import Prediction, RooflineModel
from nanoflow_jax.cost.shapes import OpCosts, Shapes
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.models.registry import model_config, parse_config
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.plan.plan import Lane, NanoBatch, OpPiece, SchedulePlan, needs
from nanoflow_jax.search.predict import context_grid, kv_capacity, predict
from nanoflow_jax.search.simulate import simulate_step
from nanoflow_jax.timeline.jobs import SIDE, Job, Shares, build_jobs
from nanoflow_jax.timeline.play import Run, play
from nanoflow_jax.timeline.played import waits
from nanoflow_jax.timeline.timeline import COMPUTE, NETWORK, Piece
from nanoflow_jax.workload import load_workload

H200 = RooflineModel(load_hardware("h200"))
LLAMA = model_config("llama_3_1_70b")[1]
LOAD = StepLoad(1280, 768, 1024, 512)
SHARES = Shares(0.3, 0.4)


def job(stream: str, us: float, *needs: int, share: float = 0.0, bound: str = "compute", capped: bool = False) -> Job:
    return Job(Piece(0, "O", 1), "gemm", stream, Prediction(us, bound, "roofline"), needs, share, 0.0, capped=capped)


def test_jobs_beside_each_other_slow_each_other_down() -> None:
    """A GEMM of 100 us; a collective of 42 us with 0.3 of the SMs runs at 0.7 of its speed beside it, for 60 us, in
    which the GEMM, at 0.7, does 42 us of its work."""
    network = job(NETWORK, 42, share=0.3, bound="network")
    played = play([job(COMPUTE, 100), network], H200)
    gemm, collective = played.runs
    assert (collective.start_us, collective.end_us) == pytest.approx((0, 60))
    assert (gemm.start_us, gemm.end_us) == pytest.approx((0, 60 + 58))
    assert played.sources == {"published curve"}
    alone = play([job(COMPUTE, 100), replace(network, needs=(0,))], H200)
    assert [run.end_us for run in alone.runs] == pytest.approx([100, 142])
    assert not alone.sources


def test_a_capped_kernel_keeps_its_speed_and_takes_its_share() -> None:
    runs = play([job(COMPUTE, 60), job(SIDE, 50, share=0.4, bound="memory", capped=True)], H200).runs
    assert [run.end_us for run in runs] == pytest.approx([50 + 30, 50])
    shared = play([job(COMPUTE, 60), job(SIDE, 30, share=0.4, bound="memory")], H200).runs
    assert [run.end_us for run in shared] == pytest.approx([50 + 30, 50])  # 30 us at 0.6 of the speed


def test_three_at_once_share_the_gpu() -> None:
    """The GEMM has what the other two leave: 0.3 of the SMs."""
    jobs = [
        job(COMPUTE, 30),
        job(SIDE, 60, share=0.4, bound="memory"),
        job(NETWORK, 70, share=0.3, bound="network"),
    ]
    assert [run.end_us for run in play(jobs, H200).runs] == pytest.approx([100, 100, 100])


def test_a_job_that_needs_a_later_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"op 0 .* needs op 1"):
        play([job(COMPUTE, 1, 1), job(COMPUTE, 1)], H200)


@pytest.mark.parametrize("runtime", ["library", "nanoflow"])
@pytest.mark.parametrize(
    "name", ["sequential", "two_gather_one_reduce", "nanoflow_70b", "nanoflow_70b_streams", "scatter_70b"]
)
def test_a_few_layers_stand_for_all(name: str, runtime: str) -> None:
    """Six layers and the period of the inner ones against all eighty."""
    plan = load_plan(name)
    few, all_ = (simulate_step(plan, LLAMA, H200, 8, LOAD, layers=layers, runtime=runtime).us for layers in (6, 80))
    assert few == pytest.approx(all_, rel=2e-3)


def test_a_sequential_step_is_the_sum_of_its_ops() -> None:
    """Nothing runs beside a collective: the layer is compute + memory + network, and all of the network is exposed."""
    s = simulate_step(load_plan("sequential"), LLAMA, H200, 8, LOAD)
    inner = s.inner
    assert inner.us == pytest.approx(inner.compute_us + inner.memory_us + inner.network_us)
    assert inner.exposed_network_us == pytest.approx(inner.network_us)
    assert inner.interference_us == pytest.approx(0, abs=1e-6)
    gemms = [H200.gemm(2048, n, k).us for n, k in ((1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584))]
    attention = H200.decode_attention(1280, 1024, 8, 1, 128).us, H200.prefill_attention(768, 512, 8, 1, 128).us
    reduces = 2 * H200.collective("all-reduce", 2048 * 8192 * 2, 8).us
    norms = 2 * H200.norm(2048, 8192).us
    small = 4.2 + (4 * 256 * 2 + 2 * 1152 * 2 + 3 * 3584 * 2) * 2048 / (4.8e12 * 0.896) * 1e6 + 1.8
    assert inner.us == pytest.approx(sum(gemms) + sum(attention) + reduces + norms + small, rel=5e-3)


def test_time_on_the_compute_stream_is_accounted_for() -> None:
    for name in ("nanoflow_70b", "scatter_70b"):
        s = simulate_step(load_plan(name), LLAMA, H200, 8, LOAD).inner
        parts = s.compute_us + s.memory_us + s.exposed_network_us + s.bubble_us + s.interference_us
        assert s.us == pytest.approx(parts)
        whole = simulate_step(load_plan(name), LLAMA, H200, 8, LOAD).totals
        parts = whole.compute_us + whole.memory_us + whole.exposed_network_us + whole.bubble_us + whole.interference_us
        assert whole.us == pytest.approx(parts)


def test_a_wait_is_shared_out_among_what_the_network_runs() -> None:
    """The compute stream waits 70 us, for attention on a lane until 60 and for the second of two collectives until 40:
    until then the network is waited for, although it begins late, at 5; the rest is for the lane. The step's end waits
    for a last collective."""
    jobs = [
        job(COMPUTE, 0),
        job(SIDE, 60),
        job(NETWORK, 20),
        job(NETWORK, 15),
        job(COMPUTE, 10, 0, 1, 3),
        job(NETWORK, 9),
    ]
    times = [(0, 0), (0, 60), (5, 25), (25, 40), (60, 70), (65, 74)]
    exposed, bubbles = waits(jobs, [Run(a, b, b - a) for a, b in times])
    assert exposed == {2: 20, 3: 15, 5: 4}
    assert bubbles == {4: 60 - 35}


def test_a_lane_is_ignored_where_there_is_no_kernel() -> None:
    """As `step.trace` does: on an A100 the plan is one without a lane."""
    plan = load_plan("nanoflow_70b_streams")
    a100 = RooflineModel(load_hardware("a100_sxm_80"))
    assert SIDE in {one.stream for one in simulate_step(plan, LLAMA, H200, 8, LOAD).timeline.events}
    on_lane, without = (simulate_step(p, LLAMA, a100, 8, LOAD) for p in (plan, replace(plan, lanes={})))
    assert on_lane.timeline == without.timeline


def test_one_device_has_no_network() -> None:
    config = replace(model_config("llama_3_2_1b")[1], num_layers=6)
    s = simulate_step(load_plan("nanoflow_70b"), config, H200, 1, LOAD)
    assert not s.collectives
    assert s.inner.network_us == s.inner.exposed_network_us == 0


def test_what_cannot_be_simulated_is_named() -> None:
    with pytest.raises(ConfigError, match="runtime: 'cuda' is unknown; accepted: library, nanoflow"):
        simulate_step(load_plan("sequential"), LLAMA, H200, 8, LOAD, runtime="cuda")
    with pytest.raises(ConfigError, match="layers: 3"):
        simulate_step(load_plan("sequential"), LLAMA, H200, 8, LOAD, layers=3)
    with pytest.raises(ConfigError, match="sum below 1"):
        Shares(0.6, 0.4)
    with pytest.raises(ConfigError, match="load"):
        StepLoad(0, 0, 1, 1)
    with pytest.raises(ConfigError, match="room for 0 tokens of KV on 1 x h200"):
        predict("70b", LLAMA, load_plan("sequential"), H200, 1, Demand("w", 10, 10, 10, 10))


# -- random plans

SMALL = parse_config(
    {"vocab_size": 512, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4,
     "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64, "dtype": "bfloat16"}
)  # fmt: skip


@st.composite
def plans(draw: st.DrawFn) -> SchedulePlan:
    """Plans of 512 rows with one to three nano-batches in a random order that their dependencies allow."""
    count = draw(st.integers(1, 3))
    edges = sorted(draw(st.lists(st.integers(1, 31), min_size=count - 1, max_size=count - 1, unique=True)))
    cuts = [0, *(16 * edge for edge in edges), 512]
    batches = tuple(NanoBatch(b - a, draw(st.sampled_from(["gather", "reduce", "scatter"]))) for a, b in pairwise(cuts))
    lane = draw(st.sampled_from([{}, {"GEMV": Lane(1, 48)}, {"GEMV": Lane(1)}]))
    plan = SchedulePlan("random", batches, "", 512, 16 * draw(st.integers(1, 31)), lanes=lane)
    pieces = {p.name: p for p in plan.pieces(plan.decode_tokens or 0, 512 - (plan.decode_tokens or 0))}
    left, order = dict(pieces), []
    while left:
        ready = [name for name, p in left.items() if not set(needs(p, pieces)) & set(left)]
        order.append(draw(st.sampled_from(ready)))
        del left[order[-1]]
    return replace(plan, order=tuple(order))


def test_a_collective_moves_the_columns_of_its_op() -> None:
    """GEMV.AG all heads, which a model may have more or fewer of than its residual has columns; the others that."""
    shapes = replace(Shapes.of(SMALL, 8), width=3 * SMALL.hidden_size)
    plan = SchedulePlan("one", (NanoBatch(None, "gather"),))
    jobs = build_jobs(plan, OpCosts(H200, shapes, StepLoad(64, 0, 100, 0)), 1, SHARES)
    moved = {job.piece.op: job.bytes for job in jobs if job.collective and job.piece.layer == 0}
    row = SMALL.hidden_size * shapes.element_bytes
    assert moved == {"GEMV.AG": 64 * 3 * row, "O.AG": 64 * row, "D.AR": 64 * row}


@settings(max_examples=60, deadline=None)
@given(plans(), st.sampled_from(["library", "nanoflow"]))
def test_timelines_obey_dependencies_and_resources(plan: SchedulePlan, runtime: str) -> None:
    """By the plan's own `needs`, not by the jobs' lists; one op at a time per stream; at no time more than the GPU."""
    decode = plan.decode_tokens or 0
    load = StepLoad(decode, 512 - decode, 700, 300)
    jobs = build_jobs(plan, OpCosts(H200, Shapes.of(SMALL, 8), load), 4, SHARES, runtime)
    runs = play(jobs, H200).runs
    pieces = {p.name: p for p in plan.pieces(decode, 512 - decode, 8)}
    first, last = {}, {}
    for one, run in zip(jobs, runs, strict=True):
        key = (one.piece.layer, f"{one.piece.op}.{one.piece.piece}")
        if one.kind != "elementwise":
            first[key], last[key] = run.start_us, run.end_us
        assert run.end_us - run.start_us >= run.alone_us - 1e-6
    for layer in range(4):
        for name, piece in pieces.items():
            if piece.op == "D.AG" and layer == 3:
                continue  # the head gathers what the last layer leaves
            for need in needs(piece, pieces):
                assert first[layer, name] >= last[layer, need] - 1e-6, (layer, name, need)
            if piece.op == "KQV" and layer:
                final = _final_collective(piece, pieces)
                assert first[layer, name] >= last[layer - 1, final] - 1e-6
    for stream in {one.stream for one in jobs}:
        mine = [run for one, run in zip(jobs, runs, strict=True) if one.stream == stream]
        assert all(a.end_us <= b.start_us + 1e-6 for a, b in pairwise(mine))
    if runtime == "library":  # a collective is issued once the one in flight is done: the compute stream waits
        for flying, issued in pairwise(i for i, one in enumerate(jobs) if one.stream == NETWORK):
            later = (runs[i].start_us for i in range(issued, len(jobs)) if jobs[i].stream == COMPUTE)
            assert next(later, math.inf) >= runs[flying].end_us - 1e-6
    for moment in {run.start_us for run in runs}:
        beside = [o for o, r in zip(jobs, runs, strict=True) if r.start_us <= moment < r.end_us and o.stream != COMPUTE]
        assert len(beside) == len({one.stream for one in beside})
        if "GEMV" not in plan.lanes or plan.lanes["GEMV"].sms:
            assert sum(one.share for one in beside) < 1


def _final_collective(piece: OpPiece, pieces: dict[str, OpPiece]) -> str:
    number = piece.nano_batch
    return next(n for n in (f"D.AG.{number}", f"D.AR.{number}") if n in pieces)


# -- workloads


def test_the_average_step_of_a_workload() -> None:
    demand = Demand.of(load_workload("constant:512:513"), 4096)
    assert (demand.prefill_rows, demand.decode_rows) == (512, 512)
    assert demand.decode_context == pytest.approx(512 + 256.5)
    assert demand.prefill_context == pytest.approx(256.5)
    assert demand.step(2048) == StepLoad(1024, 1024, demand.decode_context, demand.prefill_context)
    few = demand.step(2048, decode_slots=400)
    assert (few.decode_rows, few.prefill_rows) == (400, 400)
    tight = demand.step(2048, most_resident=400_000)
    assert demand.resident(tight) <= 400_000 < demand.resident(replace(tight, decode_rows=tight.decode_rows + 8))
    assert Demand.of(load_workload("constant:512:1"), 4096).step(1024) == StepLoad(0, 1024, 0.0, 256.5)


def test_memory_limits_the_requests() -> None:
    """512/1024 on A100: 1365 rows would decode, but pages hold fewer requests; on H200 they do not."""
    demand = Demand.of(load_workload("constant:512:1024"), 4096)
    plan = load_plan("nanoflow_70b")
    a100 = predict("70b", LLAMA, plan, RooflineModel(load_hardware("a100_sxm_80")), 8, demand, sizes=())
    assert a100.kv.limits
    assert a100.kv.resident <= a100.kv.capacity
    h200 = predict("70b", LLAMA, plan, H200, 8, demand, sizes=())
    assert not h200.kv.limits
    assert h200.simulation.load.rows == 2048 > a100.simulation.load.rows


def test_the_best_step_size_is_the_best_of_those_tried() -> None:
    demand = Demand.of(load_workload("sharegpt"), 4096)
    plan = load_plan("nanoflow_70b")
    result = predict("70b", LLAMA, plan, H200, 8, demand, sizes=(512, 4096))
    rates = {
        size: predict("70b", LLAMA, plan, H200, 8, demand, tokens_per_step=size, sizes=()) for size in (512, 2048, 4096)
    }
    rows, slots, rate = result.best
    best = max(rates.values(), key=lambda r: r.simulation.tokens_per_second_per_gpu).simulation
    assert (rows, slots, rate) == (best.load.rows, best.load.decode_rows, best.tokens_per_second_per_gpu)
    assert result.step_ms == pytest.approx(rates[2048].step_ms)


def test_a_grid_leaves_out_what_does_not_fit() -> None:
    grid = context_grid(LLAMA, load_plan("sequential"), H200, 8, (640, 1280), (512, 65536))
    assert grid[0][0] is not None
    assert grid[1][1] is None
    assert kv_capacity(LLAMA, load_plan("sequential"), H200.hardware, 8, 2048) < 1280 * 65536


def test_inner_layers_are_whole_periods() -> None:
    """Of five layers with a window and one without; where a user simulates more, one kind is not counted twice."""
    gemma, load = model_config("gemma-3-27b")[1], StepLoad(640, 384, 8192, 4096)
    usual, more = (simulate_step(load_plan("sequential"), gemma, H200, 8, load, layers=n).inner for n in (None, 10))
    assert usual.layers == more.layers == tuple(range(2, 8))
    assert usual.us == pytest.approx(more.us)


def test_norms_and_windows_of_families_have_their_cost() -> None:
    """Of one layer and one piece, beside LLaMA's jobs: sums of squares for norms of heads; of whole projections an
    all-reduce, too; a second norm; and attention to no more than the window."""
    plan, load = SchedulePlan("one", (NanoBatch(None, "reduce"),)), StepLoad(64, 0, 4096, 0)

    def jobs(**changes: Any) -> list[Job]:
        config = replace(SMALL, num_layers=1, **changes)
        return list(build_jobs(plan, OpCosts(H200, Shapes.of(config, 8), load), 1, SHARES))

    def with_attention(**changes: Any) -> list[Job]:
        (layer,) = SMALL.pattern
        return jobs(pattern=(replace(layer, attention=replace(layer.attention, **changes)),))

    def more(some: list[Job]) -> Counter[tuple[str, str]]:
        return Counter((j.name, j.kind) for j in some) - Counter((j.name, j.kind) for j in jobs())

    heads, whole = with_attention(qk_norm="head"), with_attention(qk_norm="projection")
    assert list(more(heads)) == [("L0/KQV.1", "elementwise")]
    assert sorted(more(whole)) == [("L0/KQV.1", "collective"), ("L0/KQV.1", "elementwise")]
    assert sorted(more(jobs(norms="both"))) == [("L0/KQV.1", "elementwise"), ("L0/UG.1", "elementwise")]
    attention = {w: next(j for j in with_attention(window=w) if j.kind == "attention") for w in (None, 8192, 512)}
    assert attention[None].bytes == attention[8192].bytes == 8 * attention[512].bytes
