"""A timeline as Chrome trace JSON, for ui.perfetto.dev or chrome://tracing: one lane per resource."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanoflow_jax.timeline.timeline import Event, Timed

LANES = ("compute", "memory", "network", "host")


def lane_of(event: Event) -> str:
    """Resource; kernels of a side stream get a lane of their own, because they overlap those of the compute stream."""
    side = event.stream not in ("compute", "network", "host")
    return f"{event.lane}, {event.stream}" if side else event.lane


def trace(report: Timed) -> dict[str, Any]:
    """Trace of a report: complete events ("X"), times in microseconds, sorted by start. The exposed part of a
    collective is its own event on the lane "waiting". One device has neither a network nor that lane."""
    one = report.devices == 1
    known = [lane for lane in LANES if not (one and lane == "network")]
    others = {lane_of(event) for event in report.timeline.events} - set(known)
    lanes = [*known, *sorted(others), *(() if one else ("waiting",))]
    number = {lane: i for i, lane in enumerate(lanes)}
    title = f"{report.hardware} x {report.devices}, predicted"
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": title}}]
    for lane, tid in number.items():
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": lane}})
        events.append({"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": tid, "args": {"sort_index": tid}})
    for event in sorted(report.timeline.events, key=lambda e: e.start_us):
        arguments = {
            "instruction": event.name,
            "kind": event.kind,
            "flops": event.flops,
            "bytes": event.bytes,
            "alone_us": round(event.alone_us, 3),
            "exposed_us": round(event.exposed_us, 3),
            "source": event.source,
            "pieces": [str(piece) for piece in event.pieces],
        }
        shared = {"ph": "X", "pid": 0, "cat": event.kind, "name": event.label, "args": arguments}
        events.append({**shared, "tid": number[lane_of(event)], "ts": event.start_us, "dur": event.us})
        if event.exposed_us > 0:
            start = event.end_us - event.exposed_us
            name = f"waiting for {event.label}"
            events.append({**shared, "name": name, "tid": number["waiting"], "ts": start, "dur": event.exposed_us})
    return {"displayTimeUnit": "ms", "traceEvents": events}


def write_trace(report: Timed, path: str | Path) -> None:
    """Writes the trace as a JSON file."""
    Path(path).write_text(json.dumps(trace(report)))
