"""`nanoflow bench replicas`: what a second replica brings."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from typing import Any

from nanoflow_jax.commands.options import add_bench_options, make_llm, positive


def add(kinds: Any) -> None:
    """Adds the kind to `nanoflow bench`."""
    p = kinds.add_parser(
        "replicas",
        help="throughput of several replicas beside that of one of them",
        description="Runs the same requests on one replica and on all, in turns, and prints the ratio of their tokens\n"
        "per second.\n\n"
        "  nanoflow bench replicas --model ./llama-8b --workload sharegpt --data-parallel-size 8",
    )
    p.add_argument("--model", default="tiny", help="'tiny', a local folder, or a Hub id")
    p.add_argument("--workload", default="constant:64:64", help="as for bench throughput")
    p.add_argument("--requests", type=positive, help="how many; 16 for each that runs at once when not given")
    p.add_argument("--repeat", type=positive, default=3, help="pairs of runs")
    add_bench_options(p, "data_parallel_size", "deterministic", "quantization", "kv_cache_dtype")
    p.set_defaults(data_parallel_size=2)
    p.add_argument("--seed", type=int, default=0, help="of lengths and prompts")
    p.add_argument("--cpu-devices", type=positive, metavar="N", help="run on the CPU, each replica as N devices")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--quiet", action="store_true", help="no progress on standard error")
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from contextlib import closing

    from nanoflow_jax.bench.replicas import measure_scaling
    from nanoflow_jax.models.registry import read_config
    from nanoflow_jax.weights.hub import resolve_model
    from nanoflow_jax.workload import load_workload

    workload = load_workload(args.workload)
    config = read_config(resolve_model(args.model, None) / "config.json")
    limit = args.max_model_len or workload.limit(config.max_position_embeddings)
    with closing(make_llm(args, max_model_len=limit, enable_prefix_caching=False)) as llm:
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
