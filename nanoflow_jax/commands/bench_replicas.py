"""`nanoflow bench replicas`: what a second replica brings."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from typing import Any

from nanoflow_jax.commands.bench_pairs import add_pair_options, make_pair


def add(kinds: Any) -> None:
    """Adds the kind to `nanoflow bench`."""
    p = kinds.add_parser(
        "replicas",
        help="throughput of several replicas beside that of one of them",
        description="Runs the same requests on one replica and on all, in turns, and prints the ratio of their tokens\n"
        "per second.\n\n"
        "  nanoflow bench replicas --model ./llama-8b --workload sharegpt --data-parallel-size 8",
    )
    more = ("data_parallel_size", "deterministic", "quantization", "kv_cache_dtype")
    add_pair_options(p, "16 for each that runs at once", ", each replica", *more)
    p.set_defaults(data_parallel_size=2)
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from contextlib import closing

    from nanoflow_jax.bench.replicas import ONE_REPLICA, measure_scaling
    from nanoflow_jax.config import ConfigError

    if args.data_parallel_size == 1:
        raise ConfigError(ONE_REPLICA)
    workload, llm = make_pair(args)
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
