"""`nanoflow inspect`: what a compiled step overlaps, exposes and costs, for a GPU that need not be there."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from typing import Any

from nanoflow_jax.commands.options import add_mesh_size, add_pictures, check_outputs, positive, write_pictures


def add(commands: Any) -> None:
    p = commands.add_parser(
        "inspect",
        help="compile a step for a GPU that need not be there, and report what overlaps",
        description="Compiles the real step for a GPU on a machine without one and reads the scheduled program.\n\n"
        "  nanoflow inspect --model llama-3.1-70b --gpu h200 --plan nanoflow_70b --layers 4\n"
        "  nanoflow inspect --plan nanoflow_70b --compare two_all_reduce sequential --layers 4 --plot plans.png",
    )
    p.add_argument(
        "--model", default="llama-3.1-70b", help="a name in configs/models, a config.json, or a folder with one"
    )
    p.add_argument("--gpu", default="h200", help="a name in configs/hardware, or a TOML file with the same fields")
    add_mesh_size(p, "GPUs in the mesh", 8)
    p.add_argument(
        "--plan", default="nanoflow_70b", help="a name in configs/plans, a TOML file, or auto: the one known"
    )
    p.add_argument("--compare", nargs="+", metavar="PLAN", default=[], help="other plans to show beside --plan")
    p.add_argument("--tokens-per-step", type=positive, default=2048, help="rows of the step")
    p.add_argument("--decode-tokens", type=int, help="how many of them decode; the plan's own when not given, else 5/8")
    p.add_argument("--context", type=int, default=1024, help="tokens of context per row, for the cost of attention")
    p.add_argument("--layers", type=int, help="compile only this many layers (totals are scaled); all when not given")
    p.add_argument("--attention-backend", default="auto", help="of decode attention: auto, mosaic (Hopper) or xla")
    p.add_argument("--quantization", help="of the layers' weights: fp8; as the model's when not given")
    p.add_argument("--kv-cache-dtype", default="auto", help="of the KV pages: auto (the model's), fp8 or fp8_e4m3")
    p.add_argument(
        "--xla-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="add or replace a compiler option; repeatable",
    )
    p.add_argument("--free-order", action="store_true", help="leave the issue order to XLA instead of the plan")
    p.add_argument("--json", action="store_true", help="print JSON: collectives, findings, totals, memory")
    add_pictures(p)
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # compile-only: a GPU that is present stays untouched
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # the compiler's own warnings; findings are reported here
    options = dict(_option(text) for text in args.xla_option)
    check_outputs(args, "trace", "plot", "html")

    from nanoflow_jax.hardware import load_hardware
    from nanoflow_jax.inspect.compare import compare
    from nanoflow_jax.inspect.step import inspect_step
    from nanoflow_jax.models.registry import model_config
    from nanoflow_jax.plan.known import check_sms, named_plan

    config, hardware = model_config(args.model)[1], load_hardware(args.gpu)
    config = replace(config, quantization=args.quantization or config.quantization)
    plans = [  # a misspelt one is found out before the others are compiled
        named_plan(plan, config, hardware.name, args.devices, args.tokens_per_step, args.decode_tokens)
        for plan in (args.plan, *args.compare)
    ]
    for plan in plans:
        check_sms(plan, hardware)
    inspections = []
    for plan in plans:
        print(f"compiling plan {plan.name} ...", file=sys.stderr)
        inspections.append(
            inspect_step(
                args.model,
                hardware,
                plan,
                devices=args.devices,
                tokens=args.tokens_per_step,
                decode_tokens=args.decode_tokens,
                context=args.context,
                layers=args.layers,
                attention_backend=args.attention_backend,
                kv_cache_dtype=args.kv_cache_dtype,
                quantization=args.quantization,
                options=options,
                enforce_order=not args.free_order,
            )
        )
    if args.json:
        data = [i.to_json() for i in inspections]
        print(json.dumps(data[0] if len(data) == 1 else data, indent=1))
    else:
        print("\n\n".join([*([compare(inspections)] if args.compare else []), *(i.text() for i in inspections)]))
    write_pictures(args, inspections[0].report, inspections)
    if args.html:
        from nanoflow_jax.inspect.page import write_inspections

        write_inspections(inspections, args.html)
    return 0


def _option(text: str) -> tuple[str, str | int | bool]:
    """ "KEY=VALUE" with true/false and integers read as such: XLA wants them typed."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ValueError(
            f"--xla-option: {text!r} is not accepted; it must be KEY=VALUE, such as xla_gpu_dot_merger_threshold_mb=32"
        )
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    return key, int(value) if value.lstrip("-").isdigit() else value
