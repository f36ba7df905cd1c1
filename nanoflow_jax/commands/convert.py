"""`nanoflow convert`: a model as an orbax checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    p = commands.add_parser(
        "convert",
        help="write a model as an orbax checkpoint",
        description="Writes a Hugging Face model as an orbax checkpoint that loads onto any mesh size.\n\n"
        "  nanoflow convert meta-llama/Llama-3.1-8B-Instruct ./llama-8b",
    )
    p.add_argument("model", metavar="MODEL", help="'tiny', a local folder, or a Hub id")
    p.add_argument("output", metavar="FOLDER", help="the checkpoint's folder; it must not exist, or be empty")
    p.add_argument("--revision", help="branch, tag or commit of a Hub id")
    p.add_argument("--dtype", default="auto", help="auto (as stored; float16 becomes bfloat16), bfloat16 or float32")
    p.add_argument(
        "--quantization", help="fp8: layers' weights rounded to float8_e4m3fn, half the bytes (default: as stored)"
    )
    p.add_argument("--quiet", action="store_true", help="no progress on standard error")
    p.set_defaults(run=_run, cpu_devices=1)


def _run(args: argparse.Namespace) -> int:
    from nanoflow_jax.system.interrupts import held_interrupts

    with held_interrupts():  # which some libraries would lose while they are imported
        from nanoflow_jax.system.progress import Progress
        from nanoflow_jax.weights.checkpoint import convert
        from nanoflow_jax.weights.hub import resolve_model

    with Progress(None, "converting", "B", not args.quiet) as bar:
        folder = convert(
            resolve_model(args.model, args.revision), Path(args.output), dtype=args.dtype,
            progress=lambda _, done, total: bar.report(done, total), quantization=args.quantization,
        )  # fmt: skip
    print(folder)
    return 0
