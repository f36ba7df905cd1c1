"""The picture of an evaluation: values with their standard errors, this run beside another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nanoflow_jax.evaluate.metrics import Mean
from nanoflow_jax.evaluate.report import Comparison, TaskResult
from nanoflow_jax.system.output_files import create

THIS, OTHER, INK, LOSS = "#2b6cb0", "#dd7a1f", "#1d2430", "#c62828"
CERTAIN = 0.05  # the p-value below which a loss is marked


def plot_results(
    results: Sequence[TaskResult], path: Path | None = None, compared: Sequence[Comparison] = (), title: str = ""
) -> Figure:
    """A bar per task and metric, with one standard error. With a comparison (of the same tasks and metrics), the other
    run's bars stand below, and the paired differences with their errors on the right, losses that are no
    chance marked. Writes a PNG unless `path` is None."""
    rows = [(f"{r.name}\n{m}", value) for r in results for m, value in r.metrics.items()]
    places = list(range(len(rows)))
    figure = Figure(figsize=(11 if compared else 7, 1.6 + 0.6 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if compared else 1, squeeze=False, sharey=True)[0]
    height = 0.36 if compared else 0.6

    def bars(shift: float, values: Sequence[Mean], color: str, label: str) -> Any:
        at = [p + shift for p in places]
        lengths, errors = [v.value for v in values], [v.stderr if v.n > 1 else 0.0 for v in values]
        ink: dict[str, Any] = {"ecolor": INK, "capsize": 3, "error_kw": {"elinewidth": 1.2}}
        return axes[0].barh(at, lengths, height, xerr=errors, color=color, label=label, **ink)

    drawn = [bars(-height / 2 if compared else 0, [v for _, v in rows], THIS, "this run")]
    if compared:
        drawn.append(bars(height / 2, [c.other for c in compared], OTHER, "the other run"))
        figure.legend(handles=drawn, loc="outside lower left", ncols=2, frameon=False)
        found = [c.difference for c in compared]
        errors = [d.stderr if d.n > 1 else 0.0 for d in found]
        for difference, error, place in zip(found, errors, places, strict=True):
            lost = difference.n > 1 and difference.value < 0 and difference.p_value < CERTAIN
            color = LOSS if lost else INK
            axes[1].errorbar(difference.value, place, xerr=error, fmt="v" if lost else "o", color=color, capsize=3)
            style = {"ha": "center", "va": "bottom", "fontsize": 9, "color": color}
            text = f"{difference.value:+z.2f}{' worse' if lost else ''}"
            axes[1].annotate(text, (difference.value, place), (0, 6), textcoords="offset points", **style)
        axes[1].margins(x=0.25)
        axes[1].axvline(0, color="#b8bcc2", linewidth=1, zorder=0)
        axes[1].set_xlabel("this run less the other, paired by question, ± standard error")
    axes[0].set_yticks(places, [name for name, _ in rows])
    axes[0].invert_yaxis()
    axes[0].set(xlim=(0, 1.08), xlabel="score ± standard error")
    for ax in axes:
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", color=INK)
    if path is not None:
        with create(path) as file:
            figure.savefig(file, dpi=120, format="png")
    return figure
