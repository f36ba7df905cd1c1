"""What the kinds of `nanoflow bench` share that run the same requests in two ways, in turns."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nanoflow_jax.commands.options import add_bench_options, make_llm, positive

if TYPE_CHECKING:
    from nanoflow_jax.api import LLM
    from nanoflow_jax.workload import Workload


def add_pair_options(p: argparse.ArgumentParser, requests: str, devices: str, *options: str) -> None:
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


def make_pair(args: argparse.Namespace) -> tuple[Workload, LLM]:
    """The workload, and a model for it. Without prefix caching: the second run would find what the first computed."""
    from nanoflow_jax.models.registry import read_config
    from nanoflow_jax.weights.hub import resolve_model
    from nanoflow_jax.workload import load_workload

    workload: Any = load_workload(args.workload)
    config = read_config(resolve_model(args.model, None) / "config.json")
    limit = args.max_model_len or workload.limit(config.max_position_embeddings)
    return workload, make_llm(args, max_model_len=limit, enable_prefix_caching=False)
