"""When the ops of a step run, and what each collective runs beside: what the simulator predicts from a plan, and the
inspector from a compiled program. Both are drawn, traced and added up by the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

COMPUTE, NETWORK = "compute", "network"  # streams; there may be others beside them


class Piece(NamedTuple):
    """A plan's op piece; `layer` is None outside of layers, and `piece` counts from 1."""

    layer: int | None
    op: str
    piece: int

    def __str__(self) -> str:
        return f"{self.op}.{self.piece}" if self.layer is None else f"L{self.layer}/{self.op}.{self.piece}"


@dataclass(frozen=True)
class Event:
    """One instruction's run, microseconds from the step's start. lane: compute, memory, network or host, the
    resource that binds it.

    alone_us: how long it takes with the GPU to itself; exposed_us: how long the compute stream stood still for it, a
    collective; bubble_us: how long it stood still ahead of it, a kernel, for another reason.
    """

    name: str
    kind: str
    lane: str
    stream: str
    start_us: float
    end_us: float
    alone_us: float
    pieces: tuple[Piece, ...]
    flops: float
    bytes: float
    source: str
    exposed_us: float = 0.0
    bubble_us: float = 0.0

    @property
    def piece(self) -> Piece | None:
        return self.pieces[0] if self.pieces else None

    @property
    def us(self) -> float:
        return self.end_us - self.start_us

    @property
    def label(self) -> str:
        return str(self.piece) if self.piece else f"untraced:{self.name}"


@dataclass(frozen=True)
class Collective:
    """One collective. bytes: the whole tensor; wire_bytes: what each GPU sends. nano_batch is the piece's number.

    predicted_us: how long it takes alone; actual_us: in the timeline, slowed by what runs beside it; beside: the GEMM
    and attention pieces that run at the same time there, beside_other: the other kernels. between: the GEMM and
    attention pieces issued between its start and its done, whether it runs that long or not.
    """

    op: str | None
    nano_batch: int | None
    layer: int | None
    kind: str
    name: str
    bytes: int
    wire_bytes: int
    is_async: bool
    beside: tuple[str, ...]
    beside_other: tuple[str, ...]
    between: tuple[str, ...]
    predicted_us: float
    actual_us: float
    exposed_us: float
    start_us: float
    source: str


@dataclass(frozen=True)
class Timeline:
    """Events in order of issue, and the collectives. us: until the last stream is done; bubble_us: how long the compute
    stream stood still for another reason than the network, the end of the step included; sources: of times, and of the
    speeds of ops side by side. unknown_loops: ops of the loops whose trip count XLA does not give; their bodies are
    counted once. left_out_us: how much longer the branches that were not taken are."""

    events: tuple[Event, ...]
    collectives: tuple[Collective, ...]
    us: float
    bubble_us: float
    sources: tuple[str, ...]
    unknown_loops: tuple[str, ...] = ()
    left_out_us: float = 0.0


class Timed(Protocol):
    """What can be drawn and traced: a simulation, or the inspector's report."""

    @property
    def hardware(self) -> str: ...

    @property
    def devices(self) -> int: ...

    @property
    def timeline(self) -> Timeline: ...

    @property
    def collectives(self) -> tuple[Collective, ...]: ...
