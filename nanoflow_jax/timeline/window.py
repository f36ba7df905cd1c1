"""What of a timeline is shown: two inner layers, and the nano-batch of each event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from nanoflow_jax.config import ConfigError
from nanoflow_jax.plan.ops import APPEND, APPENDED
from nanoflow_jax.plan.plan import SchedulePlan
from nanoflow_jax.timeline.timeline import Piece, Timed

# From top to bottom: the network right under compute, so that a collective stands under the GEMM that hides it. One
# device has no network.
LANES = ("memory", "compute", "network")
NanoBatches = Mapping[tuple[str, int], int]


@runtime_checkable
class PlanReport(Protocol):
    """A plan, inspected or simulated. nano_batches: the nano-batch of each (op, piece)."""

    @property
    def plan(self) -> SchedulePlan: ...

    @property
    def report(self) -> Timed: ...

    @property
    def nano_batches(self) -> NanoBatches: ...


class Window(NamedTuple):
    """Layers first to last, and the microseconds from their first kernel's start to their last one's end. inner:
    neither the first nor the last layer of the timeline is among them."""

    first: int
    last: int
    start_us: float
    end_us: float
    inner: bool

    @property
    def text(self) -> str:
        span = f"layer {self.first}" if self.first == self.last else f"layers {self.first} to {self.last}"
        return span if self.inner else f"{span}, ends of the step among them"


def window(report: Timed, layers: tuple[int, int] | None = None) -> Window:
    """Of layers (first, last). None: the middle two of those between the first and the last; where there are fewer,
    what there is. Raises ConfigError."""
    known = sorted({e.piece.layer for e in report.timeline.events if e.piece and e.piece.layer is not None})
    if not known:
        raise ConfigError("plot: no instruction of this program could be traced to a layer; nothing to draw")
    inner = known[1:-1] or known
    middle = len(inner) // 2
    first, last = layers or (inner[max(0, middle - 1)], inner[middle])
    chosen = [
        e for e in report.timeline.events if e.piece and e.piece.layer is not None and first <= e.piece.layer <= last
    ]
    if not chosen:
        raise ConfigError(f"layers: {first} to {last} is not accepted; the program has {known[0]} to {known[-1]}")
    ends = min(e.start_us for e in chosen), max(e.end_us for e in chosen)
    return Window(first, last, *ends, inner=known[0] < first and last < known[-1])


def nano_batch(piece: Piece, nano_batches: NanoBatches) -> int:
    """Of an event. What is appended belongs to the piece that made it; a piece that the plan does not have, to that
    of its own number."""
    op = APPENDED if piece.op == APPEND else piece.op
    return nano_batches.get((op, piece.piece), piece.piece)
