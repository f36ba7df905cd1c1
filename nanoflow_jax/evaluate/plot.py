"""The picture of an evaluation: values with their standard errors, this run beside another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanoflow_jax.evaluate.report import Comparison, TaskResult


def plot_results(
    results: Sequence[TaskResult], path: Path | None, compared: Sequence[Comparison] = (), title: str = ""
) -> Any:
    """A bar per task and metric; bars of error are one standard error. With a comparison, the other run's values stand
    beside, and the paired difference with its error on the right. Writes a PNG unless `path` is None; returns the
    figure."""
    from matplotlib.figure import Figure

    rows = [(f"{r.name}\n{m}", value) for r in results for m, value in r.metrics.items()]
    places = range(len(rows))
    figure = Figure(figsize=(10 if compared else 6.4, 1.2 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 2 if compared else 1, squeeze=False, sharey=True)[0]
    errors = [0.0 if value.n < 2 else value.stderr for _, value in rows]
    height = 0.38 if compared else 0.7
    shift = height / 2 if compared else 0
    axes[0].barh(
        [p - shift for p in places], [v.value for _, v in rows], height, xerr=errors, capsize=3, label="this run"
    )
    if compared:
        axes[0].barh([p + shift for p in places], [c.other for c in compared], height, label="other run", alpha=0.6)
        axes[0].legend(loc="lower left")
        differences = [c.difference for c in compared]
        axes[1].errorbar(
            [d.value for d in differences], list(places), xerr=[d.stderr if d.n > 1 else 0 for d in differences],
            fmt="o", capsize=3,
        )  # fmt: skip
        axes[1].axvline(0, color="grey", linewidth=1)
        axes[1].set_xlabel("this run - other run, paired by question")
    axes[0].set_yticks(list(places), [name for name, _ in rows])
    axes[0].invert_yaxis()
    axes[0].set_xlim(0, 1.05)
    axes[0].set_xlabel("value, with its standard error")
    if title:
        figure.suptitle(title)
    if path is not None:
        figure.savefig(path, dpi=120, format="png")
    return figure
