"""What the commands share: the options of a model with the LLM that they make. Nothing heavy is imported."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nanoflow_jax.chat import MOST_BYTES, ChatSettings, check_kwargs, read_template
from nanoflow_jax.options import AS_MANY_AS_FIT, KINDS, OPTIONS, LLMOptions
from nanoflow_jax.system.install import install_command
from nanoflow_jax.system.reading import Malformed, one_line, parse_json, read_text


def check_outputs(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError when a file that these options name could not be written: before the work, not after it."""
    for name in names:
        path = getattr(args, name)
        if path is None:
            continue
        if Path(path).is_dir():
            raise ValueError(f"--{name}: {path} is a folder; name a file")
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"--{name}: {path}: its folder does not exist")
        if name == "plot" and find_spec("matplotlib") is None:
            raise ValueError(f"--plot: matplotlib is needed; {install_command('plot')}")


def add_html(p: argparse._ActionsContainer) -> None:
    p.add_argument(
        "--html", metavar="FILE", help="write one page for a browser: the plans side by side, timelines to zoom into"
    )


def add_pictures(p: argparse._ActionsContainer) -> None:
    """Of a command that makes timelines; `write_pictures` writes all but the page."""
    p.add_argument("--trace", metavar="FILE", help="write a Chrome/Perfetto trace, one lane per resource")
    p.add_argument("--plot", metavar="FILE", help="draw the timeline of two inner layers")
    add_html(p)


def write_pictures(args: argparse.Namespace, traced: Any, plotted: Sequence[Any]) -> None:
    if args.trace:
        from nanoflow_jax.timeline.chrome_trace import write_trace

        write_trace(traced, args.trace)
    if args.plot:
        from nanoflow_jax.timeline.plot import plot_inspections

        plot_inspections(plotted, args.plot)


def number(holds: Callable[[float], bool], accepted: str) -> Callable[[str], float]:
    """What reads a number for which `holds`; `accepted` says which those are."""

    def read(text: str) -> float:
        with suppress(ValueError):
            if holds(value := float(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; it must be {accepted}")

    return read


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; it must be an integer of at least 1")
    return int(text)


def replicas(text: str) -> int | str:
    if text == AS_MANY_AS_FIT:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not accepted; it must be an integer of at least 1, or {AS_MANY_AS_FIT!r}"
        )
    return int(text)


def port(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; it must be from 0 (a free one) to 65535")
    return int(text)


def json_object(text: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
        if not isinstance(found, dict):
            raise Malformed(f"a {type(found).__name__}, not an object")
        check_kwargs(found)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{one_line(text, 80)!r} is not a JSON object that can be used: {error}"
        ) from None
    return found


def template_text(path: str) -> str:
    try:
        text = read_template(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    assert text is not None
    return text


def json_objects(path: str) -> list[dict[str, Any]]:
    """A file that holds a JSON list of objects."""
    try:
        found = parse_json(read_text(path, MOST_BYTES))
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise Malformed("not a list of objects")
    except ValueError as error:  # ConfigError, Malformed, a path with a NUL
        told = one_line(str(error).removeprefix(f"{path}: "), 120)
        raise argparse.ArgumentTypeError(f"{path}: {told}; accepted: a file with a JSON list of objects") from None
    return found


def add_chat_options(p: argparse.ArgumentParser, of: str) -> None:
    """Tools and documents of all chats `of` a run."""
    for name, text in (
        ("tools", "functions that the model may call, as its template wants them"),
        ("documents", "documents to answer from, usually with title and text"),
    ):
        p.add_argument(f"--{name}", type=json_objects, metavar="FILE", help=f"{text}: a JSON list of objects, for {of}")


def chat_settings(args: argparse.Namespace) -> ChatSettings:
    """Of a command with `add_chat_options`."""
    return ChatSettings(tools=args.tools, documents=args.documents)


_READ: dict[str, tuple[str, Any]] = {  # of options: how a flag's argument is called, and what it is read by
    "data_parallel_size": ("N", replicas),
    "chat_template": ("FILE", template_text),
    "chat_template_kwargs": ("JSON", json_object),
    "reasoning_parser": ("TAGS", str),
}


def add_option(p: argparse._ActionsContainer, name: str, default: Any = None, *, none: str | None = None) -> None:
    """The flag of an option of `LLM`: `max_model_len` is --max-model-len, `enable_prefix_caching`
    --prefix-caching or --no-prefix-caching.

    default, none  in place of the option's own default, and of what None stands for
    """
    about, kind = OPTIONS[name], KINDS[name]
    default = getattr(LLMOptions, name, None) if default is None else default
    text = about.help.partition(". ")[0].replace('"', "")
    if default is None and about.none:
        text += f" (default: {none or about.none})"
    names = "|".join(other for other in OPTIONS if "_" in other)
    given: dict[str, Any] = {"help": re.sub(rf"\b({names})\b", lambda found: flag(found[0]), text)}
    if kind is bool:
        given["action"] = argparse.BooleanOptionalAction if default else "store_true"
    elif kind in (int, int | None):
        given["type"] = positive
    elif kind is float:
        given["type"] = float
    elif name in _READ:
        given["metavar"], given["type"] = _READ[name]
    p.add_argument(flag(name), dest=name, default=default, **given)


def add_mesh_size(p: argparse._ActionsContainer, text: str, default: int | None = None) -> None:
    """Of a command that has no `LLM`: the flag's name there, and a shorter one."""
    p.add_argument(
        "--tensor-parallel-size", "--devices", dest="devices", type=positive, default=default, metavar="N", help=text
    )


def add_bench_options(p: argparse._ActionsContainer, *more: str) -> None:
    """What both benchmarks of throughput have, and `more`."""
    add_option(p, "plan", "two_gather_one_reduce")
    add_option(p, "max_model_len", none="what the workload needs")
    names = ("tensor_parallel_size", "tokens_per_step", "decode_slots", "page_size", "kv_cache_tokens")
    for name in (*names, *more):
        add_option(p, name)


def flag(name: str) -> str:
    return f"--{name.removeprefix('enable_').replace('_', '-')}"


def add_model_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("model")
    for name, about in OPTIONS.items():
        if about.flag:
            add_option(group, name, "tiny" if name == "model" else None)
    group.add_argument("--cpu-devices", type=positive, metavar="N", help="run on the CPU as N devices")
    several = p.add_argument_group(
        "several processes as one replica",
        "The same command in each; process 0 alone reads input, writes output and shows progress.",
    )
    several.add_argument(
        "--distributed", action="store_true", help="join the processes that JAX finds: SLURM, Kubernetes, Open MPI"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="elsewhere: where process 0 listens")
    several.add_argument("--num-processes", type=positive, metavar="N", help="and how many there are")
    several.add_argument("--process-id", type=int, metavar="I", help="and which one this is, from 0")
    several.add_argument(
        "--peer-timeout", type=float, default=60, metavar="SECONDS",
        help="without a sign of life from another process, the run ends after so long",
    )  # fmt: skip
    group.add_argument(
        "--quiet", action="store_true", help="no progress, and no warnings of libraries, on standard error"
    )
    group.add_argument("--verbose", action="store_true", help="log what was chosen (attention backend, plan, mesh)")


def llm_options(args: argparse.Namespace) -> LLMOptions:
    """Of a command with options of `LLM`. Raises ConfigError."""
    given = {name: getattr(args, name) for name in OPTIONS if hasattr(args, name)}
    return LLMOptions(**given, progress=not args.quiet)


def make_llm(args: argparse.Namespace, **more: Any) -> Any:
    """The LLM of a command with options of it, `more` in place of those."""
    from nanoflow_jax.api import LLM

    return LLM(**replace(llm_options(args), **more).arguments())
