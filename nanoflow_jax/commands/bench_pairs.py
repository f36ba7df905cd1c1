"""`nanoflow bench batch` and `nanoflow bench replicas`: the same requests in two ways, in turns."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nanoflow_jax.commands.options import add_bench_options, make_llm, positive

if TYPE_CHECKING:
    from nanoflow_jax.api import LLM
    from nanoflow_jax.workload import Workload


def _add_options(p: argparse.ArgumentParser, requests: str, devices: str, *options: str) -> None:
    """requests, devices: the ends of their options' help; options: more of `LLM`'s."""
    p.add_argument("--model", default="tiny", help="'tiny', a local folder, or a Hub id")
    p.add_argument("--workload", default="constant:64:64", help="as for bench throughput")
    p.add_argument("--requests", type=positive, help=f"how many; {requests} when not given")
    p.add_argument("--repeat", type=positive, default=3, help="pairs of runs")
    add_bench_options(p, *options)
    p.add_argument("--seed", type=int, default=0, help="of lengths and prompts")
    p.add_argument("--cpu-devices", type=positive, metavar="N", help=f"run on the CPU{devices} as N devices")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--quiet", action="store_true", help="no progress on standard error")


def _make_pair(args: argparse.Namespace) -> tuple[Workload, LLM]:
    """The workload, and a model for it. Without prefix caching: the second run would find what the first computed."""
    from nanoflow_jax.models.registry import read_config
    from nanoflow_jax.weights.hub import resolve_model
    from nanoflow_jax.workload import load_workload

    workload: Any = load_workload(args.workload)
    config = read_config(resolve_model(args.model, None) / "config.json")
    limit = args.max_model_len or workload.limit(config.max_position_embeddings)
    return workload, make_llm(args, max_model_len=limit, enable_prefix_caching=False)


def add_batch(kinds: Any) -> None:
    p = kinds.add_parser(
        "batch",
        help="throughput of a batch file beside that of the bare engine",
        description="Runs the same requests as `bench throughput` does and as `nanoflow batch` does, in turns, and\n"
        "prints the ratio of their tokens per second in the steady state.\n\n"
        "  nanoflow bench batch --model ./llama-8b --workload sharegpt --repeat 3",
    )
    _add_options(p, "enough for a steady state", "")
    p.set_defaults(run=_batch)


def _batch(args: argparse.Namespace) -> int:
    from nanoflow_jax.bench.batch import measure_batch

    workload, llm = _make_pair(args)
    if args.plan == "auto":
        print(f"plan {llm.plan.name}: the one known for this model and device", file=sys.stderr)
    cost = measure_batch(llm, workload, args.requests, args.repeat, args.seed)
    if args.json:
        print(json.dumps({**asdict(cost), "ratio": cost.ratio, "device": llm.mesh.devices.flat[0].device_kind}))
        return 0
    for pair in cost.pairs:
        print(
            f"engine alone {pair.bare:9.1f} tokens/s, batch file {pair.batch:9.1f} tokens/s, ratio {pair.ratio:.3f}; "
            f"whole batch {pair.batch_seconds:.1f} s"
        )
    print(f"{cost.workload}, {cost.requests} requests: batch / engine alone = {cost.ratio:.3f} (median)")
    return 0


def add_replicas(kinds: Any) -> None:
    p = kinds.add_parser(
        "replicas",
        help="throughput of several replicas beside that of one of them",
        description="Runs the same requests on one replica and on all, in turns, and prints the ratio of their tokens\n"
        "per second.\n\n"
        "  nanoflow bench replicas --model ./llama-8b --workload sharegpt --data-parallel-size 8",
    )
    more = ("data_parallel_size", "deterministic", "quantization", "kv_cache_dtype")
    _add_options(p, "16 for each that runs at once", ", each replica", *more)
    p.set_defaults(data_parallel_size=2, run=_replicas)


def _replicas(args: argparse.Namespace) -> int:
    from nanoflow_jax.bench.replicas import ONE_REPLICA, measure_scaling
    from nanoflow_jax.config import ConfigError

    if args.data_parallel_size == 1:
        raise ConfigError(ONE_REPLICA)
    workload, llm = _make_pair(args)
    with closing(llm):
        found = measure_scaling(llm, workload, args.requests, args.repeat, args.seed)
    if args.json:
        print(json.dumps({**asdict(found), "ratio": found.ratio, "cores": os.cpu_count()}))
        return 0
    for one, many in zip(found.one, found.all, strict=True):
        print(f"one replica {one:9.1f} tokens/s, {found.replicas} replicas {many:9.1f} tokens/s, {many / one:.3f}")
    print(
        f"{found.workload}, {found.requests} requests, {os.cpu_count()} cores: {found.replicas} replicas of "
        f"{found.devices} devices / one = {found.ratio:.3f} (median)"
    )
    return 0
