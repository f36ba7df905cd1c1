"""`nanoflow batch`: a file of requests in, a file of results out, unattended."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow_jax.commands.options import add_model_options, llm_options, make_llm
from nanoflow_jax.version import __version__

if TYPE_CHECKING:
    from nanoflow_jax.evaluate.batch import BatchReport, Settings
    from nanoflow_jax.evaluate.journal import Journal
    from nanoflow_jax.evaluate.lines import FileIdentity
    from nanoflow_jax.evaluate.manifest import Manifest
    from nanoflow_jax.evaluate.ray_data import RayOptions
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
    add_model_options(p)
    _add_ray_options(p)
    p.set_defaults(run=_run)


def _add_ray_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group(
        "many replicas", "On this machine, or on the Ray cluster that RAY_ADDRESS names; only here is anything written."
    )
    group.add_argument("--ray", action="store_true", help="answer with several replicas, by Ray Data")
    group.add_argument("--ray-replicas", type=int, metavar="N", help="how many; as many as GPUs hold when not given")
    group.add_argument(
        "--ray-devices", type=int, default=8, metavar="N", help="GPUs of each replica; with --cpu-devices those instead"
    )
    group.add_argument(
        "--ray-block", type=int, default=2048, metavar="LINES", help="lines that a replica answers at a time"
    )


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

    from nanoflow_jax.config import ConfigError
    from nanoflow_jax.engine.reasoning import find_reasoning
    from nanoflow_jax.evaluate.manifest import Manifest, model_fingerprint
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
    from nanoflow_jax.evaluate.manifest import plan_identity
    from nanoflow_jax.models.registry import read_config
    from nanoflow_jax.plan.plan import load_plan

    if args.plan != "auto":
        return plan_identity(load_plan(args.plan))
    if getattr(args, "ray", False) and not args.deterministic and not args.cpu_devices:
        return str(_kept(output, args.restart).get("plan", UNKNOWN))
    import jax

    config = read_config(folder / "config.json")
    config = replace(config, quantization=args.quantization or config.quantization)
    rows = (args.tokens_per_step, args.decode_slots, args.deterministic)
    return plan_identity(auto_plan(config, jax.devices()[0], devices, *rows))


class ReplicaPlan:
    """What replicas on Ray have resolved `--plan` to: into the manifest, before a record of theirs is written. Called
    with the plan and the kind of device of each. Raises ConfigError where it is not the manifest's, or not the same for
    all."""

    def __init__(self, output: Path, manifest: Manifest, allow_changed: bool):
        self._output, self._manifest, self._may_change = output, manifest, allow_changed
        self._first: tuple[str, str] | None = None

    def __call__(self, plan: str, device: str) -> None:
        from nanoflow_jax.config import ConfigError
        from nanoflow_jax.evaluate.journal import manifest_path

        first, known = self._first, str(self._manifest.identity["plan"])
        if first is not None and plan != first[0]:
            raise ConfigError(
                f"--plan: replicas would mix plans: {first[0]} on {first[1]}, {plan} on {device}; accepted: the name "
                "of one plan for all; the results so far are kept"
            )
        if first is None and plan != known:
            if known != UNKNOWN and not self._may_change:
                raise ConfigError(
                    f"--output: {self._output} holds results of another run: plan was {known} and is {plan} on "
                    f"{device}; accepted: the same again by --plan, or --allow-changed"
                )
            self._manifest = replace(self._manifest, identity={**self._manifest.identity, "plan": plan})
            self._manifest.write(manifest_path(self._output))
        self._first = first or (plan, device)


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


def chat_time(manifest: Manifest) -> datetime | None:
    """The time for chat templates that write it; None: they do not."""
    begun = manifest.identity.get("chat_time")
    try:
        return None if begun is None else datetime.fromisoformat(begun)
    except (TypeError, ValueError):
        from nanoflow_jax.config import ConfigError

        raise ConfigError(f"--output: chat_time {begun!r} of its manifest is no time; --restart begins anew") from None


def _devices(args: argparse.Namespace) -> int:
    """Those of all processes."""
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
    ray = _ray_options(args)
    found = identify(source)
    identity = {"input": found.sha256, "sampling": sampling, "served_model_name": served}
    about = {"input": str(source), "input_bytes": found.size, "input_lines": found.lines}
    manifest = run_manifest(args, run_tokenizer(args), "batch", output, identity, about)
    settings = Settings(served, sampling, args.seed, now=chat_time(manifest))
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
        report = _answer(args, source, found, journal, settings, manifest, ray)
        if args.ordered:
            journal.finish()
            write_in_order(output)
    print(json.dumps(_json(report)) if args.json else _text(report, output))
    return 0


def _ray_options(args: argparse.Namespace) -> RayOptions | None:
    """None without --ray. Raises ConfigError for what cannot be."""
    from nanoflow_jax.config import ConfigError

    if not args.ray:
        return None
    from nanoflow_jax.evaluate.ray_data import RayOptions

    for name in ("ray_replicas", "ray_devices", "ray_block"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: {value} is not accepted; it must be at least 1")
    if args.distributed or args.coordinator:
        raise ConfigError("--ray: a replica on Ray is one process; accepted: --ray, or several processes, not both")
    devices = args.cpu_devices or args.ray_devices
    if args.tensor_parallel_size is None:  # and not all that the driver's machine has
        args.tensor_parallel_size = devices
    return RayOptions(args.ray_replicas, devices, bool(args.cpu_devices), args.ray_block)


def _answer(
    args: argparse.Namespace,
    source: Path,
    found: FileIdentity,
    journal: Journal,
    settings: Settings,
    manifest: Manifest,
    ray: RayOptions | None,
) -> BatchReport:
    from nanoflow_jax.evaluate.batch import BatchReport, run_batch

    if len(journal.done) >= found.lines:
        return BatchReport(found.lines, journal.errors, found.lines, 0, 0, 0.0)
    try:
        if ray is not None:
            from nanoflow_jax.evaluate.ray_data import run_batch_on_ray

            model = manifest.identity["model"]
            return run_batch_on_ray(
                llm_options(args).arguments(), model, source, found, journal, settings, ray,
                ReplicaPlan(journal.path, manifest, args.allow_changed), progress=not args.quiet,
            )  # fmt: skip
        return run_batch(make_llm(args), source, found, journal, settings, progress=not args.quiet)
    except KeyboardInterrupt:
        journal.finish()
        print(f"{journal.synced} of {found.lines} results are safe; the same command continues", file=sys.stderr)
        raise


def _json(report: BatchReport) -> dict[str, Any]:
    return {**asdict(report), "tokens_per_second": report.tokens_per_second}


def _text(report: BatchReport, output: Path) -> str:
    from nanoflow_jax.evaluate.batch import first_errors

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
    return "\n".join(lines)
