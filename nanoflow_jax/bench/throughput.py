"""`nanoflow bench throughput`: tokens per second and GPU in the steady state of a long run, and where the rest went.

The engine is the real one, with random weights. Requests are added as fast as they are taken, so that the queue never
runs dry; the run ends when it would. Tokens are counted as NanoFlow counts them: prompt and output tokens together.

A rank slice (`rank_of`) runs on one device what one of several would run: see `parallel.collectives.rank_slice`. What
it measures has no network in it; `network` holds what a model of the network adds.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from nanoflow_jax.bench.network import modelled_network
from nanoflow_jax.bench.report import ThroughputOptions, ThroughputReport
from nanoflow_jax.bench.timeline import (
    StepClock,
    TimedStep,
    Unsteady,
    Window,
    later_half,
    steady_window,
    time_lost,
)
from nanoflow_jax.config import ConfigError
from nanoflow_jax.cost.shapes import optimum
from nanoflow_jax.engine.engine import Engine
from nanoflow_jax.engine.request import error_line
from nanoflow_jax.engine.setup import build_engine
from nanoflow_jax.hardware import hardware_of
from nanoflow_jax.models.layout import ModelParams
from nanoflow_jax.models.params import random_params
from nanoflow_jax.parallel.mesh import AXIS, check_divides, make_mesh
from nanoflow_jax.plan.known import AUTO, DEFAULT, check_sms, named_plan
from nanoflow_jax.plan.plan import SchedulePlan
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.step.slots import empty_inputs
from nanoflow_jax.system.platform import claim_gpu_memory
from nanoflow_jax.system.progress import Progress
from nanoflow_jax.workload import BenchRequest, Workload

TOLD = (  # options, in a report
    "max_model_len", "tokens_per_step", "decode_slots", "page_size", "kv_cache_tokens", "enable_prefix_caching",
    "deterministic", "one_shape", "attention_backend", "kv_cache_dtype", "temperature", "seed",
)  # fmt: skip
LIFETIMES = 6  # of a request: how long a run is by default; the ramp takes about one


def measure(options: ThroughputOptions) -> ThroughputReport:
    """One run. Raises ConfigError, one line, when something cannot be used or the run had no steady state."""
    claim_gpu_memory(options.memory_utilization)
    config, (mesh, gpus) = options.config, _mesh(options)
    hardware = options.hardware or hardware_of(mesh.devices.flat[0])
    plan_name = str(options.plan)
    plan = named_plan(
        DEFAULT if plan_name == AUTO and options.deterministic else plan_name,  # as `LLM`
        replace(config, num_layers=options.model_layers), hardware.name if hardware else None, gpus,
        options.tokens_per_step, options.decode_slots,
    )  # fmt: skip
    check_sms(plan, hardware)
    if plan_name == AUTO:
        plan_name = plan.name
    vocabulary = config.vocab_size // (options.rank_of or 1)  # a slice embeds the tokens of its own rows only
    limit = options.max_model_len or options.workload.limit(config.max_position_embeddings)
    options.workload.requests(1, limit, vocabulary, options.seed)  # lengths that do not fit are told before the work
    engine, weights_seconds, compile_seconds = build_random(options, plan, mesh, limit)
    enough = LIFETIMES * usual_running(engine, options.workload)
    count = options.requests or enough
    requests = options.workload.requests(count, engine.max_model_len, vocabulary, options.seed)
    started = time.perf_counter()
    warm_up(engine, options.temperature)
    warmup_seconds = time.perf_counter() - started
    steps, cut = drive(engine, requests, options.temperature, options.progress, options.seconds)
    steady = True
    try:
        window = steady_window(steps, count, enough, cut=cut)
    except Unsteady:
        if not options.accept_unsteady or len(steps) < 2:
            raise
        window, steady = later_half(steps), False

    rate = window.tokens / window.seconds / gpus
    best = optimum(config, hardware) if hardware else None
    report = ThroughputReport(
        model=str(options.model),
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
        served_tokens_per_second_per_gpu=window.served_tokens / window.seconds / gpus,
        prefix_hits={
            "prompt_tokens": window.prompt_tokens,
            "cached_tokens": window.cached_tokens,
            "share": window.cached_tokens / max(1, window.prompt_tokens),
        },
        optimum_tokens_per_second_per_gpu=best,
        share_of_optimum=rate / best if best else None,
        lost=time_lost(window),
        window=_window_figures(window, steps, config.num_layers),
        steady=steady,
        weights_seconds=weights_seconds,
        compile_seconds=compile_seconds,
        warmup_seconds=warmup_seconds,
        options={
            "requests": count,
            "prompt_tokens_mean": float(np.mean([len(r.prompt_token_ids) for r in requests])),
            "output_tokens_mean": float(np.mean([r.output_tokens for r in requests])),
            **{name: getattr(options, name) for name in TOLD},
            "max_model_len": engine.max_model_len,
            "decode_slots": engine.running.count,
            "kv_cache_tokens": engine.runner.num_pages * options.page_size,
            "quantization": config.quantization,
        },
        steps=tuple(steps),
        span=window,
    )
    if options.rank_of and hardware:
        report = replace(report, network=modelled_network(options, plan, plan_name, window, hardware, best))
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


def build_random(options: ThroughputOptions, plan: SchedulePlan, mesh: Mesh, limit: int) -> tuple[Engine, float, float]:
    """An engine with random weights, and the seconds that weights and the rest, mostly compiling, took."""
    weights_seconds = 0.0

    def make_params(infos: ModelParams, mesh: Mesh) -> ModelParams:
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
        replace(options, max_model_len=limit),
        make_params,
        one_shape=options.one_shape,
        rank_of=options.rank_of,
    )
    return engine, weights_seconds, time.perf_counter() - began - weights_seconds


def usual_running(engine: Engine, workload: Workload) -> int:
    """About how many requests will run at once in this engine."""
    page_size = engine.runner.page_size
    cached = workload.prefix // page_size * page_size if engine.scheduler.root is not None else 0
    return expected_running(
        workload,
        rows=max(s.rows for s in engine.scheduler.shapes),
        prefill=max(s.prefill_rows for s in engine.scheduler.shapes),
        slots=engine.running.count,
        pool=engine.runner.num_pages * page_size,
        page_size=page_size,
        cached=cached,
    )


def expected_running(
    workload: Workload, *, rows: int, prefill: int, slots: int, pool: int | None, page_size: int, cached: int = 0
) -> int:
    """About how many requests run at once: bounded by the slots, the rows of a step in balance between prompts and
    outputs, and the pool's tokens (None: no bound). cached: tokens at the beginning of each prompt found in pages."""
    prompt, output = max(1.0, workload.prompt.mean - cached), workload.output.mean
    balanced = min(rows * output / (prompt + output), prefill * output / prompt)
    held = prompt + output / 2 + page_size / 2
    pages = slots if pool is None else pool / held
    return max(1, round(min(slots, balanced + prefill / prompt, pages)))


def warm_up(engine: Engine, temperature: float = 0.0) -> None:
    """Each program that requests of a temperature run, once, with rows of padding only: what samples is compiled when
    first wanted, and the first call of a program is slower than the others."""
    runner = engine.runner
    for shape in engine.scheduler.shapes:
        inputs = empty_inputs(shape, runner.num_pages, runner.sizes.slots, runner.sizes.bias_rows)
        inputs.sampling.temperature[:] = temperature
        jax.block_until_ready(runner.dispatch(shape, inputs).sampled.tokens)


def drive(
    engine: Engine, requests: list[BenchRequest], temperature: float, progress: bool, seconds: float | None = None
) -> tuple[list[TimedStep], bool]:
    """Runs until the queue is empty, or for so many seconds; what is running then is dropped. Returns the steps, and
    whether the time ran out first."""
    end = float("inf") if seconds is None else time.perf_counter() + seconds
    params = SamplingParams(temperature=temperature, max_tokens=None, ignore_eos=True, detokenize=False)
    ahead = 2 * max(s.prefill_segments for s in engine.scheduler.shapes)
    added = 0
    with StepClock(engine) as clock, Progress(len(requests), "requests", "requests", progress) as bar:
        while time.perf_counter() < end and (added < len(requests) or engine.scheduler.waiting):
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
        cut = added < len(requests) or bool(engine.scheduler.waiting)
        engine.abort_all()
    return clock.steps, cut


def _window_figures(window: Window, steps: list[TimedStep], layers: int) -> dict[str, float]:
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
        "layer_ms": float(np.median(busy)) * 1e3 / layers,  # embedding, head and sampler included
        "gap_ms_median": float(np.median(window.idle)) * 1e3,
        "dispatch_ms_median": float(np.median([s.dispatching for s in window.steps])) * 1e3,
    }
