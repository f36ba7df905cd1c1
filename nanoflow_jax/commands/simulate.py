"""`nanoflow simulate`: what a plan would give on a GPU, from a latency model alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nanoflow_jax.commands.options import add_mesh_size, add_pictures, check_outputs, number, positive, write_pictures
from nanoflow_jax.system.table import table

if TYPE_CHECKING:
    from nanoflow_jax.config import ModelConfig
    from nanoflow_jax.cost.demand import Demand
    from nanoflow_jax.cost.latency import LatencyModel
    from nanoflow_jax.search.predict import Throughput
    from nanoflow_jax.search.simulate import Simulation

DEFAULT_GPU = "h200"


def add(commands: Any) -> None:
    p = commands.add_parser(
        "simulate",
        help="predict a plan's throughput on a GPU that need not be there, without compiling",
        description="Predicts the timeline of a step, and throughput on a workload, from a latency model.\n\n"
        "  nanoflow simulate --model llama-3.1-70b --gpu h200 --plan nanoflow_70b --workload sharegpt\n"
        "  nanoflow simulate --plan nanoflow_70b --compare scatter_70b sequential --plot plans.png\n\n"
        "Times are predicted: 'latency_source' says from what.",
    )
    add_target(p)
    p.add_argument(
        "--plan", default="nanoflow_70b", help="a name in configs/plans, a TOML file, or auto: the one known"
    )
    p.add_argument("--compare", nargs="+", metavar="PLAN", default=[], help="other plans to show beside --plan")
    p.add_argument("--tokens-per-step", type=positive, help="rows of the step; the plan's own, else 2048")
    p.add_argument("--decode-slots", type=positive, help="requests that run at once; what rows and memory allow")
    p.add_argument(
        "--runtime",
        default="library",
        choices=("library", "nanoflow"),
        help="how the plan runs: as the engine runs it, or on NanoFlow's three lanes",
    )
    p.add_argument(
        "--expert-imbalance",
        type=number(lambda value: 1 <= value <= 1e6, "a number of at least 1"),
        default=1.0,
        metavar="X",
        help="rows of the device whose experts get most, over the mean (1.0: none)",
    )
    p.add_argument("--json", action="store_true", help="print JSON; a list with --compare")
    add_pictures(p)
    p.set_defaults(run=_run)


def add_target(p: Any) -> None:
    """Options of model, GPU, workload and precision, which `simulate` and `search` share."""
    add_machine(p)
    add_mesh_size(p, "GPUs in the mesh", 8)
    p.add_argument("--quantization", help="of the layers' weights: fp8; as the model's when not given")
    p.add_argument("--kv-cache-dtype", default="auto", help="of the KV pages: auto (the model's), fp8 or fp8_e4m3")


def add_machine(p: Any) -> None:
    """Of these, what leaves open how the GPUs are used."""
    p.add_argument(
        "--model", default="llama-3.1-70b", help="'tiny', a name in configs/models, a config.json, or a folder with one"
    )
    p.add_argument(
        "--gpu",
        help="a name in configs/hardware, or a TOML file with the same fields; when not given, of --profile, or h200",
    )
    p.add_argument("--profile", metavar="FILE", help="a table of nanoflow profile: its times wherever it has the op")
    p.add_argument("--allow-foreign", action="store_true", help="with --profile: also of another machine or version")
    p.add_argument(
        "--workload",
        default="constant:1024:512",
        help="constant:PROMPT:OUTPUT, a name in configs/workloads, or a JSONL",
    )


def read_target(args: argparse.Namespace) -> tuple[str, ModelConfig, LatencyModel, Demand]:
    """The model's name and config in the precision asked for, the latency model of its GPU, and the workload's demand.
    Raises ConfigError."""
    from nanoflow_jax.config import ConfigError
    from nanoflow_jax.parallel.mesh import check_divides
    from nanoflow_jax.step.attention import check_quantization, page_dtype

    name, config, model, demand = read_machine(args)
    hardware, config = model.hardware, replace(config, quantization=args.quantization or config.quantization)
    check_quantization(config, hardware.capability)
    page_dtype(config, args.kv_cache_dtype)
    check_divides(config, args.devices)
    if args.devices > hardware.node_size:
        raise ConfigError(
            f"devices: {args.devices} is not accepted; a node of {hardware.name} has 1 to {hardware.node_size}"
        )
    return name, config, model, demand


def read_machine(args: argparse.Namespace) -> tuple[str, ModelConfig, LatencyModel, Demand]:
    """The same, of the options of `add_machine`."""
    from nanoflow_jax.config import ConfigError
    from nanoflow_jax.cost.demand import Demand
    from nanoflow_jax.cost.latency import RooflineModel
    from nanoflow_jax.hardware import load_hardware
    from nanoflow_jax.models.registry import model_config
    from nanoflow_jax.profile.measured import load_profile
    from nanoflow_jax.workload import load_workload

    name, config = model_config(args.model)
    gpu = load_hardware(args.gpu) if args.gpu else None
    model: LatencyModel
    if args.profile:
        model = load_profile(args.profile, gpu, args.allow_foreign)
    elif args.allow_foreign:
        raise ConfigError("allow-foreign: it is about the table of --profile, which is needed too")
    else:
        model = RooflineModel(gpu or load_hardware(DEFAULT_GPU))
    return name, config, model, Demand.of(load_workload(args.workload), config.max_position_embeddings)


def _run(args: argparse.Namespace) -> int:
    check_outputs(args, "trace", "plot", "html")
    from nanoflow_jax.plan.known import named_plan
    from nanoflow_jax.search.predict import TOKENS_PER_STEP, average_step, predict

    name, config, model, demand = read_target(args)
    rows = args.tokens_per_step or TOKENS_PER_STEP
    load = average_step(config, model.hardware, args.devices, demand, rows, args.decode_slots, args.kv_cache_dtype)
    plans = [
        named_plan(plan, config, model.hardware.name, args.devices, load.rows, load.decode_rows)
        for plan in (args.plan, *args.compare)
    ]
    results = [
        predict(
            name, config, plan, model, args.devices, demand,
            tokens_per_step=args.tokens_per_step, decode_slots=args.decode_slots, runtime=args.runtime,
            kv_cache_dtype=args.kv_cache_dtype, imbalance=args.expert_imbalance,
        )
        for plan in plans
    ]  # fmt: skip
    if args.json:
        data = [result.to_json() for result in results]
        print(json.dumps(data if args.compare else data[0], indent=1))
    else:
        print(compare(results) if args.compare else text(results[0]))
    write_pictures(args, results[0].simulation, [result.simulation for result in results])
    if args.html:
        from nanoflow_jax.timeline.html import Shown, write_page

        shown = [
            Shown(r.simulation, r.simulation.inner, _figures(r, results[0]), None, {}, {"report": text(r).splitlines()})
            for r in results
        ]
        load = results[0].simulation.load
        about = (
            f"{demand.name}: {load.decode_rows} decode + {load.prefill_rows} prefill rows a step; simulated, nothing "
            f"was compiled. Times are predicted: {results[0].latency_source}."
        )
        write_page(shown, args.html, f"{name} on {args.devices} x {model.hardware.name}", about)
    return 0


def text(result: Throughput) -> str:
    """For a terminal."""
    s, inner, kv = result.simulation, result.simulation.inner, result.kv
    rows, slots, rate = result.best
    limit = "; memory limits the requests" if kv.limits else ""
    return "\n".join(
        [
            f"{result.model}{_precision(result)}, plan {s.plan.name}, {result.demand.name}, {s.devices} x "
            f"{s.hardware}, {s.runtime} runtime: predicted from {result.latency_source}",
            f"{s.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, "
            f"{s.tokens_per_second_per_gpu / result.optimum:.1%} of the optimum {result.optimum:,.0f}; "
            f"bound by {inner.bound_by}",
            f"step: {s.load.decode_rows} decode rows of context {s.load.decode_context:.0f}, "
            f"{s.load.prefill_rows} prefill rows, {result.step_ms:.1f} ms (the time per token); "
            f"a request takes {result.request_seconds:.1f} s",
            inner.text(),
            *_experts(result),
            f"KV: {kv.resident:,} of {kv.capacity:,} tokens{limit}",
            f"best of the step sizes tried: {rows} rows, {slots} decode slots, {rate:,.0f} tokens/s/GPU",
        ]
    )


def _experts(result: Throughput) -> list[str]:
    imbalance = result.simulation.imbalance
    if imbalance is None:
        return []
    return [f"experts: the busiest device has {imbalance:g} times the mean of rows (--expert-imbalance)"]


def _precision(result: Throughput) -> str:
    """Where it is not the model's own."""
    weights = f", {result.quantization} weights" if result.quantization else ""
    return weights + (f", {result.kv_cache_dtype} pages" if result.kv_cache_dtype != "auto" else "")


def _figures(result: Throughput, first: Throughput) -> dict[str, str]:
    """A plan's row by column, as texts."""
    s, rate = result.simulation, result.simulation.tokens_per_second_per_gpu
    return step_figures(s, rate / result.optimum) | {
        "to first": f"{rate / first.simulation.tokens_per_second_per_gpu:.3f}"
    }


def step_figures(s: Simulation, share: float) -> dict[str, str]:
    """Of one step, by column. share: of the optimum."""
    exposed = {"exposed us": f"{s.inner.exposed_network_us:z.0f}"} if s.devices > 1 else {}
    return {
        "layer us": f"{s.inner.us:.0f}",
        **exposed,
        "lost us": f"{s.inner.interference_us:z.0f}",
        "step ms": f"{s.us / 1e3:.1f}",
        "tokens/s/GPU": f"{s.tokens_per_second_per_gpu:,.0f}",
        "of optimum": f"{share:.1%}",
    }


def compare(results: Sequence[Throughput]) -> str:
    """Plans side by side."""
    first = results[0]
    rows = [(result.simulation.plan.name, *_figures(result, first).values()) for result in results]
    s = first.simulation
    return "\n".join(
        [
            f"{first.model}{_precision(first)}, {first.demand.name}, {s.devices} x {s.hardware}, {s.runtime} runtime: "
            "predicted from "
            f"{first.latency_source}",
            table([("plan", *_figures(first, first)), *rows]),
        ]
    )
