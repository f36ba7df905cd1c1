"""`nanoflow layouts`: every way to use the GPUs of a node, the one that is predicted the fastest first."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nanoflow_jax.commands.options import positive
from nanoflow_jax.commands.simulate import add_machine, read_machine
from nanoflow_jax.system.table import table

if TYPE_CHECKING:
    from nanoflow_jax.search.layouts import Layout

GIB = 2**30


def add(commands: Any) -> None:
    p = commands.add_parser(
        "layouts",
        help="rank the ways to use a node: precision, GPUs per replica, replicas, KV pages, plan",
        description="Predicts every way to use all GPUs of a node on a workload: precision of weights and KV pages,\n"
        "GPUs of a replica, replicas, plan. The fastest is first; what does not fit is listed with the reason.\n\n"
        "  nanoflow layouts --model llama-3.1-70b --gpu h200 --gpus 8 --workload sharegpt\n"
        "  nanoflow layouts --model config.json --gpu h100_sxm --gpus 4 --all\n\n"
        "Times are predicted, as by nanoflow simulate. Replicas: --data-parallel-size of batch and eval.",
    )
    add_machine(p)
    p.add_argument("--gpus", type=positive, default=8, help="GPUs of the node, all of which are used")
    p.add_argument("--tokens-per-step", type=positive, default=2048, help="the most rows of a replica's step")
    p.add_argument(
        "--plans", nargs="+", metavar="PLAN",
        help="names in configs/plans, TOML files, or auto; auto and the three plain ones when not given",
    )  # fmt: skip
    p.add_argument("--all", action="store_true", help="show each layout with every plan, not with its best")
    p.add_argument("--json", action="store_true", help="print JSON: all layouts, with every plan")
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from nanoflow_jax.config import ConfigError
    from nanoflow_jax.search.layouts import PLANS, layouts
    from nanoflow_jax.step.attention import KernelBackends, page_dtype

    name, config, model, demand = read_machine(args)
    found = layouts(
        name, config, model, args.gpus, demand, tokens_per_step=args.tokens_per_step, plans=args.plans or PLANS
    )
    if found[0].refused:
        why = _refused(found, config.dtype)
        raise ConfigError(f"gpus: {name} fits on {args.gpus} x {model.hardware.name} in no layout: {why}")
    if args.json:
        data = {
            "predicted": True, "model": name, "gpu": model.hardware.name, "gpus": args.gpus, "workload": demand.name,
            "layouts": [
                {**asdict(layout), "tokens_per_second_per_gpu": layout.tokens_per_second_per_gpu} for layout in found
            ],
        }  # fmt: skip
        print(json.dumps(data, indent=1))
        return 0
    head = f"{name}, {demand.name}, {args.gpus} x {model.hardware.name}: predicted, not measured"
    notes = [_refused(found, config.dtype)] if found[-1].refused else []
    fp8 = KernelBackends.of("mosaic", page_dtype(config, "fp8"), config, 1)
    if fp8.prefill == "xla" and any(layout.kv_cache_dtype != "auto" for layout in found):
        notes.append("fp8 pages: prefill attention is counted as the kernel's; it is plain XLA so far, and slower")
    print("\n".join([head, text(found, config.dtype, args.all), *notes]))
    return 0


def text(found: Sequence[Layout], dtype: str, every_plan: bool) -> str:
    """Those that can run, as a table. dtype: of the model."""
    rows = [
        (
            "replicas", "GPUs each", "weights", "KV pages", "plan", "GiB weights", "KV tokens", "tokens_per_step",
            "decode_slots", "ms/token", "tokens/s", "per GPU", "to best",
        )
    ]  # fmt: skip
    seen = set()
    for at in found:
        kind = (at.quantization, at.kv_cache_dtype, at.devices)
        if at.refused or (kind in seen and not every_plan):
            continue
        seen.add(kind)
        rows.append(
            (
                str(at.replicas), str(at.devices), at.quantization or dtype,
                dtype if at.kv_cache_dtype == "auto" else at.kv_cache_dtype, f"{at.plan}{' (auto)' * at.auto}",
                f"{at.weight_bytes / GIB:.1f}", f"{at.kv_tokens:,}", str(at.tokens_per_step), str(at.decode_slots),
                f"{at.step_ms:.1f}", f"{at.tokens_per_second:,.0f}", f"{at.tokens_per_second_per_gpu:,.0f}",
                f"{at.tokens_per_second / found[0].tokens_per_second:.2f}",
            )
        )  # fmt: skip
    return table(rows, left=5)


def _refused(found: Sequence[Layout], dtype: str) -> str:
    """By reason, those that cannot run."""
    reasons: dict[str, list[str]] = {}
    for at in found:
        if at.refused:
            weights, pages = at.quantization or dtype, " with fp8 pages" * (at.kv_cache_dtype != "auto")
            reasons.setdefault(at.refused, []).append(f"{at.replicas} x {at.devices} {weights}{pages}")
    return "; ".join(f"not {', '.join(names)}: {why}" for why, names in reasons.items())
