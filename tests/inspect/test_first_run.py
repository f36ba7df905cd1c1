"""What would stop a step at its first run on a GPU, or make the host wait for it, read from the compiled program: one
rank of eight of LLaMA-3.1-70B, and 8B on one GPU, with two narrow layers, real heads and the engine's step shapes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from nanoflow_jax.engine.engine import step_shapes
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.gpu_target import gpu_mesh, saving_options
from nanoflow_jax.inspect.report import Report, inspect_compiled
from nanoflow_jax.inspect.thunks import Thunks, dump_options, dumped_thunks, parse_thunks
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.params import rank_infos
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.plan.plan import load_plan, row_quantum
from nanoflow_jax.step.compile import Option, Program, compile_step
from nanoflow_jax.step.slots import BIAS_ROWS, SlotSizes
from nanoflow_jax.step.trace import StepSpec
from nanoflow_jax.system.platform import without_compile_cache

PAGE, PAGES = 64, 2000
ROW_PAGES = 17  # odd, so that a row of a page table is no multiple of anything


@dataclass(frozen=True)
class Case:
    """rank: of so many devices, 1 is a whole model. slots: the engine's, which give the step shapes; `shape` is which
    of these."""

    model: str
    rank: int
    plan: str
    slots: int
    shape: int
    pages: str = "auto"
    gpu: str = "h100_sxm"


# Every kind of plan and every step shape, few decode rows (0 to 2) or all (3 to 5), with no prefill, some or much.
CASES = (
    Case("llama-3.1-70b", 8, "nanoflow_70b", 1280, 5),
    Case("llama-3.1-70b", 8, "nanoflow_70b", 1280, 2, "fp8", "h200"),
    Case("llama-3.1-70b", 8, "auto_llama_3_1_70b_8xh100_sxm_d768", 768, 4),
    Case("llama-3.1-70b", 8, "scatter_70b", 768, 1),
    Case("llama-3.1-70b", 8, "auto_llama_3_1_70b_8xh200", 1280, 3, gpu="h200"),
    Case("llama-3.1-8b", 1, "two_gather_one_reduce", 256, 5),
    Case("llama-3.1-8b", 1, "sequential", 96, 0, "fp8"),
)


@cache
def compiled(case: Case, *options: tuple[str, Option]) -> tuple[Report, Thunks]:
    hardware, plan = load_hardware(case.gpu), load_plan(case.plan)
    config = replace(
        model_config(case.model)[1], dtype="bfloat16", num_layers=2, hidden_size=1024, intermediate_size=2048,
        vocab_size=4096,
    )  # fmt: skip
    mesh, rank = gpu_mesh(hardware, 1), case.rank if case.rank > 1 else None
    scales = None if case.pages == "auto" else {}
    infos: Any = param_infos(config, case.rank, plan.layouts(config, case.rank), kv_scales=scales)
    infos = rank_infos(infos, case.rank) if rank else infos
    shape = step_shapes(2048, case.slots, ROW_PAGES, row_quantum(case.rank))[case.shape]
    spec = StepSpec(config, plan, shape, "mosaic", case.pages, enforce_order=rank is not None, rank_of=rank)
    sizes = SlotSizes(case.slots, BIAS_ROWS, ROW_PAGES)
    lowered = Program(spec, mesh, infos, sizes, PAGES, PAGE).lower(spec.shape)
    with tempfile.TemporaryDirectory() as folder, without_compile_cache():
        chosen = {**saving_options(hardware), **dump_options(Path(folder)), **dict(options)}
        program = compile_step(lowered, "cuda", plan, pin_starts=rank is not None, options=chosen)
        thunks = dumped_thunks(Path(folder))
    assert thunks is not None
    return inspect_compiled(program.as_text(), None, hardware, 1), thunks


@pytest.mark.aot
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.plan}-{c.shape}-{c.pages}")
def test_it_can_run_and_nobody_waits(case: Case) -> None:
    """No address that a Mosaic kernel refuses; one launch, so that the host is free as soon as a step is dispatched."""
    report, thunks = compiled(case)
    assert [f for f in report.findings if f.kind in ("misaligned_slice", "unknown_hlo")] == []
    assert thunks == Thunks(1, {})


@pytest.mark.aot
def test_with_xlas_own_command_buffers_the_host_waits() -> None:
    """The twin: the sampler's and the log-probabilities' conditionals stand outside."""
    plain = ("xla_gpu_enable_command_buffer", "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION")
    _, thunks = compiled(CASES[0], plain)
    assert thunks.host_waits >= 3
    assert thunks.outside["Conditional"] == thunks.host_waits


def test_thunks_are_read_from_the_dump() -> None:
    text = (
        "000: kCommandBuffer  [source | next=2]\n"
        "    000: kConditional [source | sink]\n"
        "2: kConditional [prev=000 | sink]\n"
        "  false_branch:\n"
        "    000: kCommandBuffer [source | sink]\n"
        "\n"
        "3: kCublasLtMatmul [prev=2 | sink] kCublasLtMatmul\n"
    )
    thunks = parse_thunks(text)
    assert thunks == Thunks(1, {"Conditional": 1, "CublasLtMatmul": 1})
    assert thunks.host_waits == 1
    assert "1 Conditional, 1 CublasLtMatmul" in thunks.text()
    with pytest.raises(ValueError, match="not the dump"):
        parse_thunks("HloModule jit_step")
