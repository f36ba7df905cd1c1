"""`nanoflow bench batch`: what reading, tokenizing and writing cost a batch file."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from nanoflow_jax.commands.options import add_bench_options, make_llm, positive


def add(kinds: Any) -> None:
    """Adds the kind to `nanoflow bench`."""
    p = kinds.add_parser(
        "batch",
        help="throughput of a batch file beside that of the bare engine",
        description="Runs the same requests as `bench throughput` does and as `nanoflow batch` does, in turns, and\n"
        "prints the ratio of their tokens per second in the steady state.\n\n"
        "  nanoflow bench batch --model ./llama-8b --workload sharegpt --repeat 3",
    )
    p.add_argument("--model", default="tiny", help="'tiny', a local folder, or a Hub id")
    p.add_argument("--workload", default="constant:64:64", help="as for bench throughput")
    p.add_argument("--requests", type=positive, help="how many; enough for a steady state when not given")
    p.add_argument("--repeat", type=positive, default=3, help="pairs of runs")
    add_bench_options(p)
    p.add_argument("--seed", type=int, default=0, help="of lengths and prompts")
    p.add_argument("--cpu-devices", type=positive, metavar="N", help="run on the CPU as N devices")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--quiet", action="store_true", help="no progress on standard error")
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from nanoflow_jax.bench.batch import measure_batch
    from nanoflow_jax.models.registry import read_config
    from nanoflow_jax.weights.hub import resolve_model
    from nanoflow_jax.workload import load_workload

    workload = load_workload(args.workload)
    config = read_config(resolve_model(args.model, None) / "config.json")
    limit = args.max_model_len or workload.limit(config.max_position_embeddings)
    llm = make_llm(args, max_model_len=limit, enable_prefix_caching=False)
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
