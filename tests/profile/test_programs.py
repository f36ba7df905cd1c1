"""The programs that a profile times, compiled for a GPU that is not there: every call is in them, and the two sides of
a pair run at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compute_on import compute_on
from jax.sharding import Mesh

from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.gpu_target import gpu_mesh, saving_options
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.profile import programs
from nanoflow_jax.profile.kernels import Kernel, kernel
from nanoflow_jax.profile.points import Point
from nanoflow_jax.profile.programs import ROUNDS, Bench, check_beside, compile_pair, compile_single, issued
from nanoflow_jax.step.order import IssueOrder

KV = {"kv_heads": 1, "head_dim": 128, "dtype": "bf16"}  # of one of eight ranks of llama-3.1-70b
HEADS = {"q_heads": 8, **KV}
GEMM = Point.of("gemm", m=1024, n=7168, k=8192, dtype="bf16")
DECODE = Point.of("decode_attention", requests=1024, context=1024, sms=44, **HEADS)
ALL_SMS = Point.of("decode_attention", requests=1024, context=1024, sms=0, **HEADS)
PREFILL = Point.of("prefill_attention", tokens=1024, context=1024, **HEADS)


def moved(kind: str) -> Point:
    return Point.of("collective", kind=kind, devices=8, dtype="bf16", bytes=1024 * 8192 * 2)


def built(point: Point) -> Kernel:
    return kernel(point, 64, "mosaic")


@pytest.fixture(scope="module")
def h200() -> Any:
    """A network or not -> its `Bench`, and the options that save compile time."""
    hardware = load_hardware("h200")
    made = {network: Bench(gpu_mesh(hardware, 8 if network else 1), True, hardware.l2_bytes) for network in (0, 1)}
    return made, saving_options(hardware)


def compiled(h200: Any, first: Point, second: Point, a: int, b: int) -> str:
    """The pair's program for `a` calls of the first beside `b` of the second."""
    one, two = built(first), built(second.times(max(b, 1)))
    return compile_pair(h200[0][two.network], one, two, a, min(b, 1), h200[1]).as_text()


@pytest.mark.aot
@pytest.mark.parametrize(("a", "b"), [(1, 1), (6, 1), (1, 6)])
def test_a_gemm_runs_beside_attention_on_a_stream(h200: Any, a: int, b: int):
    text = compiled(h200, GEMM, DECODE, a, b)
    check_beside(text)
    assert issued(text) == f"S{'K' * a}D" * ROUNDS + "K"  # and a small kernel at the end
    assert text.count('custom_call_target="__cublas') == a * ROUNDS
    assert text.count('custom_call_target="mosaic_gpu') == ROUNDS
    assert text.count("_xla_stream_annotation") == 2 * ROUNDS  # of starts and ends, and of nothing else


@pytest.mark.aot
@pytest.mark.parametrize("kind", ["all-gather", "all-reduce", "reduce-scatter"])
@pytest.mark.parametrize(("a", "b"), [(3, 1), (1, 6)])
def test_a_gemm_runs_beside_a_collective(h200: Any, kind: str, a: int, b: int):
    text = compiled(h200, GEMM, moved(kind), a, b)
    check_beside(text)
    assert issued(text) == f"S{'K' * a}D" * ROUNDS  # asynchronous, and nothing is copied
    assert text.count('custom_call_target="__cublas') == a * ROUNDS


@pytest.mark.aot
@pytest.mark.parametrize(("point", "kernels"), [(ALL_SMS, 1), (PREFILL, 5)])  # prefill attention plans its tiles first
def test_attention_runs_beside_a_collective(h200: Any, point: Point, kernels: int):
    text = compiled(h200, point, moved("all-reduce"), 1, 2)
    assert issued(text) == f"S{'K' * kernels}D" * ROUNDS
    assert text.count('custom_call_target="mosaic_gpu') == ROUNDS


def test_work_grows_along_the_first_axis():
    assert DECODE.times(3)["requests"] == 3072 and moved("all-reduce").times(2)["bytes"] == 2**25
    assert DECODE.times(3).family == DECODE.family and DECODE.times(3)["context"] == 1024


def one_after_another(first: Kernel, second: Kernel, a: int, b: int, one: Any, two: Any) -> Any:
    """A broken `side_by_side`: a stream's start is not pinned, a collective is waited for at once."""
    order, results = IssueOrder(True), []
    streamed = compute_on(second.call, compute_type="gpu_stream:1", out_memory_spaces=jax.memory.Space.Device)
    for _ in range(ROUNDS):
        started = order.start(second.call if second.network else streamed, two[0], two[1][0])
        started = order.wait(started) if second.network else started
        results += [order.run(first.call, one[0], one[1][0]) for _ in range(a)]
        results.append(order.wait(started))
    return results, None


@pytest.mark.aot
@pytest.mark.parametrize("second", [DECODE, moved("all-gather")])
def test_a_pair_that_does_not_overlap_is_noticed(h200: Any, second: Point, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(programs, "side_by_side", one_after_another)
    text = compiled(h200, GEMM, second, 2, 1)
    assert text.count('custom_call_target="__cublas') == 2 * ROUNDS
    with pytest.raises(ValueError, match=r"do not run side by side: [SKD]*KK"):
        check_beside(text)


@pytest.mark.aot
def test_a_small_all_reduce_overlaps_with_nothing(h200: Any):
    """XLA takes a kernel of its own for it, and waits at once: such a pair is not timed."""
    small = Point.of("collective", kind="all-reduce", devices=8, dtype="bf16", bytes=2**20)
    with pytest.raises(ValueError, match="side by side: SDKKSDKK"):
        check_beside(compiled(h200, GEMM, small, 2, 1))


CALLS = 3
SMALL = {  # what one call issues
    Point.of("copy", bytes=2**20): "K",
    Point.of("gemm", m=128, n=1024, k=1024, dtype="bf16"): "K",
    Point.of("decode_attention", requests=16, context=128, sms=44, **HEADS): "K",
    Point.of("prefill_attention", tokens=64, context=128, **HEADS): "KKKK",
    Point.of("append", rows=64, **KV): "K",  # and no copy of the pages
    Point.of("norm", rows=64, hidden=1024, dtype="bf16"): "K",
    Point.of("sampling", rows=64, vocab=16032): "KK",
    Point.of("grouped_gemm", rows=64, experts=4, n=128, k=256, parts=2, room=2, dtype="bf16"): "K",
    Point.of("gather", rows=64, hidden=256, room=2, dtype="bf16"): "K",
    Point.of("combine", rows=64, hidden=256, choices=4, spread=2, dtype="bf16"): "K",
    moved("all-gather"): "K",
    moved("all-reduce"): "K",
    moved("reduce-scatter"): "K",
}


@pytest.mark.aot
@pytest.mark.parametrize("point", SMALL, ids=lambda point: point.sizes[2][1] if "kind" in str(point) else point.op)
def test_every_call_is_in_the_program(h200: Any, point: Point):
    one = built(point)
    text = compile_single(h200[0][one.network], one, CALLS, h200[1]).as_text()
    assert issued(text) == SMALL[point] * CALLS
    if "attention" in point.op or point.op in ("append", "norm", "grouped_gemm", "gather", "combine"):
        assert text.count('custom_call_target="mosaic_gpu') == CALLS


@pytest.mark.aot
def test_calls_that_are_merged_are_noticed(h200: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(programs, "IssueOrder", lambda enforce: IssueOrder(False))
    point = next(point for point in SMALL if point.op == "gemm")
    bench = Bench(h200[0][0].mesh, True)  # one set of inputs
    text = compile_single(bench, built(point), CALLS, h200[1]).as_text()
    assert issued(text) == "KCC" != SMALL[point] * CALLS  # one call, and its result thrice


def test_a_program_can_run_again(monkeypatch: pytest.MonkeyPatch):
    """What a call updates in place is the next run's input; here the GPU's programs, run on the CPU."""
    monkeypatch.setattr(programs, "compile_step", lambda lowered, *_, **__: lowered.compile())
    monkeypatch.setattr(programs, "check_beside", lambda _: None)
    bench = Bench(Mesh(np.array(jax.devices()[:2]), (AXIS,)), True, l2_bytes=1)
    kv = {"kv_heads": 1, "head_dim": 8, "dtype": "f32"}
    append = kernel(Point.of("append", rows=4, **kv), 4, "xla")
    reduce = kernel(Point.of("collective", kind="all-reduce", devices=2, dtype="f32", bytes=256), 4, "xla")
    gemm = kernel(Point.of("gemm", m=8, n=8, k=8, dtype="f32"), 4, "xla")
    for one in (append, reduce, gemm):
        programs.single(bench, one, 2).run(2)
    for a, b in ((2, 3), (0, 1)):
        program = programs.pair(bench, gemm, lambda _: reduce)(a, b)
        program.run(2)
        assert program.calls == (a * ROUNDS, b * ROUNDS)


def test_kernels_of_experts_have_the_rows_that_they_are_named_for():
    """All rows in groups, in any of them; half of the choices here, each with a row of its own."""
    rows, sizes = 40, {"experts": 4, "n": 8, "k": 16, "room": 2, "dtype": "f32"}
    up = kernel(Point.of("grouped_gemm", rows=rows, parts=2, **sizes), 64, "xla")
    (grouped, tiles), own = up.make(2)
    assert tiles is None and grouped.sum() == rows and (grouped > 0).all() and len(set(grouped.tolist())) > 1
    assert own[0][0].shape == (2 * rows, 16) and own[1][1].shape == (4, 2, 8, 16)
    assert up.call((grouped, tiles), own[0]).shape == (2 * rows, 8)
    gather = kernel(Point.of("gather", rows=rows, hidden=8, room=2, dtype="f32"), 64, "xla")
    (at, used), (x,) = gather.make(1)
    assert used == rows and at.shape == (2 * rows,) and gather.call((at, used), x).shape == (2 * rows, 8)
    assert len(set(at.tolist())) > rows / 2 and at.min() >= 0 and at.max() < rows
    combine = kernel(Point.of("combine", rows=rows, hidden=8, choices=4, spread=2, dtype="f32"), 64, "xla")
    (place, weights), (x,) = combine.make(1)
    here = np.asarray(place)[np.asarray(place) >= 0]
    assert sorted(here) == list(range(2 * rows)) == list(range(x.shape[0])) and weights.shape == (rows, 4)
    assert combine.call((place, weights), x).shape == (rows, 8)


def test_in_place_calls_update_what_they_should():
    pool = jnp.zeros((8, 1, 4, 8)), jnp.zeros((8, 1, 4, 8))
    append = kernel(Point.of("append", rows=4, kv_heads=1, head_dim=8, dtype="f32"), 4, "xla")
    own = append.make(2)[1]
    k_pages, v_pages = programs.chained(append, 2, pool, own)
    assert len({x.tobytes() for one in own for x in map(np.asarray, one[:2])}) == 4, "each of its own"
    for k, v, pages, slots in own:
        np.testing.assert_array_equal(k_pages[pages, :, slots], k)
        np.testing.assert_array_equal(v_pages[pages, :, slots], v)
