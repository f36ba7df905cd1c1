"""LLaMA-70B with fp8 weights, compiled for GPUs that are not there: every GEMM of a layer is an fp8 one, nothing makes
another copy of a weight, and it fits where bfloat16 does not."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from nanoflow_jax.config import ConfigError
from nanoflow_jax.cost.demand import StepLoad
from nanoflow_jax.cost.latency import RooflineModel
from nanoflow_jax.inspect.step import StepInspection, inspect_step
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.plan.plan import NanoBatch, SchedulePlan
from nanoflow_jax.search.simulate import simulate_step

pytestmark = pytest.mark.aot
MODEL, LAYERS = "llama-3.1-70b", 3
WIDE = re.compile(r"= \(?(?:bf16|f16|f32)\[([\d,]+)\]")
HIDDEN, FFN, KQV = 8192, 28672, 10240


def wide_weights(hlo: str, devices: int) -> list[str]:
    """Instructions with the shape of a layer's weight in more than a byte, in any order of its dimensions."""
    shapes = [
        (KQV // devices, HIDDEN),
        (HIDDEN, HIDDEN // devices),
        (2 * FFN // devices, HIDDEN),
        (HIDDEN, FFN // devices),
    ]
    wanted = {tuple(sorted(shape)) for shape in shapes}
    found = []
    for line in hlo.splitlines():
        match = WIDE.search(line)
        if match and tuple(sorted(int(n) for n in match.group(1).split(",") if n != "1")) in wanted:
            found.append(line.strip()[:120])
    return found


def inspected(gpu: str, plan: str, devices: int, quantization: str | None = "fp8") -> StepInspection:
    return inspect_step(MODEL, gpu, plan, devices=devices, layers=LAYERS, quantization=quantization)


def check_gemms(found: StepInspection, devices: int, pieces: int) -> None:
    """pieces: GEMMs of a layer. The head stays in bfloat16."""
    targets = re.findall(r'custom_call_target="(__cublas[^"]*)"', found.hlo)
    assert targets.count("__cublas$lt$matmul$f8") == pieces * LAYERS
    assert targets.count("__cublas$lt$matmul") == len(targets) - pieces * LAYERS == 1
    assert wide_weights(found.hlo, devices) == []
    kinds = {finding.kind for finding in found.report.findings}
    assert not kinds & {"weight_copy", "kv_copy", "merged_gemm", "untraced_gemm", "misaligned_slice"}, kinds


def test_every_gemm_of_a_layer_is_fp8() -> None:
    """And whole on one GPU; nanoflow_70b's cuts on eight are below."""
    plan = "sequential"
    found = inspected("h200", plan, 1)
    check_gemms(found, 1, pieces=4)
    plain = inspected("h200", plan, 1, None)
    assert "f8e4m3" not in plain.hlo and wide_weights(plain.hlo, 1)
    for step in (found, plain):
        load = StepLoad(step.decode_tokens, step.tokens - step.decode_tokens, step.context, step.context)
        config = replace(model_config(MODEL)[1], quantization="fp8" if step is found else None)
        simulated = simulate_step(load_plan(plan), config, RooflineModel(step.hardware), 1, load)
        assert simulated.inner.us == pytest.approx(step.inner_layer.us, rel=0.06)
    assert found.memory.weights < 0.55 * plain.memory.weights
    gained = found.report.totals.tokens_per_second_per_gpu, plain.report.totals.tokens_per_second_per_gpu
    assert gained[0] and gained[1] and gained[0] > 1.5 * gained[1]
    assert plain.memory.headroom < 0 < found.memory.headroom
    assert found.memory.kv_tokens > 150_000


# The cuts of nanoflow_70b, and both kinds of gathers.
FIRST, SECOND = 640, 1408
GATHERED = SchedulePlan(
    "gathered", (NanoBatch(FIRST, "gather"), NanoBatch(SECOND, "scatter")), "", FIRST + SECOND, 1280,
    splits=load_plan("nanoflow_70b").splits, gathers="fp8",
)  # fmt: skip


def test_gathers_in_fp8() -> None:
    """Of heads and of normed rows: one collective of values and scales, half the bytes, as the simulator counts them;
    what is added to the residual stays as it is. Every GEMM is an fp8 one here, too, and it pays."""
    found = inspect_step(MODEL, "h200", GATHERED, devices=8, layers=LAYERS, quantization="fp8")
    check_gemms(found, 8, pieces=10)
    starts = [line for line in found.hlo.splitlines() if re.search(r" all-gather(-start)?\(", line)]
    of = {op: [line for line in starts if f"/L1/{op}/" in line] for op in ("GEMV.AG.1", "O.AG.1", "O.AG.2", "D.AG.2")}
    assert {op: len(lines) for op, lines in of.items()} == dict.fromkeys(of, 1)
    for op, (line,) in of.items():
        assert ("f8e4m3fn[" in line, "f32[" in line, "bf16[" in line) == ((False, False, True) if op == "O.AG.1" else (
            True, True, False)), op  # fmt: skip
    gathered = {
        f"{c.op}.{c.nano_batch}": c.bytes for c in found.report.collectives if c.layer == 1 and c.kind == "all-gather"
    }
    heads, rows = FIRST * (HIDDEN + 8 * 4), SECOND * (HIDDEN + 4)  # a scale of each device's heads, or of a row
    assert gathered == {
        "GEMV.AG.1": heads, "O.AG.1": 2 * FIRST * HIDDEN, "O.AG.2": rows, "D.AG.2": rows
    }  # fmt: skip
    config = replace(model_config(MODEL)[1], quantization="fp8")
    load, model = StepLoad(1280, 768, found.context, found.context), RooflineModel(found.hardware)
    simulated = simulate_step(GATHERED, config, model, 8, load).inner
    assert simulated.network_us == pytest.approx(found.inner_layer.network_us, rel=1e-3)
    assert simulated.us == pytest.approx(found.inner_layer.us, rel=0.06)
    assert simulated.network_us < 0.85 * simulate_step(
        replace(GATHERED, gathers=None), config, model, 8, load
    ).inner.network_us  # fmt: skip
    plain = simulate_step(load_plan("nanoflow_70b"), replace(config, quantization=None), model, 8, load).inner.us
    assert found.inner_layer.us < plain
    bad = {"merged_collective", "transpose_before_collective", "weight_copy", "merged_gemm", "untraced_kernel"}
    assert not bad & {finding.kind for finding in found.report.findings if finding.layer is not None}


def test_two_h100_hold_it() -> None:
    """In bfloat16 its weights alone are 141 GB of their 170."""
    plan = load_plan("auto_llama_3_1_70b_2xh100_sxm_fp8_d96")
    assert plan.tokens_per_step and plan.gathers == "fp8"
    found = inspect_step(
        MODEL, "h100_sxm", plan, devices=2, tokens=plan.tokens_per_step, layers=LAYERS, quantization="fp8"
    )
    assert found.decode_tokens == plan.decode_tokens
    assert found.memory.weights < 37e9 and found.memory.kv_tokens > 200_000
    assert found.hlo.count('"__cublas$lt$matmul$f8"') == 8 * LAYERS
    assert wide_weights(found.hlo, 2) == []
    assert found.inner_layer.findings == 0
    assert not {"weight_copy", "kv_copy"} & {finding.kind for finding in found.report.findings}


def test_a_gpu_without_fp8_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^quantization: 'fp8' needs fp8 tensor cores .*, not 8\.0; accepted: None$"):
        inspected("a100_sxm_80", "sequential", 8)
