"""The real LLaMA-3.1-70B step, four layers at full size, compiled for eight H200 without one: what the plans promise,
and what the inspector says when the promise is broken."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache

import pytest

from nanoflow_jax.cost.demand import StepLoad
from nanoflow_jax.cost.latency import Rate, RooflineModel
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.costs import expected_us
from nanoflow_jax.inspect.hlo import parse
from nanoflow_jax.inspect.hlo_words import MOSAIC
from nanoflow_jax.inspect.report import inspect_compiled
from nanoflow_jax.inspect.step import InspectedLayer, StepInspection, inspect_step, kernel_costs
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.search.simulate import Simulation, simulate_step
from nanoflow_jax.timeline.timeline import Collective, Event

pytestmark = pytest.mark.aot

LAYERS, INNER = 4, (1, 2)
TOKENS, HIDDEN, DEVICES, BYTES = 2048, 8192, 8, 2
MODEL = RooflineModel(load_hardware("h200"))


@cache
def inspected(
    plan: str, order: bool = True, merger_mb: int = 0, layers: int = LAYERS, gpu: str = "h200"
) -> StepInspection:
    options = {"xla_gpu_dot_merger_threshold_mb": merger_mb} if merger_mb else None
    return inspect_step("llama-3.1-70b", gpu, plan, tokens=TOKENS, layers=layers, options=options, enforce_order=order)


@cache
def fp8_step() -> StepInspection:
    return inspect_step(
        "llama-3.1-70b", "h200", "nanoflow_70b", tokens=TOKENS, layers=2, kv_cache_dtype="fp8", enforce_order=False
    )


def inner(step: StepInspection) -> list[Collective]:
    return [c for c in step.report.collectives if c.layer in INNER]


def batches_beside(step: StepInspection, collective: Collective) -> set[int]:
    """Nano-batches of the GEMMs and attention kernels that run beside a collective."""
    nano_batch = {p.name: p.nano_batch for p in step.pieces}
    return {nano_batch[name.split("/")[1]] for name in collective.beside}


def moved(step: StepInspection) -> dict[str, float]:
    """MiB of whole tensors per inner layer, by op."""
    total: dict[str, float] = defaultdict(float)
    for c in inner(step):
        total[str(c.op)] += c.bytes / len(INNER) / 2**20
    return dict(total)


def kinds(step: StepInspection) -> set[str]:
    return {finding.kind for finding in step.report.findings}


@pytest.mark.parametrize("plan", ["nanoflow_70b", "scatter_70b"])
def test_every_collective_of_an_inner_layer_runs_beside_the_other_nano_batch(plan: str) -> None:
    """Async, with a GEMM or attention of another nano-batch between start and done; across layers too."""
    step = inspected(plan)
    networked = [p for p in step.pieces if p.op.split(".")[-1] in ("AG", "AR", "RS")]
    found = inner(step)
    # One instruction for each collective of the plan in each layer: nothing merged, nothing lost.
    assert sorted((c.layer, c.op, c.nano_batch) for c in found) == sorted(
        (layer, p.op, p.piece) for layer in INNER for p in networked
    )
    for c in found:
        assert c.is_async, c
        assert batches_beside(step, c) - {c.nano_batch}, f"L{c.layer}/{c.op}.{c.nano_batch} is beside {c.beside}"


def test_the_last_all_reduce_runs_beside_the_next_layer() -> None:
    rows = {(c.layer, c.op, c.nano_batch): c.beside for c in inner(inspected("nanoflow_70b"))}
    assert {"L2/KQV.1", "L2/KQV.2", "L2/GEMV.1", "L2/GEMV.2"} <= set(rows[1, "D.AR", 2])
    assert {"L1/KQV.3", "L1/KQV.4"} <= set(rows[1, "GEMV.AG", 1])


@pytest.mark.parametrize("plan", ["nanoflow_70b", "scatter_70b"])
def test_nothing_is_merged_copied_or_unknown(plan: str) -> None:
    bad = {"merged_gemm", "merged_collective", "weight_copy", "kv_copy", "transpose_before_collective"}
    untraced = {"untraced_gemm", "untraced_collective", "untraced_kernel"}
    assert not kinds(inspected(plan)) & (bad | untraced | {"unknown_hlo"})


def test_an_a100_keeps_the_residual_in_bfloat16() -> None:
    """It adds in float32, and XLA would store that sum for the norm. The widest kernel between two GEMMs is the
    addition: two reads and a write of the larger nano-batch. Nothing large is left without its op."""
    step = inspected("nanoflow_70b", layers=3, gpu="a100_sxm_80")
    between = [e for e in step.report.timeline.events if e.kind == "elementwise" and e.piece and e.piece.layer == 1]
    assert max(e.bytes for e in between) == 3 * 1408 * HIDDEN * BYTES
    assert not kinds(step) & {"untraced_gemm", "untraced_collective", "untraced_kernel", "kv_copy", "weight_copy"}


def test_attention_on_a_stream_of_its_own() -> None:
    """The lane: every GEMV leaves the main stream, collectives stay covered, and no page is copied although attention
    still reads pages while later ones are computed."""
    step = inspected("nanoflow_70b_streams")
    assert step.attention_backend == "mosaic"
    streams = {(e.piece.op, e.stream) for e in step.report.timeline.events if e.kind == "attention" and e.piece}
    main = {stream for op, stream in streams if op == "PF"}
    assert not main & {stream for op, stream in streams if op == "GEMV"}
    (first,) = (e for e in step.report.timeline.events if e.label == "L1/GEMV.1" and e.kind == "attention")
    assert first.us == pytest.approx(MODEL.decode_attention(256, 1024, 8, 1, 128, sms=48).us)  # it keeps its SMs
    assert all(c.is_async and batches_beside(step, c) - {c.nano_batch} for c in inner(step))
    assert not kinds(step) & {"kv_copy", "weight_copy", "merged_gemm", "merged_collective", "unknown_hlo"}


def mosaic_calls(step: StepInspection) -> list[tuple[str, str, float | None]]:
    """(kernel, op piece, microseconds that the scheduler is told) of every Mosaic call in the program."""
    calls = [i for c in parse(step.hlo).computations.values() for i in c.instructions if i.target.startswith(MOSAIC)]
    kernels = ("decode_attention", "prefill_attention", "append_kv", "add_rms_norm")
    named = [(next(k for k in kernels if f"jit({k})" in i.op_name), i) for i in calls]
    return [(kernel, f"{i.piece.op}.{i.piece.piece}", expected_us(i)) for kernel, i in named if i.piece]


def table_us(kernel: str, rows: int, item: int = 2) -> float:
    """By hand: 1024 tokens of context per row, 8 query heads on one KV head of 128; the table's rate for an H200."""
    start, rate = 3.0, {"append_kv": 3.3e12, "decode_attention": 3.96e12 if item == 2 else 3.5e12}
    if kernel == "add_rms_norm":
        return start + 4 * rows * HIDDEN * BYTES / 3.96e12 * 1e6
    if kernel == "prefill_attention":
        return start + 4 * rows * 1024 * 8 * 128 / (600e12 * rows / 16 / 132) * 1e6  # tiles of 16 rows, one per SM
    if kernel == "append_kv":
        return start + rows * (4 * 128 * item + 8) / rate[kernel] * 1e6
    return start + rows * (2 * 1024 * 128 * item + 2 * 8 * 128 * 2) / rate[kernel] * 1e6


@pytest.mark.parametrize("pages", ["auto", "fp8"])
def test_the_scheduler_is_told_what_every_mosaic_kernel_takes(pages: str) -> None:
    """The real step holds the plan's kernels, each with the tuning table's time; over fp8 pages prefill is XLA's. No
    page is copied, and fp8 pages hold twice as many tokens."""
    step = inspected("nanoflow_70b") if pages == "auto" else fp8_step()
    rows = {p.name: p.rows for p in step.pieces}
    found = mosaic_calls(step)
    # Two nano-batches, each ahead of attention (but in the first layer: nothing is added yet) and of the MLP.
    norms = [(piece, us) for name, piece, us in found if name == "add_rms_norm"]
    assert Counter(piece for piece, _ in norms) == {
        "KQV.1": step.layers - 1, "KQV.3": step.layers - 1, "UG.1": step.layers, "UG.2": step.layers
    }  # fmt: skip
    for piece, us in norms:
        assert us == pytest.approx(table_us("add_rms_norm", 640 if piece.endswith(".1") else 1408), abs=1e-3)
    wanted = {"decode_attention": ("GEMV", 4), "prefill_attention": ("PF", 0 if pages == "fp8" else 1)}
    for kernel, (op, per_layer) in {**wanted, "append_kv": ("KV.APPEND", 4)}.items():
        calls = [(piece, us) for name, piece, us in found if name == kernel]
        assert len(calls) == per_layer * step.layers
        for piece, us in calls:
            assert piece.startswith(op)
            count = rows[piece.replace("KV.APPEND", "KQV")]
            assert us == pytest.approx(table_us(kernel, count, 1 if pages == "fp8" else 2), abs=1e-3)
    assert len(found) == sum(i.count('custom_call_target="mosaic_gpu') for i in step.hlo.splitlines())
    assert "kv_copy" not in kinds(step)
    if pages == "fp8":
        assert re.search(r"custom-call\(.*mosaic_gpu.*f8e4m3fn\[\d+,64,128\]", step.hlo)
        assert step.memory.kv_bytes_per_token == 80 * 2 * 128
        assert step.memory.kv_tokens == pytest.approx(2 * inspected("nanoflow_70b").memory.kv_tokens, rel=0.01)


def test_the_inspector_times_attention_by_the_latency_model() -> None:
    """As the simulator does, so that both say the same of a plan."""
    events = inspected("nanoflow_70b").report.timeline.events
    us = {
        f"{e.piece.op}.{e.piece.piece}": e.alone_us
        for e in events
        if e.kind == "attention" and e.piece and e.piece.layer == 1
    }
    assert us["GEMV.1"] == pytest.approx(MODEL.decode_attention(256, 1024, 8, 1, 128).us, abs=1e-3)
    assert us["PF.1"] == pytest.approx(MODEL.prefill_attention(768, 1024, 8, 1, 128).us, abs=1e-3)


class Free(RooflineModel):
    """Ops side by side cost nothing."""

    def rate(self, kind: str, share: float, beside: str) -> Rate:
        return Rate(1.0, "free")


def simulated(plan: str, model: RooflineModel = MODEL) -> Simulation:
    load = StepLoad(TOKENS * 5 // 8, TOKENS * 3 // 8, 1024, 1024)
    return simulate_step(load_plan(plan), model_config("llama-3.1-70b")[1], model, DEVICES, load)


def alone(events: Iterable[Event], layer: int) -> dict[str, float]:
    """Microseconds of a layer's ops alone, by kind; of GEMMs, attention, appends and collectives by op too."""
    total: dict[str, float] = defaultdict(float)
    for e in events:
        if e.piece and e.piece.layer == layer:
            total[e.kind if e.kind == "elementwise" else f"{e.kind} {e.piece.op}.{e.piece.piece}"] += e.alone_us
    return dict(total)


AGREE = 0.01  # of a layer: the small kernels that XLA makes and the simulator does not have


@pytest.mark.parametrize("plan", ["nanoflow_70b", "scatter_70b", "two_gather_one_reduce", "two_all_reduce"])
def test_the_simulator_and_the_inspector_predict_the_same(plan: str) -> None:
    """Of the same plan at the same rows and context, both have the same GEMMs, attention, appends and collectives, each
    of the same length. The compiled program has a few small kernels more, which make a layer up to 1 % longer: rows of
    several pieces that are joined for O, GEMV.AG and prefill attention."""
    step, simulation = inspected(plan), simulated(plan)
    compiled, made = step.inner_layer, simulation.inner
    ours, theirs = alone(step.report.timeline.events, 2), alone(simulation.timeline.events, 3)
    small = ours.pop("elementwise") - theirs.pop("elementwise")
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert compiled.compute_us == pytest.approx(made.compute_us, rel=1e-6)
    assert compiled.network_us == pytest.approx(made.network_us, rel=1e-6)
    assert compiled.memory_us - made.memory_us == pytest.approx(small)
    assert 1 < compiled.us / made.us < 1 + AGREE
    assert compiled.us - made.us < small + 1  # no more than those kernels: what is lost beside others is the same
    assert compiled.interference_us == pytest.approx(made.interference_us, abs=0.01 * made.us)
    assert 1 < step.report.totals.us / simulation.us < 1 + AGREE  # and of the whole step, ends included


def test_few_small_kernels_are_left() -> None:
    """What an inner layer has beside GEMMs, attention and collectives: a norm with its addition for each nano-batch
    ahead of attention and of the MLP, RoPE and append of each KQV piece, SiLU, and joined rows for O, PF, GEMV.AG."""
    found = {small.op: small.count for small in inspected("nanoflow_70b").inner_layer.small}
    assert found == {"KQV": 2 + 4, "KV.APPEND": 4, "UG": 2 + 2, "O": 1, "PF": 1, "GEMV.AG": 1}
    xla = inspected("nanoflow_70b", layers=3, gpu="a100_sxm_80").inner_layer.small  # the twin without those kernels
    assert sum(small.count for small in xla) > 30


def test_they_do_not_where_one_of_them_counts_no_interference() -> None:
    """The broken twins: without it a plan that overlaps is far too short; one that does not is as it was."""
    free = Free(MODEL.hardware)
    step = inspected("nanoflow_70b")
    costs = kernel_costs(model_config("llama-3.1-70b")[1], step.plan, step.pieces, DEVICES, 1024, MODEL)
    unslowed = inspect_compiled(step.hlo, None, MODEL.hardware, DEVICES, costs=costs, latency=free)
    assert not 1 < InspectedLayer.of_report(unslowed).us / simulated("nanoflow_70b").inner.us < 1 + AGREE
    assert not 1 < step.inner_layer.us / simulated("nanoflow_70b", free).inner.us < 1 + AGREE
    assert 1 < inspected("two_all_reduce").inner_layer.us / simulated("two_all_reduce", free).inner.us < 1 + AGREE


def test_70b_fits_eight_h200() -> None:
    """The published size over eight devices, plus the second layout of O; more than a million tokens of KV are left."""
    memory = inspected("nanoflow_70b").memory
    o_layout = 80 * HIDDEN * HIDDEN * BYTES / DEVICES
    assert memory.weights == pytest.approx(70.55e9 * BYTES / DEVICES + o_layout, rel=0.01)
    assert memory.temporaries < 2 * 2**30
    assert memory.kv_tokens > 1e6
    assert memory.kv_bytes_per_token == 80 * 2 * 128 * BYTES


def test_one_nano_batch_is_reported_as_exposed() -> None:
    """The twin with nothing to run beside: every collective of every layer is a finding, and the network is waited
    for."""
    step, split = inspected("two_all_reduce"), inspected("nanoflow_70b")
    reported = {
        (f.layer, f.op) for f in step.report.findings if f.kind in ("synchronous_collective", "exposed_collective")
    }
    assert {(layer, op) for layer in INNER for op in ("O.AR", "D.AR")} <= reported
    waits = {layer.layer: layer for layer in step.report.totals.layers}
    for layer in INNER:
        assert waits[layer].exposed_network_us == pytest.approx(waits[layer].network_us, rel=0.05)
    assert step.report.totals.exposed_network_us > 3 * split.report.totals.exposed_network_us


def test_the_dot_merger_is_reported() -> None:
    """The twin with XLA's defaults and no enforced order: the nano-batches' GEMMs become one, and the inspector says
    so."""
    step = inspected("nanoflow_70b", order=False, merger_mb=32)
    assert "merged_gemm" in kinds(step)
    assert "merged_gemm" not in kinds(inspected("nanoflow_70b"))


def test_collectives_move_the_bytes_of_the_closed_form() -> None:
    """2 AG + 1 AR and 2 AR: an all-gather of [n, H] carries what half an all-reduce does, so both send the same bytes.

    Whole tensors, MiB per layer: n * H * 2 bytes each. On the wire, an all-reduce sends twice its tensor, an
    all-gather and a reduce-scatter once (times 7/8).
    """
    whole = TOKENS * HIDDEN * BYTES / 2**20
    gather, reduce_ = inspected("two_gather_one_reduce"), inspected("two_all_reduce")
    assert moved(gather) == {"GEMV.AG": whole, "O.AG": whole, "D.AR": whole}
    assert moved(reduce_) == {"O.AR": whole, "D.AR": whole}
    wire = {"AG": 1, "RS": 1, "AR": 2}

    def sent(step: StepInspection) -> float:
        return sum(mib * wire[op.split(".")[-1]] for op, mib in moved(step).items())

    assert sent(gather) == sent(reduce_) == 4 * whole
    first, second = 640 / TOKENS * whole, 1408 / TOKENS * whole
    mixed = {"GEMV.AG": first, "O.AG": first, "O.AR": second, "D.AR": whole}
    assert moved(inspected("nanoflow_70b")) == mixed
    assert sent(inspected("nanoflow_70b")) == 4 * whole
    assert moved(inspected("scatter_70b")) == dict.fromkeys(("O.RS", "O.AG", "D.RS", "D.AG"), whole)
