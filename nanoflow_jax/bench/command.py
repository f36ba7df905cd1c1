"""`nanoflow bench`: host overhead and throughput."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow_jax.bench import batch_command

if TYPE_CHECKING:
    from nanoflow_jax.bench.throughput import ThroughputOptions, ThroughputReport
    from nanoflow_jax.workload import Workload


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; it must be an integer of at least 1")
    return int(text)


def add(commands: Any, formatter: Any) -> None:
    """Adds the command to the parser; nothing heavy is imported before it runs."""
    p = commands.add_parser("bench", formatter_class=formatter, help="measure throughput, or the host's work per step")
    kinds = p.add_subparsers(dest="bench", required=True, metavar="KIND")
    _add_throughput(kinds, formatter)
    _add_host(kinds, formatter)
    batch_command.add(kinds, formatter)


# -- host


def _add_host(kinds: Any, formatter: Any) -> None:
    p = kinds.add_parser(
        "host",
        formatter_class=formatter,
        help="what the host does per step, without the model",
        description="Runs the engine with a stand-in for the model and measures the host's work per step.\n\n"
        "  nanoflow bench host --requests 1280 --tokens 2048 --json",
    )
    p.add_argument("--requests", type=positive, default=1280, help="running requests")
    p.add_argument("--tokens", type=positive, default=2048, help="tokens per step")
    p.add_argument("--model", default="llama_3_1_70b", help="whose number of program arguments")
    p.add_argument("--steps", type=positive, default=1000, help="steps to measure")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=_host)


def _host(args: argparse.Namespace) -> int:
    from nanoflow_jax.bench.host import measure
    from nanoflow_jax.config import model_config

    started = time.monotonic()
    report = measure(args.requests, args.tokens, model_config(args.model)[1], args.steps)
    if args.json:
        print(json.dumps({**asdict(report), "seconds": round(time.monotonic() - started, 1)}, indent=2))
    else:
        print(report.text())
    return 0


# -- throughput


def _add_throughput(kinds: Any, formatter: Any) -> None:
    p = kinds.add_parser(
        "throughput",
        formatter_class=formatter,
        help="tokens per second and GPU in the steady state, and where the rest of the time went",
        description="Runs a workload with random weights and measures the steady state.\n\n"
        "  nanoflow bench throughput --model llama-3.1-8b --workload sharegpt --plot run.png\n"
        "  nanoflow bench throughput --model llama-3.1-70b --rank-of 8 --plan nanoflow_70b --json\n"
        "  nanoflow bench throughput --cpu-devices 8 --model tiny --workload constant:64:64 --compare sequential\n\n"
        "Shares of the window's time that are lost: host (the device had nothing to do), shape padding (empty rows\n"
        "of a compiled step), pages (empty rows while a request waited for KV pages), preemption (rows that\n"
        "computed tokens again). A rank slice runs one rank of a mesh with local copies in place of collectives;\n"
        "the network's time is then modelled from the hardware file.",
    )
    p.add_argument("--model", default="llama-3.1-8b", help="'tiny', a name in configs/models, a config.json, a folder")
    p.add_argument("--layers", type=positive, help="only so many layers of it; all when not given")
    p.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="of weights and pages")
    p.add_argument(
        "--workload", default="constant:512:512", help="constant:PROMPT:OUTPUT, a name in configs/workloads, or a JSONL"
    )
    p.add_argument("--requests", type=positive, help="how many; enough for a steady state when not given")
    p.add_argument("--plan", default="two_gather_one_reduce", help="a name in configs/plans, or a TOML file")
    p.add_argument("--compare", metavar="PLAN", help="a second run with the same requests, and the ratio")
    p.add_argument("--tensor-parallel-size", type=positive, help="devices in the mesh; all when not given")
    p.add_argument("--rank-of", type=positive, metavar="N", help="run one rank of an N-way mesh on one device")
    p.add_argument("--inspect", action="store_true", help="with --rank-of: ask nanoflow inspect what stays exposed")
    p.add_argument("--gpu", help="a name in configs/hardware, or a TOML file; found out when not given")
    p.add_argument("--tokens-per-step", type=positive, default=2048, help="rows of the largest step")
    p.add_argument("--decode-slots", type=positive, help="requests that run at once; 5/8 of the rows, 64 on a CPU")
    p.add_argument("--max-model-len", type=positive, help="of prompt and output; what the workload needs")
    p.add_argument("--page-size", type=positive, default=64, help="tokens per KV page")
    p.add_argument("--kv-cache-tokens", type=positive, help="size of the KV pool; what memory allows")
    p.add_argument("--memory-utilization", type=float, default=0.9, help="share of a GPU's memory")
    p.add_argument("--attention-backend", default="auto", choices=("auto", "xla", "mosaic"), help="of decode attention")
    p.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8", "fp8_e4m3"), help="of the KV pages")
    p.add_argument("--no-prefix-caching", action="store_true", help="pages of ended requests are not kept")
    p.add_argument("--deterministic", action="store_true", help="one step shape, sums in a fixed order")
    p.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy")
    p.add_argument("--seed", type=int, default=0, help="of lengths, prompts and weights")
    p.add_argument("--cpu-devices", type=positive, metavar="N", help="run on the CPU as N devices")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--plot", metavar="FILE", help="draw the rows of each step over time")
    p.add_argument("--quiet", action="store_true", help="no progress on standard error")
    p.add_argument("--verbose", action="store_true", help="log what was chosen")
    p.set_defaults(run=_throughput)


def _throughput(args: argparse.Namespace) -> int:
    if args.plot:  # found out before the run, not after it
        if not Path(args.plot).absolute().parent.is_dir():
            raise ValueError(f"--plot: {args.plot}: its folder does not exist")
        if find_spec("matplotlib") is None:
            raise ValueError('--plot: matplotlib is needed; pip install "nanoflow_jax[inspect]"')
    from nanoflow_jax.bench.throughput import measure
    from nanoflow_jax.platform import use_compile_cache

    use_compile_cache()
    options = _options(args)
    reports = [measure(options, args.plan)]
    if args.compare:
        reports.append(measure(options, args.compare))
    if args.plot:
        from nanoflow_jax.bench.plot import plot_reports

        plot_reports(reports, args.plot)
    if args.json:
        print(json.dumps(_json(args, reports), indent=1))
    else:
        print("\n\n".join(_text(report) for report in reports))
        if args.compare:
            print(f"\n{reports[0].plan} / {reports[1].plan}: {_ratio(reports):.3f} times the tokens/s, in one run")
    return 0


def _options(args: argparse.Namespace) -> ThroughputOptions:
    from nanoflow_jax.bench.throughput import ThroughputOptions
    from nanoflow_jax.config import ConfigError, model_config
    from nanoflow_jax.hardware import load_hardware

    _, config = model_config(_folder_or_name(args.model))
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if config.dtype == "float16" else config.dtype
    layers = args.layers or config.num_layers
    if layers > config.num_layers:
        raise ConfigError(f"layers: {layers} is not accepted; the model has {config.num_layers}")
    if args.inspect and not args.rank_of:
        raise ConfigError("inspect: it adds the network to a rank slice; --rank-of N is needed too")
    names = (
        "requests", "max_model_len", "tokens_per_step", "decode_slots", "page_size", "kv_cache_tokens",
        "memory_utilization", "tensor_parallel_size", "rank_of", "deterministic", "attention_backend",
        "kv_cache_dtype", "temperature", "inspect", "seed",
    )  # fmt: skip
    return ThroughputOptions(
        model=args.model,
        config=replace(config, dtype=dtype, num_layers=layers),
        model_layers=config.num_layers,
        workload=_workload(args),
        enable_prefix_caching=not args.no_prefix_caching,
        hardware=load_hardware(args.gpu) if args.gpu else None,
        progress=not args.quiet,
        **{n: getattr(args, n) for n in names},
    )


def _folder_or_name(model: str) -> str:
    from nanoflow_jax.weights.hub import EMBEDDED

    return str(EMBEDDED[model]) if model in EMBEDDED else model


def _workload(args: argparse.Namespace) -> Workload:
    """The workload; texts of a file are encoded by the tokenizer in the model's folder, if it has one."""
    from nanoflow_jax.workload import load_workload

    folder = Path(_folder_or_name(args.model))
    if not (folder / "tokenizer.json").is_file():
        return load_workload(args.workload)
    from nanoflow_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder)
    return load_workload(args.workload, lambda text: tokenizer.encode(text, True))


def _ratio(reports: Sequence[ThroughputReport]) -> float:
    return reports[0].tokens_per_second_per_gpu / reports[1].tokens_per_second_per_gpu


def _json(args: argparse.Namespace, reports: Sequence[ThroughputReport]) -> dict[str, Any]:
    data = reports[0].to_json()
    data["versions"] = {"python": platform.python_version()}
    data["versions"] |= {name: version(name) for name in ("nanoflow_jax", "jax", "jaxlib")}
    data["command"] = shlex.join(["nanoflow", *args.arguments])
    data["date"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    data["cpus"] = os.cpu_count()
    if args.compare:
        data["compare"] = reports[1].to_json()
        data["ratio"] = _ratio(reports)
    return data


def _text(report: ThroughputReport) -> str:
    w, o, lost = report.window, report.options, report.lost
    layers = "" if report.layers == report.model_layers else f", {report.layers} of its {report.model_layers} layers"
    where = f"{report.gpus} x {report.device}"
    if report.rank_of:
        where = f"one rank of {report.rank_of} on one {report.device}, collectives replaced by local copies"
    optimum = "no optimum: the GPU is not known (--gpu)"
    if report.share_of_optimum is not None:
        optimum = (
            f"{report.share_of_optimum:.1%} of the optimum {report.optimum_tokens_per_second_per_gpu:,.0f} "
            f"({report.hardware}: FLOP/s / (2 x parameters))"
        )
    lines = [
        f"{report.model}{layers}, {report.dtype}, plan {report.plan}, {report.workload}: {where}",
        f"{report.tokens_per_second_per_gpu:,.1f} tokens/s/GPU (prompt + output"
        f"{', without network' if report.rank_of else ''}), {optimum}",
        "time: "
        + ", ".join(f"{name.replace('_', ' ')} {lost[name]:.1%}" for name in lost if name != "useful")
        + f" lost; useful rows {lost['useful']:.1%}",
        f"window: {w['seconds']:.1f} s, {w['share_of_run']:.0%} of the run, {w['steps']} steps, {w['tokens']} tokens, "
        f"{w['requests_ended']} of {o['requests']} requests ended in it, {w['running_median']} running, "
        f"{w['rows_used_mean']:.0f} of {o['tokens_per_step']} rows used, step median {w['step_ms_median']:.2f} ms",
        f"before it: weights {report.weights_seconds:.1f} s, compile {report.compile_seconds:.1f} s, "
        f"warm-up {report.warmup_seconds:.1f} s, ramp {w['ramp_seconds']:.1f} s",
    ]
    if report.rank_of and report.network is None:
        lines.append("no network part: the GPU is not known (--gpu)")
    if network := report.network:
        lines.append(
            f"network ({network['source']}): {network['seconds_per_step'] * 1e3:.2f} ms per step, "
            f"{network['collectives_per_step']} collectives"
        )
        for name in ("exposed", "hidden", "inspected"):
            if (rate := network.get(f"tokens_per_second_per_gpu_{name}")) is not None:
                share = network.get(f"share_of_optimum_{name}")
                of = "" if share is None else f", {share:.1%} of the optimum"
                lines.append(f"  modelled, {name}: {rate:,.1f} tokens/s/GPU{of}")
        if "inspected" in network:
            lines.append(f"  {network['inspected']}")
    return "\n".join(lines)
