"""The picture of a throughput run: the rows of each step over time, by what they were used for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nanoflow_jax.bench.report import ThroughputReport

BINS = 240  # more steps than that are averaged
KINDS = (("decode", "#2b6cb0"), ("prefill", "#dd7a1f"), ("empty", "#d5d8dc"))
INK = "#1d2430"


def _binned(report: ThroughputReport) -> tuple[np.ndarray, np.ndarray]:
    """Edges [n + 1] in seconds and rows [3, n] by kind, each step weighted by its time."""
    steps = report.steps
    finished = np.maximum.accumulate([steps[0].dispatched, *(s.finished for s in steps)])
    edges = finished - finished[0]
    seconds = np.diff(edges)
    rows = np.array([(s.decode_rows, s.prefill_rows, s.shape.rows - s.rows_used) for s in steps], float).T
    group = -(-len(steps) // BINS)
    starts = np.arange(0, len(steps), group)
    weights = np.maximum(np.add.reduceat(seconds, starts), 1e-9)
    return np.append(edges[starts], edges[-1]), np.add.reduceat(rows * seconds, starts, axis=1) / weights


def _draw(ax: Axes, report: ThroughputReport) -> None:
    edges, rows = _binned(report)
    tops = np.cumsum(rows, axis=0)
    low = np.zeros(rows.shape[1])
    for (name, color), top in zip(KINDS, tops, strict=True):
        ax.stairs(top, edges, baseline=low, fill=True, color=color, label=f"{name} rows")
        low = top
    assert report.span is not None
    first = report.span.started - report.steps[0].dispatched
    last = first + report.span.seconds
    height = float(tops.max())
    for edge in (first, last):
        ax.axvline(edge, color=INK, linewidth=1.2, linestyle="--")
    for start, stop in ((0.0, first), (last, edges[-1])):
        ax.axvspan(start, stop, color="white", alpha=0.55, linewidth=0)
    ax.annotate("", (first, height * 1.06), (last, height * 1.06), arrowprops={"arrowstyle": "<->", "color": INK})
    lost = report.lost
    note = f"measured: {report.tokens_per_second_per_gpu:,.0f} tokens/s/{report.unit}" + "".join(
        f" · {name.replace('_', ' ')} {lost[name]:.1%}" for name in ("host", "shape_padding", "pages", "preemption")
    )
    ax.text((first + last) / 2, height * 1.09, note, ha="center", va="bottom", fontsize=9.5, color=INK)
    ax.set(xlim=(0, edges[-1]), ylim=(0, height * 1.2), ylabel="rows per step")
    layers = "" if report.layers == report.model_layers else f" ({report.layers} of {report.model_layers} layers)"
    where = f"one rank of {report.rank_of}, network left out" if report.rank_of else f"{report.gpus} x {report.device}"
    ax.set_title(
        f"{report.model}{layers}, {report.workload}, plan {report.plan}, {where}", loc="left", fontsize=12, color=INK
    )
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def plot_reports(reports: Sequence[ThroughputReport], path: str | Path) -> Figure:
    """Writes a picture of one or several runs below each other; the format follows the file's name."""
    figure = Figure(figsize=(13, 1.0 + 3.8 * len(reports)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(reports), squeeze=False)[:, 0]
    for ax, report in zip(panels, reports, strict=True):
        _draw(ax, report)
    several = any(len({step.shape.rows for step in report.steps}) > 1 for report in reports)
    smaller = "; white within: steps of a smaller shape" if several else ""
    panels[-1].set_xlabel(f"seconds since the first step; pale: ramp and end, not measured{smaller}")
    panels[0].legend(loc="upper right", bbox_to_anchor=(1, 1.16), ncols=3, frameon=False, fontsize=9.5)
    figure.savefig(str(path))
    return figure
