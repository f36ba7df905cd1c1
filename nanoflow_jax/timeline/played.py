"""From ops that were played to a timeline: what the compute stream stood still for, and what each collective ran
beside. The same for the simulator and the inspector."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from nanoflow_jax.cost.latency import LatencyModel
from nanoflow_jax.timeline.play import Op, Run, play
from nanoflow_jax.timeline.timeline import COMPUTE, NETWORK, Collective, Event, Piece, Timeline

HEAVY = ("gemm", "attention")
TINY_US = 1e-6  # of rounding


class NamedOp(Op, Protocol):
    """An op with what the reports say of it. kind: gemm, attention, kernel, elementwise, collective or host_copy;
    bytes: of the whole tensor of a collective, else of memory; collective: its HLO name; is_async: XLA runs it beside
    the compute stream."""

    @property
    def kind(self) -> str: ...

    @property
    def pieces(self) -> tuple[Piece, ...]: ...

    @property
    def bytes(self) -> float: ...

    @property
    def collective(self) -> str: ...

    @property
    def is_async(self) -> bool: ...


def waits(ops: Sequence[Op], runs: Sequence[Run]) -> tuple[dict[int, float], dict[int, float]]:
    """Microseconds that the compute stream stood still: for the network, by the network's op that ran meanwhile; and
    for another reason, by the compute op that came late. The end of the step waits for all, at place len(ops).

    An op waits for the network until the last of the collectives that it needs is done. The network is one queue, so
    that those ahead of it there are waited for too: the wait is shared out among all that run in it.
    """
    exposed: dict[int, float] = {}
    bubbles: dict[int, float] = {}
    network = [i for i, op in enumerate(ops) if op.stream == NETWORK]
    first, free = 0, 0.0

    def stood_still(place: int, start: float, needs: Iterable[int]) -> None:
        nonlocal first
        until = max((runs[need].end_us for need in needs), default=0.0)
        while first < len(network) and runs[network[first]].end_us <= free:
            first += 1
        left, k = start - free, first
        while k < len(network) and (run := runs[network[k]]).start_us < until:
            shared = min(until, run.end_us) - max(free, run.start_us)
            exposed[network[k]] = exposed.get(network[k], 0.0) + shared
            left, k = left - shared, k + 1
        if left > TINY_US:
            bubbles[place] = left

    for i, op in enumerate(ops):
        if op.stream == COMPUTE:
            if (start := runs[i].start_us) > free:
                stood_still(i, start, (need for need in op.needs if ops[need].stream == NETWORK))
            free = runs[i].end_us
    end = max((run.end_us for run in runs), default=0.0)
    if end > free:
        stood_still(len(ops), end, network)
    return exposed, bubbles


def timeline(
    ops: Sequence[NamedOp],
    model: LatencyModel,
    unknown_loops: tuple[str, ...] = (),
    left_out_us: float = 0.0,
) -> Timeline:
    """The ops, in issue order, played. Raises ValueError, see `play`."""
    played = play(ops, model)
    exposed, bubbles = waits(ops, played.runs)
    events = tuple(
        Event(
            name=op.name,
            kind=op.kind,
            lane=op.prediction.bound,
            stream=op.stream,
            start_us=run.start_us,
            end_us=run.end_us,
            alone_us=run.alone_us,
            pieces=op.pieces,
            flops=op.prediction.flops,
            bytes=op.bytes,
            source=op.prediction.source,
            exposed_us=exposed.get(i, 0.0),
            bubble_us=bubbles.get(i, 0.0),
        )
        for i, (op, run) in enumerate(zip(ops, played.runs, strict=True))
    )
    waiting = _first_to_need(ops)
    collectives = [
        _collective(op, events[i], list(beside(events[i], events)), events[i + 1 : waiting.get(i, len(ops))])
        for i, op in enumerate(ops)
        if op.kind == "collective"
    ]
    return Timeline(
        events=events,
        collectives=tuple(sorted(collectives, key=lambda collective: collective.start_us)),
        us=max((event.end_us for event in events), default=0.0),
        bubble_us=sum(bubbles.values()),
        sources=tuple(sorted({event.source for event in events} | played.sources)),
        unknown_loops=unknown_loops,
        left_out_us=left_out_us,
    )


def beside(one: Event, events: Iterable[Event]) -> Iterator[Event]:
    """The events of other streams that run at the same time."""
    for other in events:
        shared = min(one.end_us, other.end_us) - max(one.start_us, other.start_us)
        if other.stream != one.stream and shared > TINY_US:
            yield other


def _first_to_need(ops: Sequence[NamedOp]) -> dict[int, int]:
    """The place of the first op that waits for each op of another stream: behind its done."""
    first: dict[int, int] = {}
    for place, op in enumerate(ops):
        for need in op.needs:
            if ops[need].stream != op.stream:
                first.setdefault(need, place)
    return first


def _collective(op: NamedOp, event: Event, beside: Sequence[Event], between: Sequence[Event]) -> Collective:
    piece = event.piece
    return Collective(
        op=piece.op if piece else None,
        nano_batch=piece.piece if piece else None,
        layer=piece.layer if piece else None,
        kind=op.collective,
        name=event.name,
        bytes=int(op.bytes),
        wire_bytes=int(op.prediction.bytes),
        is_async=op.is_async,
        beside=_labels(other for other in beside if other.kind in HEAVY),
        beside_other=_labels(other for other in beside if other.kind not in HEAVY),
        between=_labels(other for other in between if other.kind in HEAVY),
        predicted_us=event.alone_us,
        actual_us=event.us,
        exposed_us=event.exposed_us,
        start_us=event.start_us,
        source=event.source,
    )


def _labels(events: Iterable[Event]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(event.label for event in events))
