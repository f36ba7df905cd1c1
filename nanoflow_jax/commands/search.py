"""`nanoflow search`: the best plan for a model, a GPU and a load, written as a plan file."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow_jax.commands.options import add_html, check_outputs, positive
from nanoflow_jax.commands.simulate import add_target, read_target, step_figures

if TYPE_CHECKING:
    from nanoflow_jax.cost.demand import StepLoad
    from nanoflow_jax.plan.plan import SchedulePlan
    from nanoflow_jax.search.search import Found
    from nanoflow_jax.search.simulate import Simulation

MOST_WORKERS = 8  # unless asked
BASELINES = ("sequential", "two_all_reduce", "nanoflow_70b")
BASELINES_OF_ONE = ("sequential", "nanoflow_8b")  # on one device


def add(commands: Any) -> None:
    p = commands.add_parser(
        "search",
        help="find the best plan for a model, a GPU and a load",
        description="Searches nano-batches, strategies, orders and lanes, and writes a plan file.\n\n"
        "  nanoflow search --model llama-3.1-70b --gpu h200 --output my_plan.toml\n"
        "  nanoflow search --gpu a100_sxm_80 --decode-tokens 1280 --context 1024\n\n"
        "Times are predicted by the simulator. The same command writes the same file. Nothing is written over.",
    )
    add_target(p)
    p.add_argument("--tokens-per-step", type=positive, default=2048, help="rows of the step; fewer where memory limits")
    p.add_argument(
        "--decode-tokens", type=int, help="how many of them decode; what workload and memory allow when not given"
    )
    p.add_argument("--context", type=positive, help="tokens that each row attends to; the workload's when not given")
    p.add_argument("--nano-batches", type=positive, nargs="+", default=[1, 2, 3], metavar="N", help="numbers to try")
    p.add_argument("--no-lanes", action="store_true", help="keep decode attention on the main stream")
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    p.add_argument(
        "--workers", type=positive, default=workers, help="processes; the result is the same with any number"
    )
    p.add_argument("--name", help="of the plan; of the output file when not given")
    p.add_argument("--output", metavar="FILE", help="write the plan to FILE (.toml); else to standard output")
    p.add_argument("--inspect", action="store_true", help="compile four layers for the GPU and report what overlaps")
    p.add_argument("--json", action="store_true", help="print JSON: the result, and predictions beside baselines")
    add_html(p)
    p.add_argument("--quiet", action="store_true", help="no progress on standard error")
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from nanoflow_jax.config import ConfigError
    from nanoflow_jax.cost.demand import StepLoad
    from nanoflow_jax.plan.file import load_plan, plan_toml
    from nanoflow_jax.plan.plan import Target, row_quantum
    from nanoflow_jax.search.predict import kv_capacity
    from nanoflow_jax.search.search import GRID, Space, search
    from nanoflow_jax.search.simulate import simulate_step
    from nanoflow_jax.step.attention import page_dtype
    from nanoflow_jax.system.progress import Progress

    check_outputs(args, "output", "html")
    if args.output and (not args.output.endswith(".toml") or Path(args.output).exists()):
        raise ValueError(f"--output: {args.output} exists, or is no .toml file; name a new one")
    if args.nano_batches and max(args.nano_batches) > 3:
        raise ConfigError(f"--nano-batches: {max(args.nano_batches)} is not accepted; at most 3")
    model_name, config, model, demand = read_target(args)
    gpu, rows, quantum = model.hardware.name, args.tokens_per_step, row_quantum(args.devices)
    if rows % quantum or rows < 2 * quantum:
        raise ConfigError(f"--tokens-per-step: {rows} is not accepted; expected a multiple of {quantum}")
    capacity = kv_capacity(
        config, load_plan("sequential"), model.hardware, args.devices, rows, kv_cache_dtype=args.kv_cache_dtype,
        request=demand.request,
    )  # fmt: skip
    if capacity < 1:
        raise ConfigError(f"devices: the weights of {model_name} do not fit on {args.devices} x {gpu}")
    load = demand.step(rows, capacity, quantum=quantum)
    if (tile := math.lcm(GRID, quantum)) <= load.rows < rows:  # memory limits the requests: whole tiles of GEMMs
        load = demand.step(load.rows // tile * tile, capacity, quantum=quantum)
    if (decode := args.decode_tokens) is not None:
        if not 0 <= decode <= rows or decode % quantum:
            raise ConfigError(
                f"--decode-tokens: {decode} is not accepted; expected a multiple of {quantum}, 0 to {rows}"
            )
        load = replace(load, decode_rows=decode, prefill_rows=rows - decode)
    if args.context:
        load = StepLoad(load.decode_rows, load.prefill_rows, args.context, args.context)
    weights = f"_{config.quantization}" if config.quantization else ""
    name = args.name or (Path(args.output).stem if args.output else f"auto_{model_name}_{args.devices}x{gpu}{weights}")

    item = page_dtype(config, args.kv_cache_dtype).itemsize
    started = time.monotonic()
    space = replace(Space.of(args.devices), batches=tuple(sorted(set(args.nano_batches))))
    if args.no_lanes:
        space = replace(space, shares=())
    with Progress(None, "searching", "structures", not args.quiet) as bar:
        found = search(
            name, config, model, args.devices, load,
            space=space, workers=args.workers, page_bytes=item, progress=bar.report,
        )  # fmt: skip
    seconds = time.monotonic() - started

    plan = found.plan
    baselines = BASELINES if args.devices > 1 else BASELINES_OF_ONE
    steps = {
        p.name: simulate_step(p, config, model, args.devices, load, page_bytes=item)
        for p in (plan, *map(load_plan, baselines))
    }
    batches = ", ".join(
        f"{b.rows} rows {b.attention_output}" if args.devices > 1 else f"{b.rows} rows" for b in plan.nano_batches
    )
    plan = replace(
        plan,
        description=f"searched for {model_name}{weights.replace('_', ' in ')} on {args.devices} x {gpu}: {batches}",
        target=Target.of(config, gpu, args.devices),
    )
    remarks = explain(found, steps, load, capacity)
    text = plan_toml(plan, remarks)
    if args.output:
        Path(args.output).write_text(text, encoding="utf-8")
    if args.json:
        data = {
            "predicted": True, "plan": name, "model": model_name, "gpu": gpu, "devices": args.devices,
            "load": asdict(load), "layer_us": found.period_us, "bound_us": found.bound_us, "gap": found.gap,
            "layer_us_without_lane": found.without_lane_us, "structures": found.structures,
            "structures_ruled_out": found.ruled_out, "structures_tried": found.tried, "structures_open": found.open,
            "seconds": round(seconds, 1), "latency_source": "; ".join(steps[name].sources), "explanation": remarks,
            "tokens_per_second_per_gpu": {n: s.tokens_per_second_per_gpu for n, s in steps.items()},
        }  # fmt: skip
        print(json.dumps(data, indent=1))
    elif args.output:
        print("\n".join([*remarks, f"searched in {seconds:.1f} s; written to {args.output}"]))
    else:
        print(text, end="")
    if args.html:
        from nanoflow_jax.timeline.html import Shown, write_page

        shown = [
            Shown(s, s.inner, step_figures(s, s.totals.share_of_optimum or 0.0), None, {},
                  {"plan file": text.splitlines()} if s.plan.name == name else {})
            for s in steps.values()
        ]  # fmt: skip
        write_page(shown, args.html, f"{name}: {model_name} on {args.devices} x {gpu}", " ".join(remarks))
    if args.inspect:
        _inspect(args, gpu, plan, load)
    return 0


def explain(found: Found, steps: dict[str, Simulation], load: StepLoad, capacity: int) -> list[str]:
    """A few lines: what was found, how good it can be, and against what. No times of the search: the same search writes
    the same file. capacity: tokens of KV that fit."""
    s = steps[found.plan.name]
    inner, optimum = s.inner, s.totals.share_of_optimum
    against = ", ".join(
        f"{s.tokens_per_second_per_gpu / other.tokens_per_second_per_gpu - 1:+.1%} over {name} "
        f"({other.tokens_per_second_per_gpu:.0f})"
        for name, other in steps.items()
        if name != found.plan.name
    )
    worst = next((steps[n].inner for n in ("sequential",) if n in steps), inner)
    held = load.decode_rows * load.decode_context
    too_many = f" Memory has room for {capacity} tokens of KV, and these rows attend to {held:.0f}."
    return [
        f"Predicted, not measured, from {'; '.join(s.sources)}: {load.decode_rows} decode rows of context "
        f"{load.decode_context:.0f}, {load.prefill_rows} prefill rows of context {load.prefill_context:.0f}."
        + (too_many if held > capacity else ""),
        f"{s.tokens_per_second_per_gpu:.0f} tokens/s/GPU, {optimum:.1%} of the optimum: {against}.",
        f"A layer takes {inner.us:.0f} us (sequential: {worst.us:.0f}): {_beside(s)}",
        _proof(found),
    ]


def _beside(s: Simulation) -> str:
    """What runs beside what."""
    inner = s.inner
    if s.devices > 1:
        hidden = 1 - inner.exposed_network_us / inner.network_us if inner.network_us else 1.0
        return (
            f"{hidden:.0%} of the network's {inner.network_us:.0f} us run beside other work, which loses "
            f"{inner.interference_us:z.0f} us by it."
        )
    if attention := s.beside_us:
        return (
            f"decode attention's {attention:.0f} us run beside other work, which loses {inner.interference_us:z.0f} us "
            f"by it and waits {inner.bubble_us:.0f} us for it."
        )
    return (
        "nothing runs beside anything. On one device only decode attention could, where the GPU's kernel can leave "
        "SMs free."
    )


def _proof(found: Found) -> str:
    lane = next(iter(found.plan.lanes.values()), None)
    if lane:
        gain = found.without_lane_us / found.period_us - 1
        where = (
            f"Decode attention has a lane of its own, on {lane.sms} SMs, which gains {gain:.1%} over the main stream."
        )
    else:
        where = "Decode attention stays on the main stream."
    ruled = f"{found.ruled_out} of {found.structures} structures are ruled out by their bounds"
    if not found.open:
        return f"{where} No plan of the space has a shorter layer: {ruled}, and the best order of the others is proven."
    least = f"No plan of the space has a layer below {found.bound_us:.0f} us (gap {found.gap:.1%})"
    return f"{where} {least}: {ruled}, and the best order of {found.open} of the others is not proven."


def _inspect(args: argparse.Namespace, gpu: str, plan: SchedulePlan, load: StepLoad) -> None:
    """What the compiled step overlaps, where the compiler plugin is installed."""
    from nanoflow_jax.inspect.compare import compare
    from nanoflow_jax.inspect.step import inspect_step

    step = inspect_step(
        args.model,
        args.gpu or gpu,
        plan,
        devices=args.devices,
        tokens=load.rows,
        decode_tokens=load.decode_rows,
        layers=4,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
    )
    print(compare([step]))
    for finding in step.report.findings:
        print(f"finding: {finding.kind} {finding.op or ''}: {finding.detail}")
