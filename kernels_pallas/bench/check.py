"""Whether one kernel is right on this machine's GPU, more thoroughly than an engine asks before it starts.

    python -m kernels_pallas.bench.check decode_attention --repeats 100
    python -m kernels_pallas.bench.check prefill_attention --smallest --no-ping-pong

A JSON line per variant, as soon as it is known; a kernel that fails or hangs ends the process at that one. Exit status
0 when all are right, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

from kernels_pallas.bench.measure import interpret_on_cpu
from kernels_pallas.self_check import KERNELS, QUICK, THOROUGH, KernelError, check_variants
from kernels_pallas.self_check_cases import Heads, Variant
from kernels_pallas.tuning import (
    ADD_NORM,
    APPEND,
    DECODE,
    DEFAULT_GPU,
    GROUPED,
    PREFILL,
    PREFILL_STEP_PAGES,
    ROWS,
    AddNormTuning,
    AppendTuning,
    GroupedTuning,
    PrefillTuning,
    RowsTuning,
    page_bytes,
    tuned_gpu,
)

PROGRAM = "kernels_pallas.bench.check"
TUNINGS: dict[str, dict[str, Any]] = {
    "decode_attention": DECODE,
    "prefill_attention": PREFILL,
    "append_kv": APPEND,
    "add_rms_norm": ADD_NORM,
    "rows_to_fp8": ROWS,
    "grouped_gemm": GROUPED,
}
MODELS = (
    Heads(q_heads=8, kv_heads=1, head_dim=128, hidden=8192, ffn=3584),  # 70B rank
    Heads(q_heads=32, kv_heads=8, head_dim=128, hidden=4096, ffn=14336),  # 8B
)
TINY = (Heads(q_heads=2, kv_heads=2, head_dim=64, hidden=512, ffn=256),)  # for the interpreter


def changed(tuning: Any, stages: int | None, step_pages: int | None, ping_pong: bool) -> Any:
    """The tuning with fewer steps in flight, for head size 128 and bfloat16, pages of a step, or without taking turns.
    Raises ValueError where the kernel has no such thing."""
    prefill = isinstance(tuning, PrefillTuning)
    if step_pages is not None:
        if not hasattr(tuning, "step_pages"):
            raise ValueError("--step-pages: decode_attention alone has it")
        tuning = replace(tuning, step_pages=step_pages)
    if stages is not None:
        if isinstance(tuning, AddNormTuning | RowsTuning):
            tuning = replace(tuning, max_stages=stages)
        elif isinstance(tuning, AppendTuning | GroupedTuning):
            tuning = replace(tuning, stages=stages)
        else:
            pages = PREFILL_STEP_PAGES if prefill else tuning.step_pages
            tuning = replace(tuning, bytes_in_flight=stages * pages * page_bytes(128))
    if not ping_pong:
        if not prefill:
            raise ValueError("--no-ping-pong: prefill_attention alone takes turns")
        tuning = replace(tuning, ping_pong=False)
    return tuning


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--fp8", action="store_true", help="pages, and what norms give, of float8_e4m3fn")
    parser.add_argument("--window", type=int, help="of attention, too: tokens that a query sees")
    parser.add_argument("--repeats", type=int, default=0, help="more runs of each, compared bit for bit (default: 0)")
    parser.add_argument("--smallest", action="store_true", help="one variant for one model: for compute-sanitizer")
    parser.add_argument("--tuning", choices=sorted(DECODE), help="of the GPU (default: of the one at hand)")
    parser.add_argument("--stages", type=int, help="steps, or blocks, in flight, instead of the tuning's")
    parser.add_argument("--step-pages", type=int, choices=(1, 2), help="of decode attention, instead of the tuning's")
    parser.add_argument("--no-ping-pong", action="store_true", help="prefill's warpgroups do not take turns")
    parser.add_argument("--interpret", action="store_true", help="under the interpreter, on the CPU")
    return parser


def chosen(options: argparse.Namespace) -> tuple[tuple[Heads, ...], tuple[Variant, ...]]:
    """What is checked: heads of models, and variants of the kernel."""
    variants = QUICK[options.kernel]
    if not options.smallest:
        variants += THOROUGH[options.kernel]
    models = TINY if options.interpret else MODELS
    models = models[:1] if options.smallest else models
    windows = () if options.window is None else (options.window,)
    return tuple(replace(heads, fp8=options.fp8, quantised=options.fp8, windows=windows) for heads in models), variants[
        :1
    ] if options.smallest else variants


def tuning_of(options: argparse.Namespace, gpu: str) -> Any:
    """Raises ValueError, one line, for what the kernel's tuning does not take."""
    return changed(TUNINGS[options.kernel][gpu], options.stages, options.step_pages, not options.no_ping_pong)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    interpret: Any = None
    if options.interpret:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        interpret_on_cpu()
        interpret = plgpu.InterpretGPUParams()
    gpu = options.tuning or (DEFAULT_GPU if options.interpret else tuned_gpu(jax.devices()[0].device_kind))
    try:
        tuning = tuning_of(options, gpu)
    except ValueError as error:
        parser.error(str(error))
    models, variants = chosen(options)
    began = time.monotonic()
    try:
        for heads in models:
            for variant, error in check_variants(
                options.kernel, heads, variants, repeats=options.repeats, tuning=tuning, interpret=interpret
            ):
                record = {
                    "kernel": options.kernel + ("-fp8" if heads.fp8 else ""),
                    "heads": f"{heads.q_heads}/{heads.kv_heads}x{heads.head_dim}",
                    "variant": variant.text,
                    "error": error,
                    "repeats": options.repeats,
                    "seconds": round(time.monotonic() - began, 1),
                }
                print(json.dumps(record), flush=True)
    except KernelError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
