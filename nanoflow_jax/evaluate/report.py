"""What came of an evaluation: results per task, as JSON and as tables, and two runs compared question by question."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nanoflow_jax.config import ConfigError
from nanoflow_jax.evaluate.journal import manifest_path
from nanoflow_jax.evaluate.manifest import Manifest
from nanoflow_jax.evaluate.metrics import Mean, PairedDifference, mean, paired_difference
from nanoflow_jax.evaluate.prompts import read_samples
from nanoflow_jax.evaluate.tasks import Task
from nanoflow_jax.system.reading import one_line, read_json_object


@dataclass(frozen=True)
class Failure:
    """A question that has no answer; it counts as wrong."""

    sample: str
    error: str


@dataclass(frozen=True)
class TaskResult:
    """metrics by name. filter: what was taken of the output, "none" for all of it. outputs: texts that were
    generated; of them unfinished_thoughts ended inside their thought, have no answer and count as wrong."""

    name: str
    version: str
    filter: str
    fewshot: int
    metrics: dict[str, Mean]
    failures: tuple[Failure, ...]
    outputs: int = 0
    unfinished_thoughts: int = 0

    def to_json(self) -> dict[str, Any]:
        return _plain(asdict(self))


@dataclass(frozen=True)
class Comparison:
    """One metric of one task in this run and in another, over the questions that both have."""

    task: str
    metric: str
    value: Mean
    other: Mean
    difference: PairedDifference
    unpaired: int  # questions that only one of the runs has

    def to_json(self) -> dict[str, Any]:
        return _plain(asdict(self))


def _plain(value: Any) -> Any:
    """Without NaN, which is no JSON: the standard error of a single question is null."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def samples_path(folder: Path, task: str) -> Path:
    """The per-sample log of a task in the folder of a run."""
    return folder / f"{task}.samples.jsonl"


def summarize(task: Task, path: Path) -> TaskResult:
    """From a complete per-sample log."""
    records = sorted(read_samples(path), key=lambda r: int(r["id"].rpartition("_")[2]))
    if not records or any(m not in r["scores"] for r in records for m in task.metrics):
        raise ConfigError(f"{path}: not a complete log of task {task.name!r}, judged by {', '.join(task.metrics)}")
    found = [r["output"] for r in records if "output" in r]
    outputs = [output if isinstance(output, list) else [output] for output in found]
    return TaskResult(
        name=task.name,
        version=task.version,
        filter="none" if task.extract is None else "extract",
        fewshot=task.fewshot.count,
        metrics={m: mean([r["scores"][m] for r in records]) for m in task.metrics},
        failures=tuple(Failure(r["sample"], r["error"]["message"]) for r in records if r["error"]),
        outputs=sum(map(len, outputs)),
        unfinished_thoughts=sum(output.count(None) for output in outputs),
    )


def provenance(path: Path) -> dict[str, Any]:
    """When the last answer of a per-sample log was written (UTC), and by what: the command and the versions with which
    the run began, the model, and all settings that can change a result."""
    manifest = Manifest.read(manifest_path(path))
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    told = {name: manifest.about[name] for name in ("model", "command", "versions") if name in manifest.about}
    return {"date": written.isoformat(timespec="seconds"), **told, "settings": dict(manifest.identity)}


def earlier_results(path: Path, tasks: Collection[str]) -> dict[str, Any]:
    """What a results file has of other tasks than these. Raises ConfigError where it is none."""
    if not path.exists():
        return {}
    found = read_json_object(path).get("results")
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: not the results of a run; accepted: another --output, or without this file")
    return {name: result for name, result in found.items() if name not in tasks}


def failures_line(results: Sequence[TaskResult], folder: Path) -> str:
    """All questions without an answer in one line; "" when there are none."""
    failed = [(result.name, failure) for result in results for failure in result.failures]
    if not failed:
        return ""
    asked = sum(next(iter(result.metrics.values())).n for result in results)
    per_task = ", ".join(f"{result.name} {len(result.failures)}" for result in results if result.failures)
    name, first = failed[0]
    return (
        f"{len(failed)} of {asked} questions have no answer and count as wrong ({per_task}); the first, {first.sample} "
        f"of {name}: {one_line(first.error, 200)}; all are in {folder / 'results.json'}"
    )


def changed_settings(tasks: Sequence[str], folder: Path, other: Path) -> list[str]:
    """What the runs' manifests do not have in common, each difference once, with its tasks where not all have it."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        mine, theirs = (manifest_path(samples_path(at, task)) for at in (folder, other))
        if not theirs.exists():
            continue
        texts = Manifest.read(theirs).differences(Manifest.read(mine))
        named = [text for text in texts if not text.startswith(("questions was", "chat_time was"))]
        if len(texts) > len(named) == 0 and any(text.startswith("questions") for text in texts):
            named = ["the text of questions"]
        for text in named:
            found.setdefault(text, []).append(task)
    return [text if len(of) == len(tasks) else f"{text} ({', '.join(of)})" for text, of in found.items()]


def compare(task: str, metrics: Sequence[str], folder: Path, other: Path) -> list[Comparison]:
    """This run's scores less the other's, paired by the questions' ids. Raises ConfigError when there is nothing to
    pair."""
    theirs_path = samples_path(other, task)
    if not theirs_path.is_file():
        raise ConfigError(f"--compare: {other} has no results of task {task!r} ({theirs_path.name} is missing)")
    mine = {r["sample"]: r for r in read_samples(samples_path(folder, task))}
    theirs = {r["sample"]: r for r in read_samples(theirs_path)}
    both = [name for name in mine if name in theirs]
    if not both:
        raise ConfigError(f"--compare: task {task!r} of {other} has none of this run's questions")
    if changed := [name for name in both if mine[name]["target"] != theirs[name]["target"]]:
        raise ConfigError(f"--compare: task {task!r}: question {changed[0]!r} has another target in {other}")
    found = []
    for metric in metrics:
        if any(metric not in theirs[name]["scores"] for name in both):
            raise ConfigError(f"--compare: task {task!r} of {other} was not judged by {metric!r}")
        new = [mine[name]["scores"][metric] for name in both]
        old = [theirs[name]["scores"][metric] for name in both]
        unpaired = len(mine) + len(theirs) - 2 * len(both)
        found.append(Comparison(task, metric, mean(new), mean(old), paired_difference(new, old), unpaired))
    return found


def results_table(results: Sequence[TaskResult]) -> str:
    """Markdown, in the shape of lm-eval's."""
    rows: list[tuple[str, ...]] = [("Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr")]
    for result in results:
        for i, (metric, value) in enumerate(result.metrics.items()):
            first = (result.name, result.version) if i == 0 else ("", "")
            shown = "N/A" if math.isnan(value.stderr) else f"{value.stderr:.4f}"
            rows.append((*first, result.filter, str(result.fewshot), metric, "↑", f"{value.value:.4f}", "±", shown))
    return _markdown(rows, right=(1, 3, 6, 8))


def comparison_table(found: Sequence[Comparison]) -> str:
    rows: list[tuple[str, ...]] = [("Tasks", "Metric", "n", "This", "Other", "Difference", "", "Stderr", "p-value")]
    for c in found:
        d = c.difference
        numbers = [
            f"{c.value.value:.4f}",
            f"{c.other.value:.4f}",
            f"{d.value:+.4f}",
            "±",
            f"{d.stderr:.4f}",
            f"{d.p_value:.3g}",
        ]
        rows.append((c.task, c.metric, str(d.n), *numbers))
    return _markdown(rows, right=(2, 3, 4, 5, 7, 8))


def _markdown(rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "|" + "|".join(cells) + "|"

    rule = "|" + "|".join("-" * (w - 1) + (":" if i in right else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])
