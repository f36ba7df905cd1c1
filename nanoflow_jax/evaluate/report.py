"""What came of an evaluation: results per task, as JSON and as tables, and two runs compared question by question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanoflow_jax.config import ConfigError
from nanoflow_jax.evaluate.metrics import Mean, PairedDifference, mean, paired_difference
from nanoflow_jax.evaluate.prompts import read_samples
from nanoflow_jax.evaluate.tasks import Task


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
        return asdict(self)


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
        return asdict(self)


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
