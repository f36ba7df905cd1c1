"""`nanoflow batch`: a file of requests in, a file of results out, unattended."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow_jax.commands.options import (
    add_chat_options,
    add_model_options,
    chat_settings,
    llm_options,
    make_llm,
    positive,
)
from nanoflow_jax.config import ConfigError
from nanoflow_jax.options import AS_MANY_AS_FIT
from nanoflow_jax.version import __version__

if TYPE_CHECKING:
    from nanoflow_jax.api import LLM
    from nanoflow_jax.chat import ChatSettings
    from nanoflow_jax.evaluate.batch import BatchReport, Settings
    from nanoflow_jax.evaluate.journal import Journal
    from nanoflow_jax.evaluate.lines import FileIdentity
    from nanoflow_jax.evaluate.manifest import Manifest
    from nanoflow_jax.tokenizer import Tokenizer

SAMPLING_OPTIONS = (
    ("max-tokens", int, "tokens to generate at most; 16 for a completion, up to the model's length for a chat"),
    ("temperature", float, "0 is greedy"),
    ("top-p", float, "keep the likeliest tokens that reach this probability together"),
    ("top-k", int, "keep this many likeliest tokens; 0 keeps all"),
)
UNKNOWN = "auto"  # in a manifest: the plan of replicas that have not told it yet


def add(commands: Any) -> None:
    """Adds the command to the parser; nothing heavy is imported before it runs."""
    p = commands.add_parser(
        "batch",
        help="answer a file of requests; killed at any moment, the same command continues",
        description="Answers every line of a file: requests in the OpenAI batch format (/v1/chat/completions,\n"
        '/v1/completions), or plain lines {"prompt": ...} with sampling fields beside it.\n\n'
        "  nanoflow batch -i requests.jsonl -o results.jsonl --model meta-llama/Llama-3.1-8B-Instruct\n\n"
        "A line that cannot be served gets an error record; the others run. Killed at any moment, the same command\n"
        "continues: nothing is answered twice, and nothing lost.",
    )
    p.add_argument("-i", "--input", required=True, metavar="FILE", help="requests, one JSON object per line")
    p.add_argument("-o", "--output", required=True, metavar="FILE", help="results; FILE.manifest.json is put beside it")
    p.add_argument("--ordered", action="store_true", help="at the end, put the results into the order of the input")
    add_run_options(p)
    p.add_argument("--served-model-name", metavar="NAME", help="what a request's 'model' must be; --model's value")
    sampling = p.add_argument_group(
        "sampling of requests that leave it open (else generation_config.json, else greedy)"
    )
    for name, kind, text in SAMPLING_OPTIONS:
        sampling.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text)
    sampling.add_argument("--seed", type=int, default=0, help="of requests that bring none, together with their line")
    add_chat_options(p, "lines that bring none")
    add_model_options(p)
    _add_ray_options(p)
    p.set_defaults(run=_run)


def _add_ray_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group(
        "replicas on a Ray cluster",
        "--data-parallel-size and --tensor-parallel-size by other names, on this machine or where RAY_ADDRESS says.",
    )
    group.add_argument("--ray", action="store_true", help="answer with several replicas")
    group.add_argument(
        "--ray-replicas", type=positive, metavar="N", help="how many; as many as GPUs hold when not given"
    )
    group.add_argument(
        "--ray-devices", type=positive, default=8, metavar="N",
        help="GPUs of each replica; with --cpu-devices those instead",
    )  # fmt: skip


def add_run_options(p: argparse.ArgumentParser) -> None:
    """What batch and eval share."""
    p.add_argument("--restart", action="store_true", help="put earlier results aside and begin anew")
    p.add_argument(
        "--allow-changed",
        action="store_true",
        help="continue although model, settings or input have changed: requests that are the same keep their results",
    )
    p.add_argument("--json", action="store_true", help="print the report as JSON")


def run_tokenizer(args: argparse.Namespace) -> Tokenizer:
    """Of a run, with its chat template. Raises ConfigError when there is no such model."""
    from nanoflow_jax.tokenizer import Tokenizer
    from nanoflow_jax.weights.hub import resolve_model, resolve_tokenizer

    own = resolve_tokenizer(args.tokenizer) if args.tokenizer else resolve_model(args.model, args.revision)
    return Tokenizer(own, args.chat_template)


def run_manifest(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    kind: str,
    output: Path,
    identity: dict[str, Any],
    about: dict[str, Any],
    chats: bool = True,
) -> Manifest:
    """Model, options and `identity`; `tokenizer` is that of the run. Reads the model's files; raises ConfigError when
    there is no such model.

    chats  prompts go through the chat template. Where that writes the time, it is the time at which the run of `output`
           began, on whatever day it is continued
    """
    from importlib.metadata import version

    from nanoflow_jax.engine.reasoning import find_reasoning
    from nanoflow_jax.evaluate.manifest import Manifest
    from nanoflow_jax.weights.fingerprint import model_fingerprint
    from nanoflow_jax.weights.hub import resolve_model

    if args.seed < 0:
        raise ConfigError(f"--seed: {args.seed} is not accepted; it must be at least 0")
    options = llm_options(args).identity()
    if args.tokenizer and Path(args.tokenizer).is_dir():
        options["tokenizer"] = model_fingerprint(Path(args.tokenizer))
    folder = resolve_model(args.model, args.revision)
    model = model_fingerprint(folder)
    reasoning = find_reasoning(tokenizer, args.reasoning_parser)
    options |= {
        "chat_template_kwargs": args.chat_template_kwargs or None,
        "reasoning_parser": None if reasoning is None else str(reasoning),
    }
    if chats and tokenizer.writes_the_time:
        identity = {**identity, "chat_time": _begun(output, args.restart)}
    devices = args.tensor_parallel_size or _devices(args)
    options |= {"plan": _plan(args, folder, devices, output), "devices": devices}
    del options["tensor_parallel_size"]
    versions = {"nanoflow_jax": __version__, "jax": version("jax")}
    told = {"model": args.model, "command": shlex.join(["nanoflow", *args.arguments]), "versions": versions, **about}
    return Manifest(kind, {"model": model, **options, **identity}, told)


def _plan(args: argparse.Namespace, folder: Path, devices: int, output: Path) -> str:
    """Name and digest of the plan that the LLM takes. Where only replicas on Ray can tell: what they took when the run
    of `output` began, or UNKNOWN."""
    from nanoflow_jax.api import auto_plan
    from nanoflow_jax.models.registry import read_config
    from nanoflow_jax.plan.file import load_plan

    if args.plan != "auto":
        return load_plan(args.plan).identity
    if args.data_parallel_size != 1 and not args.deterministic and not args.cpu_devices:
        return str(_kept(output, args.restart).get("plan", UNKNOWN))
    import jax

    config = read_config(folder / "config.json")
    config = replace(config, quantization=args.quantization or config.quantization)
    rows = (args.tokens_per_step, args.decode_slots, args.deterministic)
    return auto_plan(config, jax.devices()[0], devices, *rows).identity


def tell_plan(llm: LLM, output: Path, manifest: Manifest, may_change: bool) -> None:
    """What replicas have resolved `--plan auto` to: into the manifest of `output`, before a record of theirs is in it.
    Raises ConfigError where another plan is there."""
    from nanoflow_jax.evaluate.journal import manifest_path

    if llm.replicas is None:
        return
    plan, known = llm.plan.identity, str(manifest.identity["plan"])
    if plan == known:
        return
    if known != UNKNOWN and not may_change:
        raise ConfigError(
            f"--output: {output} holds results of another run: plan was {known} and is {plan} on "
            f"{llm.replicas.device_kind}; accepted: the same again by --plan, or --allow-changed"
        )
    replace(manifest, identity={**manifest.identity, "plan": plan}).write(manifest_path(output))


def _begun(output: Path, restart: bool) -> str:
    """When the run of `output` began: now, unless its manifest says."""
    kept = _kept(output, restart).get("chat_time")
    return datetime.now().isoformat(timespec="seconds") if kept is None else str(kept)


def _kept(output: Path, restart: bool) -> Mapping[str, Any]:
    """The identity of the run that is there and may be continued; empty when there is none."""
    from nanoflow_jax.evaluate.journal import manifest_path
    from nanoflow_jax.evaluate.manifest import Manifest

    beside = manifest_path(output)
    return Manifest.read(beside).identity if not restart and beside.exists() else {}


def chat_identity(chat: ChatSettings) -> dict[str, Any]:
    """Tools and documents of a whole run, where it has some."""
    return {name: list(given) for name in ("tools", "documents") if (given := getattr(chat, name)) is not None}


def chat_time(manifest: Manifest) -> datetime | None:
    """The time for chat templates that write it; None: they do not."""
    begun = manifest.identity.get("chat_time")
    try:
        return None if begun is None else datetime.fromisoformat(begun)
    except (TypeError, ValueError):
        raise ConfigError(f"--output: chat_time {begun!r} of its manifest is no time; --restart begins anew") from None


def _devices(args: argparse.Namespace) -> int:
    """Those of all processes; of replicas those of one."""
    if args.data_parallel_size != 1:
        from nanoflow_jax.replicas.layout import find_layout

        return find_layout(llm_options(args)).devices
    if args.cpu_devices and not (args.distributed or args.coordinator):
        return args.cpu_devices
    import jax

    return len(jax.devices())


def _run(args: argparse.Namespace) -> int:
    from nanoflow_jax.evaluate.batch import Requests, Settings, write_in_order
    from nanoflow_jax.evaluate.journal import Journal
    from nanoflow_jax.evaluate.lines import identify
    from nanoflow_jax.sampling_params import SamplingParams
    from nanoflow_jax.system.output_files import followed

    source, output = Path(args.input), followed(args.output)
    if not source.is_file():
        raise ValueError(f"--input: {source} is not a file; requests are read from one, so that a run can continue")
    if output.exists() and output.samefile(source):
        raise ValueError(f"--output: {output} is the input; name another file")
    names = [name.replace("-", "_") for name, _, _ in SAMPLING_OPTIONS]
    sampling = {name: getattr(args, name) for name in names if hasattr(args, name)}
    SamplingParams(**sampling)  # a bad setting is told before the model is loaded
    served = args.served_model_name or args.model
    _apply_ray_options(args)
    chat = chat_settings(args)
    found = identify(source)
    identity = {"input": found.sha256, "sampling": sampling, "served_model_name": served, **chat_identity(chat)}
    about = {"input": str(source), "input_bytes": found.size, "input_lines": found.lines}
    manifest = run_manifest(args, run_tokenizer(args), "batch", output, identity, about)
    settings = Settings(served, sampling, args.seed, now=chat_time(manifest), chat=chat)
    with Journal.open(
        output,
        manifest,
        restart=args.restart,
        allow_changed=args.allow_changed,
        pairing=lambda: Requests(source, (served,), found),
    ) as journal:
        if journal.told:
            print(f"--allow-changed: {journal.told}", file=sys.stderr)
        if journal.done and not args.quiet:
            print(f"continuing: {len(journal.done)} of {found.lines} lines have a result", file=sys.stderr)
        report = _answer(args, source, found, journal, settings, manifest)
        if args.ordered:
            journal.finish()
            write_in_order(output)
    print(json.dumps(_json(report, output)) if args.json else _text(report, output))
    return 0


def _apply_ray_options(args: argparse.Namespace) -> None:
    """--ray as the options of `LLM` that it stands for."""
    if not args.ray:
        return
    if args.data_parallel_size != 1:
        raise ConfigError("--ray: --data-parallel-size says the same; accepted: one of them")
    if args.ray_replicas == 1:
        raise ConfigError("--ray-replicas: 1 is the command without --ray; accepted: at least 2, or leave it out")
    args.data_parallel_size = args.ray_replicas or AS_MANY_AS_FIT
    if args.tensor_parallel_size is None:
        args.tensor_parallel_size = args.cpu_devices or args.ray_devices


def _answer(
    args: argparse.Namespace,
    source: Path,
    found: FileIdentity,
    journal: Journal,
    settings: Settings,
    manifest: Manifest,
) -> BatchReport:
    from nanoflow_jax.evaluate.batch import BatchReport, run_batch

    if len(journal.done) >= found.lines:
        return BatchReport(found.lines, journal.errors, found.lines, 0, 0, 0.0)
    try:
        with closing(make_llm(args)) as llm:
            tell_plan(llm, journal.path, manifest, args.allow_changed)
            return run_batch(llm, source, found, journal, settings, progress=not args.quiet)
    except KeyboardInterrupt:
        journal.finish()
        print(f"{journal.synced} of {found.lines} results are safe; the same command continues", file=sys.stderr)
        raise


def _json(report: BatchReport, output: Path) -> dict[str, Any]:
    from nanoflow_jax.evaluate.batch import unfinished_thoughts

    counted = {"unfinished_thoughts": unfinished_thoughts(output)}
    return {**asdict(report), "tokens_per_second": report.tokens_per_second, **counted}


def _text(report: BatchReport, output: Path) -> str:
    from nanoflow_jax.evaluate.batch import first_errors, unfinished_thoughts

    lines = [f"{report.lines} lines: {report.lines - report.errors} answered, {report.errors} with an error; {output}"]
    new = report.lines - report.done_before
    if report.done_before:
        lines.append(f"of these {report.done_before} were there before")
    if new:
        lines.append(
            f"{report.prompt_tokens} prompt and {report.completion_tokens} completion tokens in "
            f"{report.seconds:.1f} s: {report.tokens_per_second:.0f} tokens/s"
        )
    if report.errors:
        told = first_errors(output)
        lines += ["errors:", *(f"  {text}" for text in told)]
        if report.errors > len(told):
            lines.append(f'  and {report.errors - len(told)} more: lines with "error": {{ in {output}')
    if cut := unfinished_thoughts(output):
        lines.append(f"{cut} answers are missing: their thoughts had not ended")
    return "\n".join(lines)
