"""What a plan gives on a workload: throughput, latency per token, and how many requests run at once, within the
memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.cost.demand import Demand, StepLoad
from nanoflow_jax.cost.footprint import request_kv_bytes, weight_bytes
from nanoflow_jax.cost.latency import LatencyModel
from nanoflow_jax.cost.shapes import BYTES, optimum
from nanoflow_jax.hardware import Hardware
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.plan.plan import NanoBatch, SchedulePlan, row_quantum
from nanoflow_jax.search.simulate import Simulation, simulate_step
from nanoflow_jax.step.attention import page_dtype

MEMORY_UTILIZATION = 0.9
RESIDUALS = 32  # temporaries of a step, in residuals [rows, H]: the compiled steps of docs/results need 13 to 30
STEP_SIZES = (512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)  # rows tried for the best step
TOKENS_PER_STEP = 2048  # where neither the plan nor the caller says


@dataclass(frozen=True)
class KVRoom:
    """Tokens of KV: how many fit beside weights and temporaries, and how many the step's requests hold."""

    capacity: int
    resident: int
    limits: bool  # fewer requests run than the step has rows for


@dataclass(frozen=True)
class Throughput:
    """A plan on a workload.

    quantization, kv_cache_dtype  of the layers' weights and of the KV pages, as `LLM` names them
    tokens_per_step  rows of the average step; decode_slots: those that decode, one per running request
    best             (tokens per step, decode slots, tokens/s/GPU) of the sizes tried, by throughput
    """

    model: str
    quantization: str | None
    kv_cache_dtype: str
    demand: Demand
    simulation: Simulation
    kv: KVRoom
    optimum: float
    data_sheet_optimum: float
    best: tuple[int, int, float]

    @property
    def latency_source(self) -> str:
        return "; ".join(self.simulation.sources)

    @property
    def step_ms(self) -> float:
        """A step's length, which is what each running request waits for its next token."""
        return self.simulation.us / 1e3

    @property
    def request_seconds(self) -> float:
        """From a request's first prompt row to its last token, without waiting: its share of the prefill rows, then a
        step per token."""
        load = self.simulation.load
        prompt_steps = self.demand.prefill_rows / load.prefill_rows if load.prefill_rows else 0.0
        return (max(1.0, prompt_steps) + self.demand.decode_rows) * self.step_ms / 1e3

    def to_json(self) -> dict[str, Any]:
        s, load = self.simulation, self.simulation.load
        rows, slots, rate = self.best
        return {
            "predicted": True,
            "model": self.model,
            "gpu": s.hardware,
            "devices": s.devices,
            "plan": s.plan.name,
            "quantization": self.quantization,
            "kv_cache_dtype": self.kv_cache_dtype,
            "workload": self.demand.name,
            "runtime": s.runtime,
            "expert_imbalance": s.imbalance,
            "tokens_per_second_per_gpu": s.tokens_per_second_per_gpu,
            "optimum_tokens_per_second_per_gpu": self.optimum,
            "share_of_optimum": s.tokens_per_second_per_gpu / self.optimum,
            "data_sheet_optimum_tokens_per_second_per_gpu": self.data_sheet_optimum,
            "bound_by": s.inner.bound_by,
            "latency_source": self.latency_source,
            "latency_per_token_ms": self.step_ms,
            "request_seconds": self.request_seconds,
            "tokens_per_step": load.rows,
            "decode_slots": load.decode_rows,
            "prefill_rows": load.prefill_rows,
            "decode_context": load.decode_context,
            "prefill_context": load.prefill_context,
            "kv_tokens": asdict(self.kv),
            "best": {"tokens_per_step": rows, "decode_slots": slots, "tokens_per_second_per_gpu": rate},
            "inner_layer": asdict(s.inner),
        }


def kv_capacity(
    config: ModelConfig, plan: SchedulePlan, hardware: Hardware, devices: int, rows: int,
    utilization: float = MEMORY_UTILIZATION, kv_cache_dtype: str = "auto", request: int = 1,
) -> int:  # fmt: skip
    """Tokens of KV that fit on `devices` GPUs beside weights and a step's temporaries; negative: the weights do not.

    kv_cache_dtype: of the pages, as `LLM` takes it; request: tokens of one, by which a token is priced
    """
    infos = param_infos(config, devices, plan.layouts(config, devices))
    left = hardware.memory_bytes * utilization - weight_bytes(infos, devices)
    temporaries = RESIDUALS * rows * config.hidden_size * BYTES[config.dtype]
    item = page_dtype(config, kv_cache_dtype).itemsize
    return int((left - temporaries) * request // request_kv_bytes(config, devices, item, request))


def average_step(
    config: ModelConfig, hardware: Hardware, devices: int, demand: Demand, rows: int, decode_slots: int | None = None,
    kv_cache_dtype: str = "auto",
) -> StepLoad:  # fmt: skip
    """A step of at most `rows` rows, as workload and memory allow it, for any plan that keeps one layout of O."""
    plain = SchedulePlan("plain", (NanoBatch(None, "reduce"),))
    capacity = kv_capacity(
        config, plain, hardware, devices, rows, kv_cache_dtype=kv_cache_dtype, request=round(demand.held)
    )
    return demand.step(rows, capacity, decode_slots, row_quantum(devices))


def predict(
    name: str,
    config: ModelConfig,
    plan: SchedulePlan,
    model: LatencyModel,
    devices: int,
    demand: Demand,
    *,
    tokens_per_step: int | None = None,
    decode_slots: int | None = None,
    runtime: str = "library",
    kv_cache_dtype: str = "auto",
    sizes: Sequence[int] = STEP_SIZES,
    imbalance: float = 1.0,
) -> Throughput:
    """name: of the model, for the report; tokens_per_step: None is the plan's own; decode_slots: None is what the
    workload and the memory allow. Raises ConfigError when the model does not fit."""
    rows = tokens_per_step or plan.tokens_per_step or TOKENS_PER_STEP
    item = page_dtype(config, kv_cache_dtype).itemsize

    def at(rows: int) -> tuple[Simulation, KVRoom]:
        capacity = kv_capacity(
            config, plan, model.hardware, devices, rows, kv_cache_dtype=kv_cache_dtype, request=round(demand.held)
        )
        if capacity < demand.request:
            raise ConfigError(
                f"devices: the weights of {name} leave room for {max(0, capacity)} tokens of KV on {devices} x "
                f"{model.hardware.name}, and a request has {demand.request}; accepted: more GPUs, or larger ones"
            )
        wanted = demand.step(rows, decode_slots=decode_slots, quantum=row_quantum(devices))
        load = demand.step(rows, capacity, decode_slots, row_quantum(devices))
        simulation = simulate_step(
            plan, config, model, devices, load, runtime=runtime, page_bytes=item, imbalance=imbalance
        )
        return simulation, KVRoom(capacity, round(demand.resident(load)), load.decode_rows < wanted.decode_rows)

    simulation, kv = at(rows)
    tried = {rows: simulation}
    for size in sizes:
        if size not in tried and size >= 2 * row_quantum(devices):
            tried[size] = at(size)[0]
    best = max(tried, key=lambda size: tried[size].tokens_per_second_per_gpu)
    load = tried[best].load
    return Throughput(
        name,
        config.quantization,
        kv_cache_dtype,
        demand,
        simulation,
        kv,
        optimum(config, model.hardware, calibrated=True),
        optimum(config, model.hardware),
        (load.rows, load.decode_rows, tried[best].tokens_per_second_per_gpu),
    )


def context_grid(
    config: ModelConfig, plan: SchedulePlan, model: LatencyModel, devices: int,
    slots: Sequence[int], contexts: Sequence[int], prefill_share: float = 0.375, runtime: str = "library",
) -> list[list[float | None]]:  # fmt: skip
    """Tokens/s/GPU by [decode slots][context]; None where the pages do not fit. prefill_share: of the step's rows."""
    quantum, grid = row_quantum(devices), []
    for count in slots:
        rows, prefill = [], round(count * prefill_share / (1 - prefill_share) / quantum) * quantum
        for context in contexts:
            fits = count * context <= kv_capacity(
                config, plan, model.hardware, devices, count + prefill, request=max(1, context)
            )
            load = StepLoad(count, prefill, context, context / 2)
            rate = simulate_step(plan, config, model, devices, load, runtime=runtime).tokens_per_second_per_gpu
            rows.append(rate if fits else None)
        grid.append(rows)
    return grid
