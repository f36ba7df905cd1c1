"""`nanoflow bench throughput`: tokens per second and GPU in the steady state of a long run, and where the rest went.

The engine is the real one, with random weights. Requests are added as fast as they are taken, so that the queue never
runs dry; the run ends when it would. Tokens are counted as NanoFlow counts them: prompt and output tokens together.

A rank slice (`rank_of`) runs on one device what one of several would run: see `parallel.collectives.rank_slice`. What
it measures has no network in it; `network` holds what a model of the network adds.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nanoflow_jax.bench.network import inspected_exposure, network_step
from nanoflow_jax.bench.timeline import StepClock, TimedStep, Window, steady_window, time_lost
from nanoflow_jax.config import ConfigError, ModelConfig, configs_root
from nanoflow_jax.engine.engine import Engine
from nanoflow_jax.engine.quarantine import error_line
from nanoflow_jax.engine.sampling_params import SamplingParams
from nanoflow_jax.engine.setup import EngineOptions, build_engine
from nanoflow_jax.hardware import Hardware, load_hardware
from nanoflow_jax.models.llama import LlamaParams
from nanoflow_jax.models.params import random_params
from nanoflow_jax.parallel.mesh import AXIS, check_divides, make_mesh
from nanoflow_jax.progress import Progress
from nanoflow_jax.schedule.plan import SchedulePlan, load_plan
from nanoflow_jax.schedule.slots import empty_inputs
from nanoflow_jax.search.latency import optimal_tokens_per_second
from nanoflow_jax.workload import BenchRequest, Workload

LIFETIMES = 6  # of a request: how long a run is by default; the ramp takes about one


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions:
    """What to run. `model_layers`: of the whole model, when `config` has fewer."""

    model: str
    config: ModelConfig
    workload: Workload
    model_layers: int
    requests: int | None = None  # None: about LIFETIMES times as many as run at once
    max_model_len: int | None = None
    tokens_per_step: int = 2048
    decode_slots: int | None = None
    page_size: int = 64
    kv_cache_tokens: int | None = None
    memory_utilization: float = 0.9
    tensor_parallel_size: int | None = None
    rank_of: int | None = None
    enable_prefix_caching: bool = True
    deterministic: bool = False
    attention_backend: str = "auto"
    kv_cache_dtype: str = "auto"
    temperature: float = 0.0
    hardware: Hardware | None = None
    inspect: bool = False
    seed: int = 0
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class ThroughputReport:
    """Figures of the steady window. Times in seconds; `lost` holds shares of the window's time (bench.timeline).

    gpus             that the model is split over: the mesh, or what a rank slice is a slice of
    share_of_optimum of FLOP/s ÷ (2 × parameters); None where the GPU is not known
    network          of a rank slice: what is modelled, not measured
    """

    model: str
    layers: int
    model_layers: int
    dtype: str
    plan: str
    workload: str
    device: str
    hardware: str | None
    gpus: int
    rank_of: int | None
    tokens_per_second_per_gpu: float
    optimum_tokens_per_second_per_gpu: float | None
    share_of_optimum: float | None
    lost: dict[str, float]
    window: dict[str, float]
    weights_seconds: float
    compile_seconds: float
    warmup_seconds: float
    options: dict[str, Any]
    network: dict[str, Any] | None = None
    steps: tuple[TimedStep, ...] = field(default=(), repr=False)
    span: Window | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the steps."""
        plain = replace(self, steps=(), span=None)
        return {k: v for k, v in asdict(plain).items() if k not in ("steps", "span")}


def measure(options: ThroughputOptions, plan_name: str) -> ThroughputReport:
    """One run. Raises ConfigError, one line, when something cannot be used or the run had no steady state."""
    plan, config = load_plan(plan_name), options.config
    mesh, gpus = _mesh(options)
    vocabulary = config.vocab_size // (options.rank_of or 1)  # a slice embeds the tokens of its own rows only
    limit = options.max_model_len or options.workload.limit(config.max_position_embeddings)
    options.workload.requests(1, limit, vocabulary, options.seed)  # lengths that do not fit are told before the work
    engine, weights_seconds, compile_seconds = _build(options, plan, mesh, limit)
    enough = LIFETIMES * usual_running(engine, options.workload)
    count = options.requests or enough
    requests = options.workload.requests(count, engine.max_model_len, vocabulary, options.seed)
    started = time.perf_counter()
    warm_up(engine)
    warmup_seconds = time.perf_counter() - started
    steps = drive(engine, requests, options.temperature, options.progress)
    window = steady_window(steps, count, enough)

    rate = window.tokens / window.seconds / gpus
    hardware = options.hardware or _present(mesh)
    optimum = optimal_tokens_per_second(hardware, config.num_params) if hardware else None
    report = ThroughputReport(
        model=options.model,
        layers=config.num_layers,
        model_layers=options.model_layers,
        dtype=config.dtype,
        plan=plan.name,
        workload=options.workload.name,
        device=mesh.devices.flat[0].device_kind,
        hardware=hardware.name if hardware else None,
        gpus=gpus,
        rank_of=options.rank_of,
        tokens_per_second_per_gpu=rate,
        optimum_tokens_per_second_per_gpu=optimum,
        share_of_optimum=rate / optimum if optimum else None,
        lost=time_lost(window),
        window=_window_figures(window, steps),
        weights_seconds=weights_seconds,
        compile_seconds=compile_seconds,
        warmup_seconds=warmup_seconds,
        options={
            "requests": count,
            "prompt_tokens_mean": float(np.mean([len(r.prompt_token_ids) for r in requests])),
            "output_tokens_mean": float(np.mean([r.output_tokens for r in requests])),
            "max_model_len": engine.max_model_len,
            "tokens_per_step": options.tokens_per_step,
            "decode_slots": engine.running.count,
            "page_size": options.page_size,
            "kv_cache_tokens": engine.runner.num_pages * options.page_size,
            "enable_prefix_caching": options.enable_prefix_caching,
            "deterministic": options.deterministic,
            "attention_backend": options.attention_backend,
            "kv_cache_dtype": options.kv_cache_dtype,
            "temperature": options.temperature,
            "seed": options.seed,
        },
        steps=tuple(steps),
        span=window,
    )
    if options.rank_of and hardware:
        report = replace(report, network=_modelled_network(options, plan, plan_name, window, hardware, optimum))
    return report


def _mesh(options: ThroughputOptions) -> tuple[Mesh, int]:
    """The mesh, and over how many GPUs the model is split."""
    if options.rank_of is None:
        mesh = make_mesh(options.config, options.tensor_parallel_size)
        return mesh, mesh.size
    if options.tensor_parallel_size not in (None, 1):
        raise ConfigError("rank-of: one device runs one rank; it does not go together with tensor-parallel-size")
    check_divides(options.config, options.rank_of)
    return Mesh(np.array(jax.devices()[:1]), (AXIS,)), options.rank_of


def _build(options: ThroughputOptions, plan: SchedulePlan, mesh: Mesh, limit: int) -> tuple[Engine, float, float]:
    """An engine with random weights, and the seconds that weights and the rest, mostly compiling, took."""
    weights_seconds = 0.0

    def make_params(infos: LlamaParams, mesh: Mesh) -> LlamaParams:
        nonlocal weights_seconds
        began = time.perf_counter()
        params = jax.block_until_ready(random_params(infos, mesh, options.seed))
        weights_seconds = time.perf_counter() - began
        return params

    began = time.perf_counter()
    engine = build_engine(
        Path(options.model),
        options.config,
        plan,
        mesh,
        None,
        (),
        EngineOptions(
            max_model_len=limit,
            tokens_per_step=options.tokens_per_step,
            decode_slots=options.decode_slots,
            page_size=options.page_size,
            kv_cache_tokens=options.kv_cache_tokens,
            memory_utilization=options.memory_utilization,
            enable_prefix_caching=options.enable_prefix_caching,
            kv_offload_bytes=0,
            kv_offload_disk_bytes=0,
            kv_offload_folder=None,
            deterministic=options.deterministic,
            attention_backend=options.attention_backend,
            kv_cache_dtype=options.kv_cache_dtype,
            seed=options.seed,
            progress=options.progress,
            rank_of=options.rank_of,
        ),
        make_params,
    )
    return engine, weights_seconds, time.perf_counter() - began - weights_seconds


def usual_running(engine: Engine, workload: Workload) -> int:
    """About how many requests will run at once: bounded by the slots, the rows of a step in balance between prompts
    and outputs, and the pages."""
    rows = max(s.rows for s in engine.scheduler.shapes)
    prefill = max(s.prefill_rows for s in engine.scheduler.shapes)
    prompt, output = workload.prompt.mean, workload.output.mean
    balanced = min(rows * output / (prompt + output), prefill * output / prompt)
    held = prompt + output / 2 + engine.runner.page_size / 2
    pages = engine.runner.num_pages * engine.runner.page_size / held
    return max(1, round(min(engine.running.count, balanced + prefill / prompt, pages)))


def warm_up(engine: Engine) -> None:
    """Each compiled step once, with rows of padding only: the first call of a program is slower than the others."""
    runner = engine.runner
    for shape in engine.scheduler.shapes:
        inputs = empty_inputs(shape, runner.num_pages, runner.sizes.slots, runner.sizes.bias_rows)
        jax.block_until_ready(runner.dispatch(shape, inputs).sampled.tokens)


def drive(engine: Engine, requests: list[BenchRequest], temperature: float, progress: bool) -> list[TimedStep]:
    """Runs until the queue is empty; what is running then is dropped."""
    params = SamplingParams(temperature=temperature, max_tokens=None, ignore_eos=True, detokenize=False)
    ahead = 2 * max(s.prefill_segments for s in engine.scheduler.shapes)
    added = 0
    with StepClock(engine) as clock, Progress(len(requests), "requests", "requests", progress) as bar:
        while added < len(requests) or engine.scheduler.waiting:
            while added < len(requests) and len(engine.scheduler.waiting) < ahead:
                request = requests[added]
                engine.add(None, request.prompt_token_ids, params, max_tokens=request.output_tokens)
                added += 1
            ended = engine.step()
            if engine.failure is not None:  # the engine would try again, and the figures mean nothing
                raise ConfigError(f"throughput: a step failed: {error_line(engine.failure)}")
            clock.ended += len(ended)
            if ended:
                bar.advance(len(ended))
        engine.abort_all()
    return clock.steps


def _window_figures(window: Window, steps: list[TimedStep]) -> dict[str, float]:
    busy, shapes = window.busy, len({s.shape for s in window.steps})
    return {
        "seconds": window.seconds,
        "share_of_run": window.share_of_run,
        "ramp_seconds": window.started - steps[0].dispatched,
        "steps": len(window.steps),
        "step_shapes": shapes,
        "tokens": window.tokens,
        "prefill_tokens": sum(s.prefill_rows for s in window.steps),
        "decode_tokens": sum(s.decode_rows for s in window.steps),
        "requests_ended": window.requests_ended,
        "running_median": window.plateau,
        "rows_used_mean": float(np.mean([s.rows_used for s in window.steps])),
        "step_ms_median": float(np.median(busy)) * 1e3,
        "step_ms_p99": float(np.percentile(busy, 99)) * 1e3,
    }


def _present(mesh: Mesh) -> Hardware | None:
    """The hardware file of the device at hand; None for a CPU and for a GPU that no file names."""
    device = mesh.devices.flat[0]
    if device.platform != "gpu":
        return None
    kind = device.device_kind
    for path in sorted((configs_root() / "hardware").glob("*.toml")):
        hardware = load_hardware(path)
        if hardware.device_name.startswith(kind) or kind.startswith(hardware.device_name):
            return hardware
    return None


def _modelled_network(
    options: ThroughputOptions,
    plan: SchedulePlan,
    plan_name: str,
    window: Window,
    hardware: Hardware,
    optimum: float | None,
) -> dict[str, Any]:
    """What the network would add to each step of a rank slice: all of its time (exposed), or only what is longer
    than the step itself (hidden); and by the inspector's share, when it is asked for."""
    assert options.rank_of is not None
    devices = options.rank_of
    by_shape = {
        shape: network_step(options.config, plan, shape, hardware, devices) for shape in {s.shape for s in window.steps}
    }
    network = np.array([by_shape[s.shape].seconds for s in window.steps])
    bounds = {
        "exposed": window.seconds + network.sum(),
        "hidden": window.seconds + np.maximum(network - window.busy, 0).sum(),
    }
    found: dict[str, Any] = {
        "source": f"modelled: link figures of {hardware.name}, not measured",
        "seconds_per_step": float(network.mean()),
        "collectives_per_step": max(n.collectives for n in by_shape.values()),
    }
    if options.inspect:
        largest = max(by_shape, key=lambda shape: shape.rows)
        share, note = inspected_exposure(
            options.model, plan_name, hardware.name, devices, largest, options.config.num_layers
        )
        found["inspected"] = note
        if share is not None:
            bounds["inspected"] = window.seconds + share * network.sum()
    for name, seconds in bounds.items():
        rate = float(window.tokens / seconds / devices)
        found[f"tokens_per_second_per_gpu_{name}"] = rate
        if optimum:
            found[f"share_of_optimum_{name}"] = rate / optimum
    return found
