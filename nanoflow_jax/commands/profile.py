"""`nanoflow profile`: measure the ops of a plan on this machine, into a table file."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow_jax.commands.options import add_mesh_size, positive

if TYPE_CHECKING:
    from nanoflow_jax.profile.run import Outcome
    from nanoflow_jax.profile.table import Table


def add(commands: Any) -> None:
    p = commands.add_parser(
        "profile",
        help="measure the ops of a plan on this machine, alone and in pairs, into a table file",
        description="Measures every op of the plans by its local shapes, alone and beside what may overlap it.\n\n"
        "  nanoflow profile --model llama-3.1-70b --output h200-70b.jsonl\n"
        "  nanoflow profile --model llama-3.1-70b --devices 8 --output rank.jsonl    # one GPU: one rank of eight\n"
        "  nanoflow profile --cpu-devices 8 --model tiny --tokens-per-step 256 --context 256 --points few\n\n"
        "A run that was stopped goes on where it was. Each point is on the disk before the next is measured.",
    )
    p.add_argument("--model", default="tiny", help="'tiny', a name in configs/models, a config.json, a folder")
    p.add_argument("--plan", default="all", help="a name in configs/plans, a TOML file, auto, or all of the GPU")
    add_mesh_size(p, "devices that share the model; all present when not given")
    p.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="of weights and pages")
    p.add_argument("--tokens-per-step", type=positive, default=2048, help="rows of the largest step")
    p.add_argument("--context", type=positive, default=8192, help="tokens of the longest context")
    p.add_argument("--page-size", type=positive, default=64, help="tokens per KV page")
    p.add_argument("--attention-backend", default="auto", choices=("auto", "xla", "mosaic"), help="and of KV append")
    p.add_argument("--points", default="normal", choices=("few", "normal", "dense"), help="how densely")
    p.add_argument("--ops", nargs="+", metavar="OP", help="only these: gemm, decode_attention, collective, pair, ...")
    p.add_argument("--output", default="profile.jsonl", metavar="FILE", help="the table; it is added to")
    p.add_argument("--force", action="store_true", help="begin anew where the file is another machine's or model's")
    p.add_argument("--cpu-devices", type=positive, metavar="N", help="run on the CPU as N devices")
    p.add_argument("--json", action="store_true", help="print the summary as JSON")
    p.add_argument("--quiet", action="store_true", help="no progress on standard error")
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    import jax

    from nanoflow_jax.config import configs_root
    from nanoflow_jax.hardware import hardware_of_device
    from nanoflow_jax.models.registry import model_config
    from nanoflow_jax.plan.file import load_plan
    from nanoflow_jax.plan.known import named_plan
    from nanoflow_jax.profile.run import profile

    name, config = model_config(args.model)
    if args.dtype != "auto":
        config = replace(config, dtype=args.dtype)
    here = hardware_of_device(jax.devices()[0].device_kind)
    if args.plan == "all":
        every = [load_plan(path.stem) for path in sorted((configs_root() / "plans").glob("*.toml"))]
        own = (here.name, config.quantization) if here else None
        plans = [p for p in every if p.target is None or (p.target.gpu, p.target.quantization) == own]
    else:
        devices = args.devices or len(jax.devices())
        plans = [named_plan(args.plan, config, here.name if here else None, devices, args.tokens_per_step)]
    outcome = profile(
        name,
        config,
        plans,
        Path(args.output),
        devices=args.devices,
        tokens=args.tokens_per_step,
        context=args.context,
        page_size=args.page_size,
        density=args.points,
        ops=args.ops,
        attention_backend=args.attention_backend,
        force=args.force,
        command=shlex.join(["nanoflow", *args.arguments]),
        progress=not args.quiet,
    )
    print(json.dumps(_summary(outcome), indent=1) if args.json else _text(outcome))
    return 0


def _summary(outcome: Outcome) -> dict[str, Any]:
    table = outcome.table
    return {
        "output": table.path,
        "points": outcome.planned,
        "measured_now": outcome.measured_now,
        "seconds": round(outcome.seconds, 1),
        "skipped": list(outcome.skipped),
        "failed": [{**point.to_json(), "failed": why} for point, why in table.failed.items()],
        "ops": _ops(table),
        "pairs": [
            {**pair.to_json(), "first_speed": t.first_speed, "second_speed": t.second_speed}
            for pair, t in table.pairs.items()
        ],
    }


def _ops(table: Table) -> list[dict[str, Any]]:
    """Of each op: how many points, the times' range, and the best rate: TFLOP/s of a GEMM, else GB/s."""
    found = []
    for op in dict.fromkeys(point.op for point in table.times):
        times = {point: timing.us for point, timing in table.times.items() if point.op == op}
        best = max(_rate(point, us) for point, us in times.items())
        unit = "TFLOP/s" if op == "gemm" else "GB/s"
        found.append(
            {
                "op": op,
                "points": len(times),
                "us_least": min(times.values()),
                "us_most": max(times.values()),
                "best": best,
                "unit": unit,
            }
        )
    return found


def _rate(point: Any, us: float) -> float:
    from nanoflow_jax.profile.kernels import kernel

    if point.op == "gemm":
        return 2.0 * point["m"] * point["n"] * point["k"] / us / 1e6
    return kernel(point, 64, "xla").set_bytes / us / 1e3


def _text(outcome: Outcome) -> str:
    table = outcome.table
    lines = [f"{'op':<18}{'points':>7}{'least us':>12}{'most us':>12}{'best':>12}"]
    lines += [
        f"{o['op']:<18}{o['points']:>7}{o['us_least']:>12.1f}{o['us_most']:>12.1f}{o['best']:>12.4g} {o['unit']}"
        for o in _ops(table)
    ]
    lines += ["", *_pair_lines(table)] if table.pairs else []
    lines += [f"not measured: {line}" for line in outcome.skipped]
    lines += [f"failed: {point.to_json()}: {why}" for point, why in table.failed.items()]
    lines.append(
        f"{table.path}: {outcome.measured_now} of {outcome.planned} points measured now, in {outcome.seconds:.0f} s"
    )
    return "\n".join(lines)


def _pair_lines(table: Table) -> Iterable[str]:
    yield f"{'side by side':<42}{'keeps':>7}{'keeps':>7}{'sum':>7}"
    for pair, timing in table.pairs.items():
        names = f"{_title(pair.first)} beside {_title(pair.second)}"
        a, b = timing.first_speed, timing.second_speed
        yield f"{names:<42}{a:>7.2f}{b:>7.2f}{a + b:>7.2f}"


def _title(point: Any) -> str:
    if point.op == "collective":
        return point["kind"]
    if point.op == "decode_attention" and point["sms"]:
        return f"GEMV on {point['sms']} SMs"
    return {"gemm": "GEMM", "decode_attention": "GEMV", "prefill_attention": "PF"}.get(point.op, point.op)
