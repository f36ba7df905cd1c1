"""`nanoflow bench`: host overhead and throughput."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from nanoflow_jax.commands import bench_pairs, bench_structured
from nanoflow_jax.commands.options import add_bench_options, check_outputs, llm_options, number, positive
from nanoflow_jax.version import __version__

if TYPE_CHECKING:
    from nanoflow_jax.bench.report import ThroughputOptions
    from nanoflow_jax.workload import Workload


_seconds = number(lambda value: 0 < value < 1e6, "a number of seconds above 0")


def add(commands: Any) -> None:
    p = commands.add_parser("bench", help="measure throughput, or the host's work per step")
    kinds = p.add_subparsers(dest="bench", required=True, metavar="KIND")
    _add_throughput(kinds)
    _add_host(kinds)
    bench_pairs.add_batch(kinds)
    bench_pairs.add_replicas(kinds)
    bench_structured.add(kinds)


# -- host


def _add_host(kinds: Any) -> None:
    p = kinds.add_parser(
        "host",
        help="what the host does per step, without the model",
        description="Runs the engine with a stand-in for the model and measures the host's work per step.\n\n"
        "  nanoflow bench host --requests 1280 --tokens-per-step 2048 --json",
    )
    p.add_argument("--requests", type=positive, default=1280, help="running requests")
    p.add_argument("--tokens-per-step", type=positive, default=2048, help="rows of the step")
    p.add_argument("--model", default="llama_3_1_70b", help="whose number of program arguments")
    p.add_argument("--steps", type=positive, default=1000, help="steps to measure")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=_host)


def _host(args: argparse.Namespace) -> int:
    from nanoflow_jax.bench.host import measure
    from nanoflow_jax.models.registry import model_config

    started = time.monotonic()
    report = measure(args.requests, args.tokens_per_step, model_config(args.model)[1], args.steps)
    if args.json:
        print(json.dumps({**asdict(report), "seconds": round(time.monotonic() - started, 1)}, indent=2))
    else:
        print(report.text())
    return 0


# -- throughput


def _add_throughput(kinds: Any) -> None:
    p = kinds.add_parser(
        "throughput",
        help="tokens per second and GPU in the steady state, and where the rest of the time went",
        description="Runs a workload with random weights and measures the steady state.\n\n"
        "  nanoflow bench throughput --model llama-3.1-8b --workload sharegpt --plot run.png\n"
        "  nanoflow bench throughput --model llama-3.1-70b --rank-of 8 --plan nanoflow_70b --json\n"
        "  nanoflow bench throughput --cpu-devices 8 --model tiny --workload constant:64:64 --compare sequential\n"
        "  nanoflow bench throughput --workload shared:448:512:64 --compare no-prefix-caching --repeat 3\n\n"
        "Tokens are counted twice: computed ones, of which the share of the optimum is taken, and served ones, which\n"
        "are those and the prompt tokens found in kept pages; ratios are of served tokens per second.\n"
        "Shares of the window's time that are lost: host (the device had nothing to do), shape padding (empty rows\n"
        "of a compiled step), pages (empty rows while a request waited for KV pages), preemption (rows that\n"
        "computed tokens again). A rank slice runs one rank of a mesh with local copies in place of collectives;\n"
        "the network's time is then modelled from the hardware file.",
    )
    p.add_argument(
        "--model",
        help="'tiny', a name in configs/models, a config.json, a folder; on a GPU llama-3.1-8b when not given",
    )
    p.add_argument("--layers", type=positive, help="only so many layers of it; all when not given")
    p.add_argument(
        "--workload",
        default="constant:512:512",
        help="constant:PROMPT:OUTPUT; shared:PREFIX:PROMPT:OUTPUT[:GROUPS], where prompts of PROMPT tokens begin with "
        "one of GROUPS (1 when not given) common prefixes of PREFIX tokens; a name in configs/workloads; or a JSONL",
    )
    p.add_argument("--requests", type=positive, help="how many; enough for a steady state when not given")
    p.add_argument(
        "--compare",
        metavar="X",
        help="a second run with the same requests, and the ratio: X is a plan, or deterministic, no-prefix-caching "
        "(that option toggled), or xla-attention",
    )
    p.add_argument("--repeat", type=positive, default=1, metavar="N", help="N runs, or pairs of runs in turn")
    p.add_argument("--seconds", type=_seconds, help="end each run after so long; when the requests are used up")
    p.add_argument("--with-transformers", action="store_true", help="also run transformers continuous batching")
    p.add_argument(
        "--transformers-python", metavar="PATH", default=sys.executable, help="a Python with torch and transformers"
    )
    p.add_argument("--transformers-seconds", type=_seconds, default=300.0, metavar="S", help="its run ends then")
    p.add_argument("--rank-of", type=positive, metavar="N", help="run one rank of an N-way mesh on one device")
    p.add_argument("--inspect", action="store_true", help="with --rank-of: ask nanoflow inspect what stays exposed")
    p.add_argument("--gpu", help="a name in configs/hardware, or a TOML file; found out when not given")
    add_bench_options(
        p, "dtype", "memory_utilization", "enable_prefix_caching", "deterministic", "attention_backend",
        "kv_cache_dtype", "quantization",
    )  # fmt: skip
    p.add_argument("--one-shape", action="store_true", help="compile the largest step alone, which suits a full load")
    p.add_argument(
        "--accept-unsteady", action="store_true", help="measure the later half of a run without a steady state"
    )
    p.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy")
    p.add_argument("--seed", type=int, default=0, help="of lengths, prompts and weights")
    p.add_argument("--cpu-devices", type=positive, metavar="N", help="run on the CPU as N devices")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--plot", metavar="FILE", help="draw the rows of each step over time")
    p.add_argument("--quiet", action="store_true", help="no progress on standard error")
    p.add_argument("--verbose", action="store_true", help="log what was chosen")
    p.set_defaults(run=_throughput)


def _throughput(args: argparse.Namespace) -> int:
    check_outputs(args, "plot")
    if args.model is None:
        args.model = _usual_model(args.cpu_devices)
    from nanoflow_jax.bench import report, transformers_peer
    from nanoflow_jax.bench.compare import TOGGLES, measure_in_turn
    from nanoflow_jax.bench.throughput import measure
    from nanoflow_jax.models.registry import model_file
    from nanoflow_jax.plan.file import load_plan
    from nanoflow_jax.plan.known import AUTO
    from nanoflow_jax.system.platform import use_compile_cache

    use_compile_cache()
    options = _options(args)
    for name in (args.plan, args.compare):  # a misspelt one is found out before anything runs
        if name and name not in (AUTO, *TOGGLES):
            load_plan(name)
    peer = None
    if args.with_transformers:
        options = transformers_peer.settled(options)
        fields = json.loads(model_file(args.model).read_text())
        peer = transformers_peer.measure_transformers(
            options, fields, args.transformers_python, args.transformers_seconds
        )
    found = measure_in_turn(options, args.compare, args.repeat, measure)
    if args.plot:
        from nanoflow_jax.bench.plot import plot_reports

        plot_reports(found.shown, args.plot)
    ratio = found.shown[0].served_tokens_per_second_per_gpu / peer["tokens_per_second"] if peer else 0.0
    if args.json:
        against = {"transformers": peer, "ratio_to_transformers": ratio} if peer else {}
        print(json.dumps({**found.shown[0].to_json(), **_provenance(args), **found.to_json(), **against}, indent=1))
        return 0
    print("\n\n".join(report.text(r) for r in found.shown))
    if args.compare:
        print(f"\n{found.text()}")
    if peer:
        print(f"\n{transformers_peer.text(peer, ratio)}")
    return 0


def _usual_model(cpu_devices: int | None) -> str:
    """Raises ConfigError on a CPU, where 8B would take hours, and the machine's memory first."""
    import jax

    from nanoflow_jax.config import ConfigError

    if cpu_devices or jax.devices()[0].platform == "cpu":
        small = "--model tiny --workload constant:64:64 --tokens-per-step 128 --decode-slots 32"
        raise ConfigError(f"--model: one of a CPU's size is needed on a CPU; accepted: {small}")
    return "llama-3.1-8b"


def _options(args: argparse.Namespace) -> ThroughputOptions:
    from nanoflow_jax.bench.report import ThroughputOptions
    from nanoflow_jax.config import ConfigError
    from nanoflow_jax.hardware import load_hardware
    from nanoflow_jax.models.registry import model_config

    _, config = model_config(args.model)
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if config.dtype == "float16" else config.dtype
    layers = args.layers or config.num_layers
    if layers > config.num_layers:
        raise ConfigError(f"layers: {layers} is not accepted; the model has {config.num_layers}")
    if args.inspect and not args.rank_of:
        raise ConfigError("inspect: it adds the network to a rank slice; --rank-of N is needed too")
    names = ("requests", "seconds", "rank_of", "one_shape", "accept_unsteady", "temperature", "inspect")
    return ThroughputOptions(
        **llm_options(args).arguments(),
        config=replace(config, dtype=dtype, num_layers=layers, quantization=args.quantization or config.quantization),
        model_layers=config.num_layers,
        workload=_workload(args),
        hardware=load_hardware(args.gpu) if args.gpu else None,
        **{n: getattr(args, n) for n in names},
    )


def _workload(args: argparse.Namespace) -> Workload:
    """The workload; texts of a file are encoded by the tokenizer in the model's folder, if it has one."""
    from nanoflow_jax.models.registry import model_file
    from nanoflow_jax.workload import load_workload

    folder = model_file(args.model).parent
    if not (folder / "tokenizer.json").is_file():
        return load_workload(args.workload)
    from nanoflow_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder)
    return load_workload(args.workload, lambda text: tokenizer.encode(text, True))


def _provenance(args: argparse.Namespace) -> dict[str, Any]:
    versions = {name: version(name) for name in ("jax", "jaxlib")}
    return {
        "versions": {"python": platform.python_version(), "nanoflow_jax": __version__, **versions},
        "command": shlex.join(["nanoflow", *args.arguments]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cpus": os.cpu_count(),
    }
