"""`nanoflow bench batch`: what reading, tokenizing and writing cost a batch file."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from nanoflow_jax.commands.bench_pairs import add_pair_options, make_pair


def add(kinds: Any) -> None:
    """Adds the kind to `nanoflow bench`."""
    p = kinds.add_parser(
        "batch",
        help="throughput of a batch file beside that of the bare engine",
        description="Runs the same requests as `bench throughput` does and as `nanoflow batch` does, in turns, and\n"
        "prints the ratio of their tokens per second in the steady state.\n\n"
        "  nanoflow bench batch --model ./llama-8b --workload sharegpt --repeat 3",
    )
    add_pair_options(p, "enough for a steady state", "")
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from nanoflow_jax.bench.batch import measure_batch

    workload, llm = make_pair(args)
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
