"""`nanoflow bench structured`: what structured outputs cost those beside them, and the host."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from nanoflow_jax.commands.options import add_bench_options, make_llm, number, positive


def add(kinds: Any) -> None:
    p = kinds.add_parser(
        "structured",
        help="throughput beside structured outputs, and the host's work for them",
        description="Runs as many requests as there are slots, in turns all without a form and with a JSON schema for\n"
        "a share of them, and prints how fast those without one are in each; then the host's microseconds for each\n"
        "constrained row and step, with a made-up vocabulary.\n\n"
        "  nanoflow bench structured --model ./llama-8b --share 0.25 --repeat 5",
    )
    p.add_argument("--model", default="tiny", help="'tiny', a local folder, or a Hub id")
    p.add_argument(
        "--share", type=number(lambda value: 0 < value <= 0.5, "a number above 0, at most 0.5"), default=0.25,
        help="of the requests that have a form",
    )  # fmt: skip
    p.add_argument("--prompt-tokens", type=positive, default=32, help="of each request")
    p.add_argument("--output-tokens", type=positive, default=128, help="of each request")
    p.add_argument("--repeat", type=positive, default=5, help="pairs of runs")
    p.add_argument(
        "--device-ms",
        type=positive,
        metavar="MS",
        help="on a CPU: each step seems to take so long on a device of its own; the model's own device when not given",
    )
    p.add_argument("--vocab", type=positive, default=128_256, help="size of the made-up vocabulary")
    p.add_argument("--rows", type=positive, default=64, help="constrained rows of a step, with that vocabulary")
    add_bench_options(p)
    p.add_argument("--cpu-devices", type=positive, metavar="N", help="run on the CPU as N devices")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--quiet", action="store_true", help="no progress on standard error")
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from nanoflow_jax.bench.structured import measure_host, measure_structured

    limit = args.max_model_len or args.prompt_tokens + args.output_tokens + 1
    llm = make_llm(args, max_model_len=limit, enable_prefix_caching=False, seed=0)
    cost = measure_structured(llm, args.share, args.prompt_tokens, args.output_tokens, args.repeat, args.device_ms)
    host = measure_host(args.vocab, args.rows)
    if args.json:
        print(
            json.dumps(
                {**asdict(cost), "ratio": cost.ratio, "cpu_ratio": cost.cpu_ratio, "host": [asdict(h) for h in host]},
                indent=1,
            )
        )
        return 0
    for pair in cost.pairs:
        print(
            f"none with a form {pair.free_seconds:.3f} s in {pair.steps[0]} steps, {cost.constrained} of "
            f"{cost.requests} with one {pair.mixed_seconds:.3f} s in {pair.steps[1]} steps: ratio {pair.ratio:.3f}, "
            f"of processor time {pair.cpu_ratio:.3f}; masks {pair.mask_us:.0f} us a constrained row and step"
        )
    print(
        "throughput of requests without a form, beside those with one / beside others: "
        f"{cost.ratio:.3f}, by processor time {cost.cpu_ratio:.3f} (medians)"
    )
    for h in host:
        print(
            f"vocabulary of {h.vocab}, {h.form}: mask {h.mask_us:.0f} us, token {h.take_us:.0f} us a row and step; "
            f"{h.rows} rows at once {h.both_us:.0f} us a row (tokenizer built once in {h.build_seconds:.1f} s)"
        )
    return 0
