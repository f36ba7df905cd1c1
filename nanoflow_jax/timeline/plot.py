"""The predicted timeline as a picture: memory, compute and network as lanes, a colour per nano-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from nanoflow_jax.config import ConfigError
from nanoflow_jax.plan.ops import APPEND, APPENDED
from nanoflow_jax.plan.plan import SchedulePlan
from nanoflow_jax.timeline.timeline import Event, Timed

# From top to bottom: the network right under compute, so that a collective stands under the GEMM that hides it.
LANES = ("memory", "compute", "network")  # one device has no network
COLORS = ("#2b6cb0", "#dd7a1f", "#2f8f5b", "#8a4fb0", "#b5872b", "#4a9fb5")
PLAIN, WAIT, INK = "#b8bcc2", "#c62828", "#1d2430"
HEIGHT = 0.72


@runtime_checkable
class PlanReport(Protocol):
    """A plan, inspected or simulated. nano_batches: the nano-batch of each (op, piece)."""

    @property
    def plan(self) -> SchedulePlan: ...

    @property
    def report(self) -> Timed: ...

    @property
    def nano_batches(self) -> Mapping[tuple[str, int], int]: ...


def _window(report: Timed, layers: tuple[int, int] | None) -> tuple[tuple[int, int], float, float]:
    """Layers (first, last), and the microseconds from their first kernel's start to their last one's end."""
    known = sorted({e.piece.layer for e in report.timeline.events if e.piece and e.piece.layer is not None})
    if not known:
        raise ConfigError("plot: no instruction of this program could be traced to a layer; nothing to draw")
    middle = len(known) // 2
    first, last = layers or (known[max(0, middle - 1)], known[min(middle, len(known) - 1)])
    chosen = [
        e for e in report.timeline.events if e.piece and e.piece.layer is not None and first <= e.piece.layer <= last
    ]
    if not chosen:
        raise ConfigError(f"layers: {first} to {last} is not accepted; the program has {known[0]} to {known[-1]}")
    return (first, last), min(e.start_us for e in chosen), max(e.end_us for e in chosen)


def _draw(ax: Axes, event: Event, lane: int, origin: float, color: str, inside: bool, inches_per_us: float) -> None:
    """One kernel. A label is written where it fits: flat, else upright, else not."""
    start, width = event.start_us - origin, event.us
    y = lane - HEIGHT / 2
    box = Rectangle(
        (start, y), width, HEIGHT, facecolor=color, edgecolor="white", linewidth=0.6, alpha=1 if inside else 0.22
    )
    ax.add_patch(box)
    if event.kind == "elementwise" or event.piece is None:
        return
    short = f"{event.piece.op} {event.piece.piece}"
    full = short if event.piece.layer is None else f"{short}\nlayer {event.piece.layer}"
    room, line = width * inches_per_us, 0.13
    ink = "white" if inside else color
    style: dict[str, Any] = {"ha": "center", "va": "center", "color": ink, "clip_on": True, "fontweight": "bold"}
    wide = max(len(part) for part in full.split("\n")) * 8.5 * 0.66 / 72
    if wide <= room:
        ax.text(start + width / 2, lane, full, fontsize=8.5, **style)
    elif room > line:
        ax.text(start + width / 2, lane, full if room > 2 * line else short, rotation=90, fontsize=7.5, **style)


def draw_timeline(
    ax: Axes,
    report: Timed,
    width_inches: float,
    *,
    layers: tuple[int, int] | None = None,
    nano_batches: Mapping[tuple[str, int], int] | None = None,
    title: str | None = None,
) -> set[int]:
    """Draws layers (first, last), the middle two when left out, into axes `width_inches` wide; returns the
    nano-batches seen.

    nano_batches: the nano-batch of each (op, piece) whose number is another, such as KQV in four pieces; otherwise the
    piece's own number counts. title: what stands before the layers and their exposed time. Neighbouring layers that
    run in the window are drawn pale. Raises ConfigError.
    """
    (first, last), start, end = _window(report, layers)
    lanes = LANES if report.devices > 1 else LANES[:-1]
    used: set[int] = set()
    for event in report.timeline.events:
        if event.end_us <= start or event.start_us >= end or event.lane not in lanes:
            continue
        piece = event.piece
        inside = bool(piece and piece.layer is not None and first <= piece.layer <= last)
        color = PLAIN
        if piece:
            op = APPENDED if piece.op == APPEND else piece.op  # appended by the piece that made them
            batch = (nano_batches or {}).get((op, piece.piece), piece.piece)
            color = COLORS[(batch - 1) % len(COLORS)]
            used.add(batch)
        _draw(ax, event, lanes[::-1].index(event.lane), start, color, inside, width_inches / (end - start))
        if event.exposed_us > 0 and event.stream == "network":
            wait = event.end_us - event.exposed_us - start
            stripe = Rectangle((wait, 1 - HEIGHT / 2), event.exposed_us, HEIGHT, facecolor="#fdecea", edgecolor=WAIT)
            stripe.set(hatch="////", linewidth=0.8)
            ax.add_patch(stripe)
    exposed = sum(c.exposed_us for c in report.collectives if c.layer is not None and first <= c.layer <= last)
    ax.set(xlim=(0, end - start), ylim=(-0.55, len(lanes) - 0.45))
    ax.set_yticks(range(len(lanes)), [lane.capitalize() for lane in lanes[::-1]], fontsize=11, color=INK)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#e3e6ea", linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    span = f"layer {first}" if first == last else f"layers {first} to {last}"
    head = title or f"{report.hardware} x {report.devices}"
    waits = f": compute waits {exposed:.0f} µs for the network" if report.devices > 1 else ""
    ax.set_title(f"{head}, {span}{waits}", loc="left", fontsize=12, color=INK)
    return used


def _figure(panels: int) -> Figure:
    figure = Figure(figsize=(16, 1.6 + 3.2 * panels), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(figure: Figure, ax: Axes, used: set[int], network: bool, path: str | Path | None) -> Figure:
    ax.set_xlabel("microseconds (predicted)")
    legend = [Patch(color=COLORS[(batch - 1) % len(COLORS)], label=f"nano-batch {batch}") for batch in sorted(used)]
    if network:
        legend.append(Patch(facecolor="#fdecea", edgecolor=WAIT, hatch="////", label="compute waits for the network"))
    legend.append(Patch(color=COLORS[0], alpha=0.22, label="other layers"))
    ax.legend(
        handles=legend, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=len(legend), frameon=False, fontsize=9.5
    )
    if path is not None:
        figure.savefig(str(path))
    return figure


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
    figure = _figure(1)
    ax = figure.add_subplot()
    used = draw_timeline(ax, report, 14.6, layers=layers, nano_batches=nano_batches, title=title)
    return _finish(figure, ax, used, report.devices > 1, path)


def plot_inspections(
    inspections: Sequence[PlanReport],
    path: str | Path | None = None,
    *,
    layers: tuple[int, int] | None = None,
) -> Figure:
    """The timelines of several plans, inspected or simulated, below each other, on one time scale.

    path: written to, when given; layers: (first, last), the middle two of each when left out. Raises ConfigError.
    """
    figure = _figure(len(inspections))
    panels = figure.subplots(len(inspections), squeeze=False)[:, 0]
    reports = [inspection.report for inspection in inspections]
    windows = [_window(report, layers) for report in reports]
    longest = max(end - start for _, start, end in windows)
    used: set[int] = set()
    for ax, inspection, report, (shown, start, end) in zip(panels, inspections, reports, windows, strict=True):
        used |= draw_timeline(
            ax,
            report,
            14.6 * (end - start) / longest,
            layers=shown,
            nano_batches=inspection.nano_batches,
            title=f"{inspection.plan.name} on {report.devices} x {report.hardware}",
        )
        ax.set_xlim(0, longest)
    return _finish(figure, panels[-1], used, any(report.devices > 1 for report in reports), path)
