"""What would stop a step at its first run on a GPU, or make the host wait for it, read from the compiled program: one
rank of eight of LLaMA-3.1-70B, and 8B on one GPU, with two narrow layers, real heads and the engine's step shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest

from nanoflow_jax.engine.engine import step_shapes
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.compiled import compile_absent
from nanoflow_jax.inspect.gpu_target import gpu_mesh
from nanoflow_jax.inspect.report import Report, inspect_compiled
from nanoflow_jax.inspect.thunks import Thunks, parse_thunks
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.params import rank_infos
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.plan.plan import row_quantum
from nanoflow_jax.step.compile import Option, Program
from nanoflow_jax.step.extras import LARGEST, Extra
from nanoflow_jax.step.slots import BIAS_ROWS, SlotSizes
from nanoflow_jax.step.trace import StepSpec

PAGE, PAGES = 64, 2000
ROW_PAGES = 17  # odd, so that a row of a page table is no multiple of anything


@dataclass(frozen=True)
class Case:
    """rank: of so many devices, 1 is a whole model; devices: of the mesh. slots: the engine's, which give the step
    shapes; `shape` is which of these. extra: what is looked at after the step, instead of it."""

    model: str
    rank: int
    plan: str
    slots: int
    shape: int
    pages: str = "auto"
    gpu: str = "h100_sxm"
    devices: int = 1
    extra: Extra | None = None


# Every kind of plan and every step shape, few decode rows (0 to 2) or all (3 to 5), with no prefill, some or much.
CASES = (
    Case("llama-3.1-70b", 8, "nanoflow_70b", 1280, 5),
    Case("llama-3.1-70b", 8, "nanoflow_70b", 1280, 2, "fp8", "h200"),
    Case("llama-3.1-70b", 8, "auto_llama_3_1_70b_8xh100_sxm_d768", 768, 4),
    Case("llama-3.1-70b", 8, "scatter_70b", 768, 1),
    Case("llama-3.1-70b", 8, "auto_llama_3_1_70b_8xh200", 1280, 3, gpu="h200"),
    Case("llama-3.1-8b", 1, "two_gather_one_reduce", 256, 5),
    Case("llama-3.1-8b", 1, "sequential", 96, 0, "fp8"),
    *(Case("llama-3.1-8b", 1, "sequential", 96, 5, extra=extra) for extra in LARGEST),
)
# With collectives, or kernels on streams of their own, a program is more than one launch.
SEVERAL = (
    Case("llama-3.1-70b", 1, "nanoflow_70b", 768, 5, devices=8),
    Case("llama-3.1-8b", 1, "nanoflow_8b", 512, 5),
    *(Case("llama-3.1-70b", 1, "nanoflow_70b", 768, 5, devices=8, extra=extra) for extra in LARGEST),
)


@cache
def compiled(case: Case, *options: tuple[str, Option]) -> tuple[Report, Thunks]:
    hardware, plan = load_hardware(case.gpu), load_plan(case.plan)
    config = replace(
        model_config(case.model)[1], dtype="bfloat16", num_layers=2, hidden_size=1024, intermediate_size=2048,
        vocab_size=4096,
    )  # fmt: skip
    mesh, rank = gpu_mesh(hardware, case.devices), case.rank if case.rank > 1 else None
    scales = None if case.pages == "auto" else {}
    devices = max(case.rank, case.devices)
    infos: Any = param_infos(config, devices, plan.layouts(config, devices), kv_scales=scales)
    infos = rank_infos(infos, case.rank) if rank else infos
    shape = step_shapes(2048, case.slots, ROW_PAGES, row_quantum(devices))[case.shape]
    ordered = devices > 1 or bool(plan.lanes)
    spec = StepSpec(config, plan, shape, "mosaic", case.pages, enforce_order=ordered, rank_of=rank)
    program = Program(spec, mesh, infos, SlotSizes(case.slots, BIAS_ROWS, ROW_PAGES), PAGES, PAGE)
    traced = program.trace_extra(case.extra, shape) if case.extra else program.trace(shape)
    plan, ordered = (None, False) if case.extra else (plan, ordered)
    found = compile_absent(traced, hardware, plan, pin_starts=ordered, options=dict(options))
    assert found.thunks is not None
    return inspect_compiled(found.hlo, None, hardware, case.devices), found.thunks


def name_of(case: Case) -> str:
    what = f"{case.plan}-{case.shape}-{case.pages}-{case.devices}"
    return f"{what}-{type(case.extra).__name__}" if case.extra else what


@pytest.mark.aot
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_it_can_run_and_nobody_waits(case: Case) -> None:
    """No address that a Mosaic kernel refuses; one launch, so that the host is free as soon as a step is dispatched."""
    report, thunks = compiled(case)
    assert [f for f in report.findings if f.kind in ("misaligned_slice", "unknown_hlo")] == []
    assert thunks == Thunks(1, {})


@pytest.mark.aot
@pytest.mark.parametrize("case", SEVERAL, ids=name_of)
def test_nobody_waits_on_several_gpus_and_beside_a_lane(case: Case) -> None:
    """Not one launch, but no conditional among them."""
    report, thunks = compiled(case)
    assert [f for f in report.findings if f.kind in ("misaligned_slice", "unknown_hlo")] == []
    assert thunks.host_waits == 0
    assert sum(thunks.outside.values()) > 0


@pytest.mark.aot
def test_a_conditional_outside_of_a_command_buffer_makes_the_host_wait() -> None:
    """The twin: bias and penalties are conditionals, and XLA's own list of what a command buffer takes has none."""
    plain = ("xla_gpu_enable_command_buffer", "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION")
    _, thunks = compiled(CASES[-3], plain)
    assert thunks.host_waits >= 2
    assert thunks.outside["Conditional"] >= 2


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
    loop = "0: kWhile [source | sink]\n"
    known, unknown = (
        f"%w = s32[] while(%t){more}\n" for more in (', backend_config={"known_trip_count":{"n":"8"}}', "")
    )
    assert parse_thunks(loop).host_waits == parse_thunks(loop, known + unknown).host_waits == 1
    assert parse_thunks(loop, known) == Thunks(0, {"CountedWhile": 1})
    assert parse_thunks(loop, known).host_waits == 0
    with pytest.raises(ValueError, match="not the dump"):
        parse_thunks("HloModule jit_step")
