"""From names to a report: compile the real step of a model and a plan for a GPU that need not be there, and inspect
it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.cost.demand import StepLoad
from nanoflow_jax.cost.footprint import kv_bytes_per_token, page_bytes, weight_bytes
from nanoflow_jax.cost.latency import LatencyModel, Prediction, RooflineModel
from nanoflow_jax.cost.shapes import OpCosts, Shapes, optimum
from nanoflow_jax.hardware import Hardware, load_hardware
from nanoflow_jax.inspect.compiled import compile_absent
from nanoflow_jax.inspect.gpu_target import gpu_mesh
from nanoflow_jax.inspect.report import GIB, Report, inspect_compiled, render
from nanoflow_jax.inspect.small import SmallKernels, small_kernels
from nanoflow_jax.inspect.small import text as small_text
from nanoflow_jax.inspect.thunks import Thunks
from nanoflow_jax.inspect.versions import compiler_versions
from nanoflow_jax.inspect.versions import text as versions_text
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.layout import kv_groups, page_tables
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.parallel.mesh import check_divides
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.plan.known import check_sms
from nanoflow_jax.plan.ops import APPEND
from nanoflow_jax.plan.plan import OpPiece, SchedulePlan, row_quantum
from nanoflow_jax.step.attention import check_quantization, choose_backend, page_dtype
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.compile import Option, Program, step_bytes
from nanoflow_jax.step.slots import BIAS_ROWS, SlotSizes
from nanoflow_jax.step.trace import StepSpec
from nanoflow_jax.timeline.totals import InnerLayer, of_all_layers, whole_periods

PAGE_SIZE = 64
MEMORY_UTILIZATION = 0.9


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one GPU. kv_pages: the pool the step was compiled with; temporaries: of the layers compiled, and all
    layers may need more, with what the step leaves to the programs after it; kv_tokens: how many tokens fit beside
    weights and temporaries in `MEMORY_UTILIZATION` of the memory, at kv_bytes_per_token, the mean of requests of the
    context; headroom: what is then left without any page (negative: the model does not fit)."""

    weights: int
    kv_pages: int
    temporaries: int
    device: int
    headroom: int
    kv_bytes_per_token: int
    kv_tokens: int


@dataclass(frozen=True)
class InspectedLayer(InnerLayer):
    """The layers between the first and the last, or all when there is none between.

    collectives, findings: how many; bytes: of the collectives' whole tensors; wire_bytes: what each GPU sends for them;
    small: the kernels beside GEMMs, attention and collectives, by op.
    """

    collectives: float
    bytes: float
    wire_bytes: float
    findings: float
    small: tuple[SmallKernels, ...]

    @staticmethod
    def of_report(report: Report, period: int = 1) -> InspectedLayer:
        """period: of the kinds of layers."""
        every = [layer.layer for layer in report.totals.layers if layer.layer is not None]
        inner = InnerLayer.of(report.totals, whole_periods(every[1:-1] or every, period))
        moved = [c for c in report.collectives if c.layer in inner.layers]
        found = [f for f in report.findings if f.layer in inner.layers]
        count = len(inner.layers)
        return InspectedLayer(
            **vars(inner),
            collectives=len(moved) / count,
            bytes=sum(c.bytes for c in moved) / count,
            wire_bytes=sum(c.wire_bytes for c in moved) / count,
            findings=len(found) / count,
            small=small_kernels(report.timeline, inner.layers),
        )


@dataclass(frozen=True)
class StepInspection:
    """A report with what it was made from. `layers`: layers compiled; totals of a shortened model are scaled to all
    of them."""

    model: str
    plan: SchedulePlan
    hardware: Hardware
    devices: int
    tokens: int
    decode_tokens: int
    context: int
    attention_backend: str
    kv_cache_dtype: str
    layers: int
    model_layers: int
    period: int  # of the kinds of layers
    experts: bool  # some layers have them
    compile_seconds: float  # when it was compiled: the program may have been kept
    memory: StepMemory
    report: Report
    hlo: str
    thunks: Thunks | None  # None: this XLA does not say
    versions: Mapping[str, str]  # of what compiled it

    @property
    def pieces(self) -> tuple[OpPiece, ...]:
        """The plan's op pieces at this step's size, in issue order."""
        return self.plan.pieces(
            self.decode_tokens, self.tokens - self.decode_tokens, row_quantum(self.devices), experts=self.experts
        )

    @property
    def nano_batches(self) -> dict[tuple[str, int], int]:
        """The nano-batch of each (op, piece)."""
        return {(piece.op, piece.piece): piece.nano_batch for piece in self.pieces}

    @property
    def inner_layer(self) -> InspectedLayer:
        return InspectedLayer.of_report(self.report, self.period)

    def to_json(self) -> dict[str, Any]:
        data = self.report.to_json()
        data["memory"] = asdict(self.memory)
        data["inner_layer"] = asdict(self.inner_layer)
        data["versions"] = dict(self.versions)
        data["thunks"] = None if self.thunks is None else {**asdict(self.thunks), "host_waits": self.thunks.host_waits}
        names = (
            "model",
            "devices",
            "tokens",
            "decode_tokens",
            "context",
            "attention_backend",
            "kv_cache_dtype",
            "layers",
            "model_layers",
            "compile_seconds",
        )
        return {**{name: getattr(self, name) for name in names}, "plan": self.plan.name, **data}

    def text(self) -> str:
        """For a terminal: what was compiled, the report, the memory."""
        m = self.memory
        whole = self.layers == self.model_layers
        shortened = "" if whole else f", {self.layers} of its {self.model_layers} layers compiled"
        only = "" if whole else f" (of {self.layers} layers; all {self.model_layers} may need more)"
        return "\n".join(
            [
                f"{self.model}, plan {self.plan.name}, "
                f"{self.decode_tokens} decode + {self.tokens - self.decode_tokens} prefill tokens, "
                f"decode attention {self.attention_backend}, KV pages {self.kv_cache_dtype}, "
                f"context {self.context}{shortened} ({self.compile_seconds:.0f} s)",
                versions_text(self.versions),
                render(self.report),
                f"{self.inner_layer.text()}; findings {self.inner_layer.findings:g}",
                small_text(self.inner_layer.small),
                f"memory per GPU, GiB: weights {m.weights / GIB:.2f}, temporaries {m.temporaries / GIB:.2f}{only}, "
                f"device {m.device / GIB:.1f}; at {MEMORY_UTILIZATION:.0%} of it {m.headroom / GIB:.2f} are left for "
                f"KV: {m.kv_tokens:,} tokens",
                *([] if self.thunks is None else [self.thunks.text()]),
            ]
        )


def inspect_step(
    model: str,
    gpu: str | Hardware,
    plan: str | SchedulePlan,
    *,
    devices: int = 8,
    tokens: int = 2048,
    decode_tokens: int | None = None,
    context: int = 1024,
    layers: int | None = None,
    attention_backend: str = "auto",
    kv_cache_dtype: str = "auto",
    quantization: str | None = None,
    options: Mapping[str, Option] | None = None,
    enforce_order: bool = True,
    latency: LatencyModel | None = None,
) -> StepInspection:
    """Compiles one step and reports on it.

    model, gpu, plan  names in `configs/`, or paths of the user's own files
    tokens            rows of the step, decode_tokens of them decode (default: the plan's own, else 5/8)
    context           tokens of context that each row attends to, for the cost of attention (the program does not
                      depend on it)
    layers            compile only this many layers (they repeat, and 80 take minutes; two more than a period of their
                      kinds show each kind); None: all
    attention_backend of decode attention: "mosaic" on Hopper, "xla"; "auto" takes Mosaic where the GPU has it
    kv_cache_dtype    of the KV pages: "auto" (the model's), "fp8" or "fp8_e4m3"
    quantization      of the layers' weights: None (the model's), or "fp8"
    options           compiler options added to, or replacing, the project's own
    enforce_order     False leaves the issue order to XLA
    latency           the model that times ops; None: the roofline of the GPU's figures

    Raises ConfigError naming what cannot be used.
    """
    name, full = model_config(model)
    dtype, quantization = "bfloat16" if full.dtype == "float16" else full.dtype, quantization or full.quantization
    full = replace(full, dtype=dtype, quantization=quantization)
    check_quantization(full, load_hardware(gpu).capability if isinstance(gpu, str) else gpu.capability)
    plan = load_plan(plan) if isinstance(plan, str) else plan
    hardware = load_hardware(gpu) if isinstance(gpu, str) else gpu
    check_sms(plan, hardware)
    check_divides(full, devices)
    config = replace(full, num_layers=layers or full.num_layers)
    if not 1 <= config.num_layers <= full.num_layers:
        raise ConfigError(f"layers: {layers} is not accepted; it must be from 1 to the model's {full.num_layers}")
    if decode_tokens is None:
        exact = plan.tokens_per_step == tokens and plan.decode_tokens is not None
        decode_tokens = plan.decode_tokens if exact else tokens * 5 // 8 // row_quantum(devices) * row_quantum(devices)
    assert decode_tokens is not None
    if tokens < 1 or context < 1:
        raise ConfigError(f"tokens: {tokens} and context: {context} must be at least 1")
    if not 0 <= decode_tokens <= tokens:
        raise ConfigError(f"decode_tokens: {decode_tokens} must be from 0 to tokens = {tokens}")
    prefill = tokens - decode_tokens
    shape = StepShape(
        decode_tokens, prefill, max(1, min(64, prefill // 16)) if prefill else 0, -(-context // PAGE_SIZE) + 1,
        page_tables(config).count,
    )  # fmt: skip

    pages_dtype = page_dtype(config, kv_cache_dtype)
    attention_backend = choose_backend(attention_backend, config, hardware.capability, PAGE_SIZE)
    kv_scales = None if kv_cache_dtype == "auto" else {}
    infos = param_infos(config, devices, plan.layouts(config, devices), kv_scales=kv_scales)
    weights = weight_bytes(infos, devices)
    item = pages_dtype.itemsize
    page = page_bytes(config, devices, PAGE_SIZE, item)
    pool = max(int(hardware.memory_bytes * MEMORY_UTILIZATION - weights) * 3 // 4 // page, 16)
    rows = PAGE_SIZE * kv_groups(config, devices) // devices * page_tables(config).depth  # of a page, 32 bits count
    pages = min(pool, (2**31 - 1) // rows)

    mesh = gpu_mesh(hardware, devices)
    spec = StepSpec(
        config, plan, shape, attention_backend, kv_cache_dtype, enforce_order=enforce_order, expected_context=context
    )
    sizes = SlotSizes(max(decode_tokens, 1), BIAS_ROWS, shape.table_width)
    traced = Program(spec, mesh, infos, sizes, pages, PAGE_SIZE).trace(shape)
    compiled = compile_absent(traced, hardware, plan, pin_starts=enforce_order, options=options)
    latency = latency or RooflineModel(hardware)
    pieces = plan.pieces(decode_tokens, prefill, row_quantum(devices), experts=config.experts is not None)
    lanes = plan.lanes if attention_backend == "mosaic" else {}  # elsewhere a plan's lanes are ignored
    budgets = {op: lane.sms for op, lane in lanes.items() if lane.sms}
    report = inspect_compiled(
        compiled.hlo,
        compiled.memory,
        hardware,
        devices,
        costs=kernel_costs(config, plan, pieces, devices, context, latency, item, budgets.get("GEMV")),
        latency=latency,
        budgets=budgets,
    )
    best = optimum(full, hardware, calibrated=True)
    inner = InspectedLayer.of_report(report, len(full.pattern))
    totals = of_all_layers(report.totals, inner, full.num_layers, devices, tokens, best)
    report = replace(report, totals=totals)
    memory = _memory(full, plan, hardware, devices, step_bytes(compiled), pages * page, item, context)
    return StepInspection(
        model=name,
        plan=plan,
        hardware=hardware,
        devices=devices,
        tokens=tokens,
        decode_tokens=decode_tokens,
        context=context,
        attention_backend=attention_backend,
        kv_cache_dtype=pages_dtype.name,
        layers=config.num_layers,
        model_layers=full.num_layers,
        period=len(full.pattern),
        experts=full.experts is not None,
        compile_seconds=compiled.seconds,
        memory=memory,
        report=report,
        hlo=compiled.hlo,
        thunks=compiled.thunks,
        versions=compiler_versions(),
    )


def _memory(
    config: ModelConfig,
    plan: SchedulePlan,
    hardware: Hardware,
    devices: int,
    temporaries: int,
    kv_pages: int,
    item: int,
    context: int,
) -> StepMemory:
    infos = param_infos(config, devices, plan.layouts(config, devices))
    weights = weight_bytes(infos, devices)
    per_token = round(kv_bytes_per_token(config, devices, item, context))
    headroom = int(hardware.memory_bytes * MEMORY_UTILIZATION) - weights - temporaries
    return StepMemory(
        weights, kv_pages, temporaries, hardware.memory_bytes, headroom, per_token, max(0, headroom // per_token)
    )


def kernel_costs(
    config: ModelConfig,
    plan: SchedulePlan,
    pieces: tuple[OpPiece, ...],
    devices: int,
    context: int,
    model: LatencyModel,
    item: int = 2,
    sms: int | None = None,
) -> dict[tuple[str, int], Prediction | list[Prediction | None]]:
    """Each attention piece of every layer, KV append, and what experts' kernels do in layers that have some, on one
    device; every row has `context` tokens before it. item: bytes of an element of the pages; sms: the most that decode
    attention uses, None: all."""
    load = StepLoad(1, 0, context, context)
    costs = OpCosts(model, Shapes.of(config, devices, item), load)
    layers, whole = range(config.num_layers), plan.whole_experts(config.experts, devices)
    found: dict[tuple[str, int], Prediction | list[Prediction | None]] = {}
    for piece in pieces:
        if piece.op == "KQV":
            found[APPEND, piece.piece] = costs.append(piece.rows)
        elif piece.op == "GEMV":
            found["GEMV", piece.piece] = [costs.decode_attention(piece.rows, sms, layer) for layer in layers]
        elif piece.op == "PF":
            found["PF", piece.piece] = [costs.prefill_attention(piece.rows, layer) for layer in layers]
        elif config.experts is not None and piece.op in ("UG", "D"):
            grouped = costs.grouped(piece.op, piece.rows, whole)
            found[piece.op, piece.piece] = [grouped if kind.mlp.experts else None for kind in config.layers]
        elif piece.op == "DISPATCH":
            found[piece.op, piece.piece] = costs.dispatch(piece.rows, whole)
        elif piece.op == "COMBINE":
            found[piece.op, piece.piece] = costs.combine(piece.rows, whole)
    return found
