"""LLaMA-3.1-8B at full size on one H200 and one H100, two layers compiled without either: decode attention really runs
beside GEMMs, from where the plan issues it, and nothing is wrong with the program."""

from __future__ import annotations

from functools import cache

import pytest

from nanoflow_jax.inspect.step import StepInspection, inspect_step
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.timeline.timeline import COMPUTE, Event

pytestmark = pytest.mark.aot

GPUS = ("h200", "h100_sxm")
HEAVY = ("gemm", "attention")


@cache
def inspected(gpu: str, name: str) -> StepInspection:
    size = load_plan(f"auto_llama_3_1_8b_1x{gpu}")
    return inspect_step(
        "llama-3.1-8b", gpu, name, devices=1, tokens=size.tokens_per_step or 0, decode_tokens=size.decode_tokens,
        context=1280, layers=2,
    )  # fmt: skip


def heavy(step: StepInspection, layer: int) -> dict[str, Event]:
    """GEMMs and attention of a layer, by piece, in the order in which they are issued."""
    events = [e for e in step.report.timeline.events if e.kind in HEAVY and e.piece and e.piece.layer == layer]
    return {f"{e.piece.op}.{e.piece.piece}": e for e in events if e.piece}


@pytest.mark.parametrize("gpu", GPUS)
def test_attention_runs_beside_gemms_from_where_it_is_issued(gpu: str) -> None:
    """On one device no collective makes XLA's scheduler look at the program: a start could be as late as what needs the
    result, with nothing beside it."""
    step = inspected(gpu, f"auto_llama_3_1_8b_1x{gpu}")
    pieces = {p.name: p for p in step.pieces}
    found = heavy(step, 1)
    assert set(found) == {name for name, p in pieces.items() if p.op in ("KQV", "GEMV", "PF", "O", "UG", "D")}
    order = [p.name for p in step.pieces if p.name in found]
    attention = [name for name in order if pieces[name].op == "GEMV"]
    assert attention
    for name in attention:
        own = found[name]
        assert own.stream != COMPUTE and own.us == pytest.approx(own.alone_us)
        following = next(other for other in order[order.index(name) + 1 :] if pieces[other].op != "GEMV")
        assert found[following].start_us < own.end_us, f"{name} starts after {following}"
    beside = [
        other for other in found.values() if other.kind == "gemm" and other.stream == COMPUTE
        for name in attention if other.start_us < found[name].end_us and found[name].start_us < other.end_us
    ]  # fmt: skip
    assert {e.piece.op for e in beside if e.piece} >= {"O", "UG", "D"}
    assert sum(e.us - e.alone_us for e in beside) > 0  # and the GEMMs are slowed by it


def test_nothing_is_found_and_it_gains() -> None:
    plan, plain = (inspected("h200", name) for name in ("auto_llama_3_1_8b_1xh200", "sequential"))
    assert {f.kind for f in plan.report.findings} <= {f.kind for f in plain.report.findings}
    assert not {f.kind for f in plan.report.findings} & {"kv_copy", "weight_copy", "merged_gemm", "unknown_hlo"}
    assert plain.inner_layer.us / plan.inner_layer.us > 1.08
    assert not plan.report.collectives
