"""The command line: `nanoflow COMMAND`. Results go to stdout or a file, progress and messages to stderr.

Exit status: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import logging
import os
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
    simulate,
)
from nanoflow_jax.commands.options import Parser
from nanoflow_jax.system.platform import UTILIZATION, claim_gpu_memory
from nanoflow_jax.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="nanoflow", description=__doc__)
    parser.add_argument("--version", action="version", version=f"nanoflow_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (
        generate, convert, models, layouts, inspect, bench, lm_eval, batch, eval, simulate, search, profile,
    ):  # fmt: skip
        command.add(commands)
    args = parser.parse_args(arguments)
    args.arguments = list(sys.argv[1:] if arguments is None else arguments)
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
