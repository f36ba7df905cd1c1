"""Timelines as one self-contained page: plans side by side, a timeline each to zoom into, findings and memory.

`page.html` and `page.js` are the page; the data stand in it as JSON. It asks no network for anything.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from nanoflow_jax.timeline.chrome_trace import lane_of
from nanoflow_jax.timeline.timeline import Event
from nanoflow_jax.timeline.totals import InnerLayer
from nanoflow_jax.timeline.window import LANES, NanoBatches, PlanReport, nano_batch, window


@dataclass(frozen=True)
class Shown:
    """A plan on the page.

    figures   its row of the table, by column
    findings  of its compiled program, groups as `inspect.findings` makes them; None: nothing was compiled
    memory    bytes of one GPU, by what they are for
    more      lines by heading, folded: notes, the report's text, the plan's file
    """

    report: PlanReport
    inner: InnerLayer
    figures: Mapping[str, str]
    findings: Sequence[Mapping[str, Any]] | None
    memory: Mapping[str, int]
    more: Mapping[str, Sequence[str]]


def _event(event: Event, lanes: Sequence[str], batches: NanoBatches) -> dict[str, Any]:
    piece = event.piece
    return {
        "label": event.label,
        "op": piece.op if piece else None,
        "piece": piece.piece if piece else None,
        "layer": piece.layer if piece else None,
        "batch": nano_batch(piece, batches) if piece else None,
        "kind": event.kind,
        "bound": event.lane,
        "lane": lanes.index(lane_of(event)),
        "stream": event.stream,
        "start": round(event.start_us, 4),
        "end": round(event.end_us, 4),
        "alone": round(event.alone_us, 4),
        "exposed": round(event.exposed_us, 4),
        "bubble": round(event.bubble_us, 4),
        "bytes": round(event.bytes),
        "flops": round(event.flops),
        "source": event.source,
        "name": event.name,
    }


def _lengths(inner: InnerLayer, devices: int) -> str:
    waits = f", in which compute waits {inner.exposed_network_us:z.0f} µs for the network" if devices > 1 else ""
    return f"{inner.us:.0f} µs each{waits}"


def page_data(plans: Sequence[Shown], about: str) -> dict[str, Any]:
    """What `page.js` draws. Times are microseconds of a step, rounded to 0.1 ns; `window` and `extent` are from each
    plan's `origin` on, where its inner layers begin."""
    found, ends, extents = [], [], []
    for plan in plans:
        report, inner = plan.report.report, plan.inner
        shown = window(report)
        used = {lane_of(event) for event in report.timeline.events}
        lanes = sorted(used, key=lambda lane: ((*LANES, "host").index(lane.partition(",")[0]), lane))
        waits = (inner.interference_us, inner.exposed_network_us, inner.bubble_us)
        found.append(
            {
                "name": plan.report.plan.name,
                "about": f"on {report.devices} x {report.hardware}, {shown.text}: {_lengths(inner, report.devices)}",
                "origin": round(shown.start_us, 4),
                "layers": [shown.first, shown.last],
                "lanes": lanes,
                "events": [_event(event, lanes, plan.report.nano_batches) for event in report.timeline.events],
                "figures": dict(plan.figures),
                "parts": [round(part, 3) for part in (inner.us - sum(waits), *waits)],
                "findings": None if plan.findings is None else [dict(finding) for finding in plan.findings],
                "memory": list(plan.memory.items()),
                "more": {name: list(lines) for name, lines in plan.more.items()},
            }
        )
        ends.append(shown.end_us - shown.start_us)
        extents += [-shown.start_us, report.timeline.us - shown.start_us]
    return {"about": about, "plans": found, "window": [0, max(ends)], "extent": [min(extents), max(extents)]}


def page(plans: Sequence[Shown], title: str, about: str) -> str:
    """The page's text. title: its heading; about: a line below it. Raises ConfigError when there is no layer to
    show."""
    data = json.dumps(page_data(plans, about), separators=(",", ":"))
    own = files("nanoflow_jax.timeline")
    text = own.joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "title": html.escape(title),
        "script": own.joinpath("page.js").read_text(encoding="utf-8").strip(),
        "data": data.replace("<", "\\u003c"),  # nothing in it can end the element
    }
    first, *rest = text.split("{{")
    pieces = [(name, after) for name, _, after in (part.partition("}}") for part in rest)]
    return first + "".join(parts[name] + after for name, after in pieces)


def write_page(plans: Sequence[Shown], path: str | Path, title: str, about: str) -> None:
    """Writes the page, see `page`."""
    Path(path).write_text(page(plans, title, about), encoding="utf-8")
