"""The small kernels of a layer: what the compiled program runs beside GEMMs, attention and collectives.

Norms, rotary embedding, KV append, activations, and what nobody asked for: slices, concatenations, transposes. Each
costs a launch, and most read and write activations once more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow_jax.timeline.timeline import Timeline

SMALL = ("elementwise", "kernel")


@dataclass(frozen=True)
class SmallKernels:
    """Of one op in one layer: how many kernels, and how long they take alone."""

    op: str
    count: float
    us: float


def small_kernels(timeline: Timeline, layers: Sequence[int]) -> tuple[SmallKernels, ...]:
    """By op, averages over `layers`; the longest first."""
    counts: defaultdict[str, int] = defaultdict(int)
    times: defaultdict[str, float] = defaultdict(float)
    for event in timeline.events:
        if event.kind in SMALL and event.piece is not None and event.piece.layer in layers:
            counts[event.piece.op] += 1
            times[event.piece.op] += event.alone_us
    number = max(len(layers), 1)
    found = [SmallKernels(op, count / number, times[op] / number) for op, count in counts.items()]
    return tuple(sorted(found, key=lambda small: -small.us))


def text(found: Sequence[SmallKernels]) -> str:
    """A line of a report."""
    listed = ", ".join(f"{small.op} {small.count:g} ({small.us:.0f} us)" for small in found) or "none"
    count, us = sum(small.count for small in found), sum(small.us for small in found)
    return f"inner layer, kernels beside GEMMs, attention and collectives: {count:g}, {us:.0f} us: {listed}"
