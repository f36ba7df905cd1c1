"""`nanoflow lm-eval`: lm-evaluation-harness with the model "nanoflow"."""

from __future__ import annotations

import argparse
import sys
from typing import Any

_OTHER_COMMANDS = ("ls", "validate")


def add(commands: Any) -> None:
    """Adds the command to the parser. What follows it is lm-eval's own."""
    p = commands.add_parser(
        "lm-eval",
        prefix_chars="\0",  # no option is ours
        add_help=False,
        help="lm-evaluation-harness with this library as its model",
    )
    p.add_argument("arguments_of_lm_eval", nargs="*")
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from nanoflow_jax.config import ConfigError
    from nanoflow_jax.system.install import install_command
    from nanoflow_jax.weights.hub import go_offline_without_hub

    if go_offline_without_hub():
        print("the Hub cannot be reached: tasks and models come from the local cache alone", file=sys.stderr)
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging

        from nanoflow_jax.evaluate import lm_eval as adapter
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"lm-evaluation-harness is not installed ({error.name}); accepted: {install_command('lm-eval')}"
        ) from None
    given = list(args.arguments_of_lm_eval) or ["run", "--help"]
    if given[0] in ("-h", "--help"):
        print(f"{adapter.__doc__}\n{adapter.NanoflowLM.__doc__}\nAll other options are lm-eval's own:\n")
        given = ["run", "--help"]
    if given[0] not in _OTHER_COMMANDS:
        given = given if given[0] == "run" else ["run", *given]
        if not {"--model", "-M", "--config", "-C"} & {option.partition("=")[0] for option in given}:
            given[1:1] = ["--model", "nanoflow"]
    setup_logging()
    before, sys.argv = sys.argv, ["lm-eval", *given]  # where it reads them from
    try:
        harness = HarnessCLI()
        harness.execute(harness.parse_args())
    finally:
        sys.argv = before
    return 0
