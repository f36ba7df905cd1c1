"""The predicted timeline as a picture: memory, compute and network as lanes, a colour per nano-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch, Rectangle
from matplotlib.textpath import TextPath

from nanoflow_jax.timeline.timeline import Event, Timed
from nanoflow_jax.timeline.window import LANES, NanoBatches, PlanReport, nano_batch, window

COLORS = ("#2b6cb0", "#c2600c", "#2f8f5b", "#8a4fb0", "#8a6414", "#2d7d92")
PLAIN, WAIT, INK = "#b8bcc2", "#c62828", "#1d2430"
HEIGHT = 0.72  # of a lane's bar
LABELLED = ("gemm", "attention", "collective")
SIZES = (8.5, 7.5, 6.5, 6.0)  # of labels, points
LINE = 1.25  # a line's height over its letters' size
PAD = 0.03  # inches, at each end of a label
# Inches: of the axes, of a lane in them, and around them.
WIDTH, LANE, LEFT, RIGHT, TOP, BETWEEN, BOTTOM = 14.6, 0.78, 1.05, 0.3, 0.45, 0.72, 0.95


@cache
def text_inches(text: str, size: float) -> float:
    """Of a bold line."""
    return TextPath((0, 0), text, size=size, prop=FontProperties(weight="bold")).get_extents().width / 72


def fit(piece: str, layer: str, width: float, height: float) -> tuple[str, float, int] | None:
    """A label for a bar of so many inches: its text, size and rotation, None: it fits neither flat nor upright. The
    layer stands on a second line where there is room."""
    for size in SIZES:
        line = LINE * size / 72
        for along, across, rotation in ((width, height, 0), (height, width, 90)):
            for text in (f"{piece}\n{layer}", piece) if layer else (piece,):
                lines = text.split("\n")
                longest = max(text_inches(part, size) for part in lines)
                if longest + 2 * PAD <= along and len(lines) * line <= across:
                    return text, size, rotation
    return None


class _Lanes:
    """Bars of one timeline; those too narrow for their labels get them above, side by side, with a line to the bar."""

    def __init__(self, ax: Axes, origin: float, span: float):
        self.ax, self.origin = ax, origin
        box = ax.get_position()
        size = ax.figure.get_size_inches()  # pyright: ignore[reportAttributeAccessIssue] - of the whole figure
        self.inches = box.width * size[0] / span  # per microsecond
        self.height = HEIGHT * LANE
        self.above: dict[int, list[tuple[float, str, str]]] = {}

    def bar(self, event: Event, lane: int, color: str, inside: bool) -> None:
        start, us = event.start_us - self.origin, event.us
        box = Rectangle(
            (start, lane - HEIGHT / 2), us, HEIGHT, facecolor=color, edgecolor="white", linewidth=0.6,
            alpha=1 if inside else 0.22,
        )  # fmt: skip
        self.ax.add_patch(box)
        piece = event.piece
        if piece is None or event.kind not in LABELLED:
            return
        layer = "" if piece.layer is None else f"layer {piece.layer}"
        found = fit(f"{piece.op} {piece.piece}", layer, us * self.inches, self.height)
        middle = start + us / 2
        if found is None:
            self.above.setdefault(lane, []).append((middle, f"{piece.op} {piece.piece}", color))
            return
        text, size, rotation = found
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontweight": "bold", "clip_on": True}
        ink = "white" if inside else color
        self.ax.text(middle, lane, text, color=ink, fontsize=size, rotation=rotation, linespacing=1.1, **style)

    def write_above(self) -> None:
        """Each as near to its bar as those before it leave."""
        for lane, labels in self.above.items():
            free = -float("inf")
            top = lane + HEIGHT / 2
            for middle, text, color in sorted(labels):
                wide = (text_inches(text, SIZES[-1]) + 2 * PAD) / self.inches
                left = max(free, middle - wide / 2, 0.0)
                free = left + wide
                self.ax.plot([middle, left + wide / 2], [top, top + 0.07], color=color, linewidth=0.7, zorder=1)
                self.ax.text(
                    left + wide / 2, top + 0.075, text, color=color, fontsize=SIZES[-1], fontweight="bold",
                    ha="center", va="bottom", clip_on=True,
                )  # fmt: skip


def draw_timeline(
    ax: Axes,
    report: Timed,
    *,
    layers: tuple[int, int] | None = None,
    nano_batches: NanoBatches | None = None,
    title: str | None = None,
    longest: float | None = None,
) -> set[int]:
    """Draws layers (first, last) into axes whose place in the figure is fixed; returns the nano-batches seen.

    layers: None are two inner ones (`window`). nano_batches: the nano-batch of each (op, piece) whose number is
    another, such as KQV in four pieces; otherwise the piece's own number counts. title: what stands before the layers
    and their exposed time. longest: microseconds that the axes have room for, None: the layers'. Neighbouring layers
    that run in the window are drawn pale. Raises ConfigError.
    """
    shown = window(report, layers)
    start, end = shown.start_us, shown.end_us
    span = longest or end - start
    lanes = LANES if report.devices > 1 else LANES[:-1]
    used: set[int] = set()
    bars = _Lanes(ax, start, span)
    for event in report.timeline.events:
        if event.end_us <= start or event.start_us >= end or event.lane not in lanes:
            continue
        piece = event.piece
        inside = bool(piece and piece.layer is not None and shown.first <= piece.layer <= shown.last)
        color = PLAIN
        if piece:
            batch = nano_batch(piece, nano_batches or {})
            color = COLORS[(batch - 1) % len(COLORS)]
            used.add(batch)
        bars.bar(event, lanes[::-1].index(event.lane), color, inside)
        if event.exposed_us > 0 and event.stream == "network":
            wait = event.end_us - event.exposed_us - start
            stripe = Rectangle((wait, 1 - HEIGHT / 2), event.exposed_us, HEIGHT, facecolor="#fdecea", edgecolor=WAIT)
            stripe.set(hatch="////", linewidth=0.8)
            ax.add_patch(stripe)
    bars.write_above()
    inner = (shown.first, shown.last)
    exposed = sum(c.exposed_us for c in report.collectives if c.layer is not None and inner[0] <= c.layer <= inner[1])
    ax.set(xlim=(0, span), ylim=(-0.5, len(lanes) - 0.5))
    ax.set_yticks(range(len(lanes)), [lane.capitalize() for lane in lanes[::-1]], fontsize=11, color=INK)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#e3e6ea", linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    head = title or f"{report.hardware} x {report.devices}"
    waits = f": compute waits {exposed:.0f} µs for the network" if report.devices > 1 else ""
    ax.set_title(f"{head}, {shown.text}{waits}", loc="left", fontsize=12, color=INK)
    return used


def timeline_figure(lanes: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """A figure with axes below each other, of so many lanes each."""
    heights = [LANE * count for count in lanes]
    wide = LEFT + WIDTH + RIGHT
    high = TOP + sum(heights) + BETWEEN * (len(lanes) - 1) + BOTTOM
    figure = Figure(figsize=(wide, high), dpi=130)
    FigureCanvasAgg(figure)
    axes, top = [], high - TOP
    for height in heights:
        axes.append(figure.add_axes((LEFT / wide, (top - height) / high, WIDTH / wide, height / high)))
        top -= height + BETWEEN
    return figure, axes


def _finish(figure: Figure, ax: Axes, used: set[int], network: bool, path: str | Path | None) -> Figure:
    ax.set_xlabel("microseconds (predicted)")
    legend = [Patch(color=COLORS[(batch - 1) % len(COLORS)], label=f"nano-batch {batch}") for batch in sorted(used)]
    if network:
        legend.append(Patch(facecolor="#fdecea", edgecolor=WAIT, hatch="////", label="compute waits for the network"))
    legend.append(Patch(color=COLORS[0], alpha=0.22, label="other layers"))
    below = -0.52 / (ax.get_position().height * figure.get_size_inches()[1])
    ax.legend(
        handles=legend, loc="upper center", bbox_to_anchor=(0.5, below), ncols=len(legend), frameon=False, fontsize=9.5
    )
    if path is not None:
        figure.savefig(str(path))
    return figure


def _lane_count(report: Timed) -> int:
    return len(LANES) if report.devices > 1 else len(LANES) - 1


def plot(
    report: Timed | PlanReport,
    path: str | Path | None = None,
    *,
    layers: tuple[int, int] | None = None,
    nano_batches: Mapping[tuple[str, int], int] | None = None,
    title: str | None = None,
) -> Figure:
    """One timeline, as `draw_timeline` draws it, written when a path is given.

    An inspection and a simulation bring their nano-batches.
    """
    if isinstance(report, PlanReport):
        nano_batches, report = nano_batches or report.nano_batches, report.report
    figure, (ax,) = timeline_figure([_lane_count(report)])
    used = draw_timeline(ax, report, layers=layers, nano_batches=nano_batches, title=title)
    return _finish(figure, ax, used, report.devices > 1, path)


def plot_inspections(
    inspections: Sequence[PlanReport],
    path: str | Path | None = None,
    *,
    layers: tuple[int, int] | None = None,
) -> Figure:
    """The timelines of several plans, inspected or simulated, below each other, on one time scale.

    path: written to, when given; layers: (first, last), two inner ones of each when left out. Raises ConfigError.
    """
    reports = [inspection.report for inspection in inspections]
    figure, panels = timeline_figure([_lane_count(report) for report in reports])
    windows = [window(report, layers) for report in reports]
    longest = max(shown.end_us - shown.start_us for shown in windows)
    used: set[int] = set()
    for ax, inspection, report in zip(panels, inspections, reports, strict=True):
        used |= draw_timeline(
            ax,
            report,
            layers=layers,
            nano_batches=inspection.nano_batches,
            title=f"{inspection.plan.name} on {report.devices} x {report.hardware}",
            longest=longest,
        )
    return _finish(figure, panels[-1], used, any(report.devices > 1 for report in reports), path)
