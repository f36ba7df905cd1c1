"""`nanoflow eval`: how often a model is right, with the error of that figure."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow_jax.commands.batch import (
    add_run_options,
    chat_identity,
    chat_time,
    run_manifest,
    run_tokenizer,
    tell_plan,
)
from nanoflow_jax.commands.options import add_chat_options, add_model_options, chat_settings, make_llm
from nanoflow_jax.system.install import install_command

if TYPE_CHECKING:
    from nanoflow_jax.evaluate.prompts import Sample
    from nanoflow_jax.evaluate.tasks import Task


def add(commands: Any) -> None:
    """Adds the command to the parser; nothing heavy is imported before it runs."""
    p = commands.add_parser(
        "eval",
        help="score a model on tasks, with standard errors; compare two runs",
        description="Asks the questions of tasks and scores the answers. A folder keeps each question's record, the\n"
        "results as JSON and as a table, and a picture; killed at any moment, the same command continues.\n\n"
        "  nanoflow eval addition reverse --output runs/tiny\n"
        "  nanoflow eval my_task.yaml --output runs/b --model ./model --compare runs/a\n"
        "  nanoflow eval --list",
    )
    p.add_argument("tasks", nargs="*", metavar="TASK", help="a built-in task, or the path of a YAML or JSONL file")
    p.add_argument("--list", action="store_true", help="list the built-in tasks and stop")
    p.add_argument("-o", "--output", metavar="FOLDER", help="records and results; needed unless --list")
    p.add_argument("--limit", type=int, metavar="N", help="ask the first N questions of each task; all when not given")
    p.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question; the task's own number")
    p.add_argument("--compare", metavar="FOLDER", help="another run's folder: differences, paired by question")
    p.add_argument("--seed", type=int, default=0, help="of sampling, where a task samples without a seed of its own")
    add_chat_options(p, "tasks with chat: true")
    add_run_options(p)
    add_model_options(p)
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from nanoflow_jax.evaluate.prompts import samples
    from nanoflow_jax.evaluate.report import earlier_results
    from nanoflow_jax.evaluate.tasks import load_task, task_names

    if args.list:
        print("\n".join(f"{name:16} {load_task(name).description}" for name in task_names()))
        return 0
    if not args.tasks or not args.output:
        print("nanoflow eval: at least one TASK and --output FOLDER are needed (--list names tasks)", file=sys.stderr)
        return 2
    for name, low in (("limit", 1), ("num_fewshot", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')}: {value} is not accepted; it must be at least {low}")
    tasks = [load_task(name) for name in args.tasks]
    if args.num_fewshot is not None:
        tasks = [replace(t, fewshot=replace(t.fewshot, count=args.num_fewshot)) for t in tasks]
    if len({t.name for t in tasks}) < len(tasks):
        raise ValueError("TASK: two tasks have the same name; their records would share a file")
    asked = [samples(task, args.limit) for task in tasks]
    folder, other = Path(args.output), Path(args.compare) if args.compare else None
    if other is not None and not other.is_dir():
        raise ValueError(f"--compare: {other} is not a folder of an earlier run")
    folder.mkdir(parents=True, exist_ok=True)
    earlier_results(folder / "results.json", ())  # told before the work, not after it
    with ExitStack() as locked:
        _ask(args, tasks, asked, folder, locked)
        return _report(args, tasks, folder, other)


def _ask(
    args: argparse.Namespace, tasks: Sequence[Task], asked: Sequence[list[Sample]], folder: Path, locked: ExitStack
) -> None:
    """All tasks' records into the folder, whose files then are `locked`; the model is loaded when one is missing."""
    from nanoflow_jax.evaluate.journal import Journal
    from nanoflow_jax.evaluate.prompts import Questions
    from nanoflow_jax.evaluate.report import samples_path
    from nanoflow_jax.evaluate.run_task import run_task

    journals, manifests, tokenizer, chat = [], [], run_tokenizer(args), chat_settings(args)
    for task, questions in zip(tasks, asked, strict=True):
        rendered = json.dumps([asdict(q) for q in questions], sort_keys=True)
        identity = {"task": task.to_json(), "questions": hashlib.sha256(rendered.encode()).hexdigest()}
        if task.chat:
            identity |= chat_identity(chat)
        path = samples_path(folder, task.name)
        manifest = run_manifest(args, tokenizer, "eval", path, identity, {"count": len(questions)}, chats=task.chat)
        manifests.append(manifest)
        opened = Journal.open(
            path,
            manifest,
            restart=args.restart,
            allow_changed=args.allow_changed,
            pairing=partial(Questions, questions),
        )
        journals.append(locked.enter_context(opened))
        if opened.told:
            print(f"--allow-changed: {task.name}: {opened.told}", file=sys.stderr)
    left = [len(q) - len(j.done) for q, j in zip(asked, journals, strict=True)]
    if any(j.done for j in journals) and any(left) and not args.quiet:
        print(f"continuing: {sum(left)} of {sum(map(len, asked))} questions are left", file=sys.stderr)
    if not any(left):
        return
    with closing(make_llm(args)) as llm:
        for journal, manifest in zip(journals, manifests, strict=True):
            tell_plan(llm, journal.path, manifest, args.allow_changed)
        for task, questions, journal, manifest in zip(tasks, asked, journals, manifests, strict=True):
            now = chat_time(manifest)
            run_task(llm, task, questions, journal, progress=not args.quiet, now=now, chat=chat)


def _report(args: argparse.Namespace, tasks: Sequence[Task], folder: Path, other: Path | None) -> int:
    from nanoflow_jax.evaluate.manifest import write_durably
    from nanoflow_jax.evaluate.report import (
        changed_settings,
        compare,
        comparison_table,
        earlier_results,
        failures_line,
        provenance,
        results_table,
        samples_path,
        summarize,
    )

    results = [summarize(task, samples_path(folder, task.name)) for task in tasks]
    compared = [] if other is None else [c for t in tasks for c in compare(t.name, t.metrics, folder, other)]
    tables = [results_table(results)]
    if compared:
        tables.append(f"This run less {other}, paired by question:\n\n{comparison_table(compared)}")
    changed = [] if other is None else changed_settings([t.name for t in tasks], folder, other)
    if changed:
        tables.append("Settings there and here:\n\n" + "\n".join(f"- {text}" for text in changed))
    cut = [f"- {r.name}: {r.unfinished_thoughts} of {r.outputs}" for r in results if r.unfinished_thoughts]
    if cut:
        tables.append("Thoughts that had not ended when the output did, counted as wrong:\n\n" + "\n".join(cut))
    text, failed = "\n\n".join(tables), failures_line(results, folder)
    found = {r.name: r.to_json() | provenance(samples_path(folder, r.name)) for r in results}
    data: dict[str, Any] = {"model": args.model, "results": found}
    if compared:
        data["compare"] = {
            "folder": args.compare, "differences": [c.to_json() for c in compared], "settings": changed,
        }  # fmt: skip
    kept = earlier_results(folder / "results.json", found)
    stored = {**data, "results": {**kept, **found}}
    earlier = "Of earlier runs, in results.json: " + ", ".join(kept)
    written = [text, *([failed] if failed else []), *([earlier] if kept else [])]
    write_durably(folder / "results.json", (json.dumps(stored, indent=1) + "\n").encode())
    write_durably(folder / "results.md", ("\n\n".join(written) + "\n").encode())
    if find_spec("matplotlib") is not None:
        from nanoflow_jax.evaluate.plot import plot_results

        plot_results(results, folder / "results.png", compared, args.model)
    else:
        print(f"no picture: matplotlib is needed; {install_command('plot')}", file=sys.stderr)
    print(json.dumps(data) if args.json else text)
    if failed:
        print(f"nanoflow eval: {failed}", file=sys.stderr)
    return 1 if failed else 0
