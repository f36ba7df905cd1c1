"""The parser of the program and of each of its commands: help without noise, and errors of one line that name the
nearest accepted word."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from nanoflow_jax.options import VLLM_NAMES

# What an option is called elsewhere, by vLLM or by another command.
OTHER_NAMES = {f"--{theirs}".replace("_", "-"): f"--{ours}".replace("_", "-") for theirs, ours in VLLM_NAMES.items()}
SAME = (
    {"--tensor-parallel-size", "--devices", "--gpus", "--tp", "--num-gpus"},
    {"--max-tokens", "--max-new-tokens", "--max-completion-tokens"},
    {"--quantization", "--quantize"},
    {"--system", "--system-prompt", "--system-message"},
    {"--input", "--input-file", "--prompts", "--file"},
    {"--output", "--output-file", "--output-path", "--out"},
)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that names every default there is, and keeps examples as written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.help is not None and "(default: " in action.help
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if told or nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """The program's and, because they are made of the same class, each command's: an option is spelled out, so that a
    misspelt one is never taken for another."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, allow_abbrev=False, **{"formatter_class": Formatter, **options})

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride] - its overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """An unknown option is told before what is missing, which it was perhaps meant for."""
        if args is not None and "-" in self.prefix_chars:
            for word in args:
                if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                    break  # what follows is no option, or another parser's
                name = word.partition("=")[0]
                if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                    self.error(f"no option {name}; {self._near(name)}")
        return super().parse_known_args(args, namespace)

    def _near(self, name: str) -> str:
        known = [option for option in self._option_string_actions if option.startswith("--")]
        same = {OTHER_NAMES.get(name), *(other for names in SAME if name in names for other in names)}
        near = next((option for option in known if option in same), None)
        near = near or next(iter(get_close_matches(name, known, 1, 0.6)), None)
        return f"did you mean {near}?" if near else f"`{self.prog} --help` lists those there are"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            near = next(iter(get_close_matches(str(value), known, 1, 0.6)), None)
            hint = f"did you mean {near}? " if near else ""
            raise argparse.ArgumentError(action, f"{value!r} is not accepted; {hint}accepted: {', '.join(known)}")

    def error(self, message: str) -> NoReturn:
        """One line; --help has the forty of the usage."""
        self.exit(2, f"{self.prog}: {message}\n")
