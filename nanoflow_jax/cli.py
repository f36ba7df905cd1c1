"""The command line: `nanoflow COMMAND`. Results go to stdout or a file, progress and messages to stderr.

Exit status: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import sys
from collections.abc import Sequence

from nanoflow_jax.commands import (
    batch,
    bench,
    convert,
    eval,
    generate,
    inspect,
    layouts,
    lm_eval,
    models,
    profile,
    search,
    serve,
    simulate,
)
from nanoflow_jax.commands.parser import Parser
from nanoflow_jax.system.platform import UTILIZATION, claim_gpu_memory
from nanoflow_jax.version import __version__

# By task: what a newcomer would type, command by command. The rest of the help is each command's own.
TASKS = (
    (
        "Ask a model (the embedded tiny runs on any machine)",
        (
            (generate, "generate '12+30=' 'reverse abc='"),
            (batch, "batch --input requests.jsonl --output results.jsonl"),
            (serve, "serve --port 8000"),
        ),
    ),
    (
        "Find out how good a model is",
        (
            (eval, "eval addition reverse --output runs/tiny"),
            (lm_eval, "lm-eval --tasks arc_easy --model_args pretrained=tiny"),
        ),
    ),
    (
        "Choose model, GPUs and plan, without a GPU",
        (
            (models, "models llama-3.1-70b"),
            (layouts, "layouts --model llama-3.1-70b --gpu h200 --gpus 8 --workload sharegpt"),
            (simulate, "simulate --plan nanoflow_70b --compare sequential"),
            (inspect, "inspect --model llama-3.1-70b --gpu h200 --plan nanoflow_70b --layers 4"),
            (search, "search --model llama-3.1-70b --gpu h200 --output my_plan.toml"),
        ),
    ),
    (
        "Measure on this machine",
        (
            (bench, "bench throughput --model tiny --workload constant:64:64 --tokens-per-step 128 --decode-slots 32"),
            (profile, "profile --model llama-3.1-70b --output h200-70b.jsonl"),
        ),
    ),
    (
        "Prepare a model",
        ((convert, "convert meta-llama/Llama-3.1-8B-Instruct ./llama-8b"),),
    ),
)


def make_parser() -> Parser:
    """The program's, whose help is by task."""
    parser = Parser(prog="nanoflow", usage="nanoflow COMMAND ...")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS, prog="nanoflow"
    )
    told = ["Throughput-first LLM inference in JAX. Results go to stdout or a file, progress and messages to stderr."]
    for title, steps in TASKS:
        told += ["", f"{title}:"]
        for command, example in steps:
            command.add(commands)
            told += [f"  nanoflow {example}", f"      {commands._choices_actions[-1].help}"]
    told += ["", "nanoflow COMMAND --help lists a command's options. Exit status: 0 done, 1 failed, 2 wrong usage."]
    parser.description = "\n".join(told)
    parser.add_argument("--version", action="version", version=f"nanoflow_jax {__version__}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; where it leaves the process (--help, wrong usage), by SystemExit."""
    try:
        try:
            return _main(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()  # else a reader that is gone is found out as Python ends
    except BrokenPipeError:  # `| head -1`: nobody wants the rest
        if not _reader_is_gone():
            raise
        return 1


def _reader_is_gone() -> bool:
    """Of standard output; what is left in its buffer then goes nowhere."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # no file: replaced, or closed
        return False
    pipe = select.poll()
    pipe.register(number, 0)
    gone = any(event & select.POLLERR for _, event in pipe.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return gone


def _main(arguments: list[str]) -> int:
    parser = make_parser()
    if not arguments:
        parser.print_help()
        return 0
    args = parser.parse_args(arguments)
    args.arguments = arguments
    if getattr(args, "quiet", False):
        _hush_libraries()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("nanoflow_jax").setLevel(logging.INFO if getattr(args, "verbose", False) else logging.WARNING)
    if getattr(args, "cpu_devices", None):
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["JAX_NUM_CPU_DEVICES"] = str(args.cpu_devices)
    claim_gpu_memory(
        getattr(args, "memory_utilization", UTILIZATION)
    )  # commands look for devices before there is an LLM

    def report(error: BaseException) -> int:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 1
        if isinstance(error, KeyboardInterrupt):
            line = "interrupted"
        elif isinstance(error, (ValueError, OSError)):  # ConfigError and WeightsError are ValueErrors
            line = " ".join(str(error).split())
        else:
            raise error
        print(f"nanoflow {args.command}: {line}", file=sys.stderr)
        return 1

    try:
        if getattr(args, "distributed", False) or getattr(args, "coordinator", None):
            from nanoflow_jax import distributed

            distributed.join(args.coordinator, args.num_processes, args.process_id, peer_timeout=args.peer_timeout)
            return distributed.run(lambda: args.run(args), report)
        return args.run(args)
    except BaseException as error:
        return report(error)


def _hush_libraries() -> None:
    """No warnings and no progress of other libraries, most of which are not imported yet; our own stay."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TF_CPP_MIN_LOG_LEVEL", "2"),
    ):
        os.environ.setdefault(name, value)
    logging.captureWarnings(True)
    for name in ("py.warnings", "jax", "transformers", "huggingface_hub", "absl", "orbax", "tensorstore"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
