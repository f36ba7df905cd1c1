"""When each instruction of a compiled program would run, and what each collective runs beside.

The scheduled order is played on streams that are each in order, as XLA's runtime does: kernels on the compute stream,
collectives on the network's, `call-start` regions and host copies on their own. A start waits for what the compute
stream holds at that point; a done makes the compute stream wait. Durations are `search.latency`'s, each op as if
alone on the GPU: what two kernels lose by sharing SMs and memory is not in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import count

from nanoflow_jax.inspect.costs import CONTROL, Cost, CostModel
from nanoflow_jax.inspect.hlo import Computation, Instruction, Module
from nanoflow_jax.search.timeline import Collective, Event, Piece, Timeline

HEAVY = ("gemm", "attention")
LANES = {"compute": "compute", "memory": "memory", "network": "network", "host": "host"}


@dataclass
class _Open:
    """A start whose done has not come. `beside` fills up meanwhile; `at` is the event's place in the list (a
    region has none)."""

    event: Event
    instruction: Instruction
    cost: Cost
    at: int | None = None
    beside: list[Event] = field(default_factory=list)


def is_sync(instruction: Instruction) -> bool:
    """Whether XLA will run a collective on the compute stream."""
    return not instruction.opcode.endswith("-start") or '"is_sync":true' in instruction.config


def trip_count(instruction: Instruction) -> int | None:
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.config)
    return int(found.group(1)) if found else None


def _names(events: Iterable[Event]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(event.label for event in events))


class _Player:
    """Plays computations in order. State of one simulation; `simulate` is the door."""

    def __init__(self, model: CostModel) -> None:
        self.model = model
        self.module: Module = model.module
        self.clock = {"compute": 0.0}
        self.open: dict[int, _Open] = {}
        self.keys = count()
        self.events: list[Event] = []
        self.closed: list[_Open] = []
        self.sent: list[int] = []  # places of the network's events
        self.exposed: dict[int, float] = {}  # place of an event → how long the compute stream stood still for it
        self.inside: tuple[Piece, ...] = ()  # pieces of the loop, branch or region that is being played
        self.unknown_loops: dict[str, None] = {}
        self.waited_us = 0.0  # compute stream standing still for other than the network
        self.cache: dict[tuple[str, str], Cost] = {}

    def cost(self, computation: Computation, instruction: Instruction) -> Cost:
        key = (computation.name, instruction.name)
        if key not in self.cache:
            self.cache[key] = self.model.of_instruction(computation, instruction)
        return self.cache[key]

    def record(self, instruction: Instruction, cost: Cost, stream: str) -> Event:
        """Puts a run at the end of a stream, after what the compute stream holds now when it is another."""
        start = self.clock["compute"]
        if stream != "compute":
            start = max(start, self.clock.get(stream, 0.0))
        end = start + cost.prediction.us
        self.clock[stream] = end
        lane = LANES.get(cost.prediction.bound, "memory")
        # XLA shares a loop's body between layers: inside one, the loop's own name says whose work it is.
        pieces = self.inside or cost.pieces
        source = cost.prediction.source
        event = Event(instruction.name, cost.kind, lane, stream, start, end, pieces, cost.flops, cost.bytes, source)
        self.events.append(event)
        if stream == "network":
            self.sent.append(len(self.events) - 1)
        if cost.kind not in ("collective", "host_copy"):
            for other in self.open.values():
                other.beside.append(event)
        return event

    def run(self, computation: Computation, stream: str = "compute") -> None:
        started: dict[str, int] = {}  # name in this computation → key of `open`
        for instruction in computation.instructions:
            if instruction.opcode.endswith("-done") or instruction.opcode == "async-update":
                source = started.get(instruction.operands[0]) if instruction.operands else None
                if source is not None and instruction.opcode == "async-update":
                    started[instruction.name] = source
                elif source is not None:
                    self.finish(source)
            elif instruction.opcode in CONTROL:
                self.control(instruction, stream)
            else:
                self.issue(computation, instruction, stream, started)

    def control(self, instruction: Instruction, stream: str) -> None:
        given = self.model.given(instruction.piece, self.model.loops)
        if given is not None and not self.inside:
            self.record(instruction, given, stream)
            return
        called, outer = self.module.called(instruction), self.inside
        self.inside = outer or instruction.pieces
        if instruction.opcode == "while":
            body, trips = instruction.attributes["body"].lstrip("%"), trip_count(instruction)
            if trips is None:
                self.unknown_loops[self.inside[0].op if self.inside else instruction.name] = None
            for _ in range(trips or 1):
                self.run(self.module.computations[body], stream)
        elif instruction.opcode == "conditional" and called:
            self.run(max(called, key=self._weight), stream)
        else:
            for computation in called:
                self.run(computation, stream)
        self.inside = outer

    def _weight(self, computation: Computation) -> float:
        return sum(self.cost(computation, instruction).prediction.us for instruction in computation.instructions)

    def issue(self, computation: Computation, instruction: Instruction, stream: str, started: dict[str, int]) -> None:
        if instruction.base in ("call", "async") and instruction.opcode.endswith("-start"):
            cost = self.cost(computation, instruction)
            if cost.kind != "collective":
                self.side_stream(instruction, cost, started)
                return
        cost = self.cost(computation, instruction)
        if cost.kind == "free":
            return
        if cost.kind == "collective" and is_sync(instruction):
            self.clock["compute"] = max(self.clock["compute"], self.clock.get("network", 0.0))
            event = self.record(instruction, cost, "network")
            self.clock["compute"] = event.end_us
            self.exposed[len(self.events) - 1] = event.us
            self.closed.append(_Open(event, instruction, cost, len(self.events) - 1))
        elif instruction.opcode.endswith("-start"):
            own = "network" if cost.kind == "collective" else "host" if cost.kind == "host_copy" else "side"
            event = self.record(instruction, cost, own)
            self.begin(_Open(event, instruction, cost, len(self.events) - 1), started)
        else:
            self.record(instruction, cost, stream)

    def side_stream(self, instruction: Instruction, cost: Cost, started: dict[str, int]) -> None:
        """A region that XLA runs on another stream: its instructions follow one another there."""
        found = re.search(r'_xla_stream_annotation="(\w+)"', instruction.attributes.get("frontend_attributes", ""))
        stream = f"stream {found.group(1)}" if found else "side"
        begin = max(self.clock["compute"], self.clock.get(stream, 0.0))
        self.clock[stream] = begin
        outer, self.inside = self.inside, self.inside or instruction.pieces
        for computation in self.module.called(instruction):
            self.run(computation, stream)
        self.inside = outer
        end, source = self.clock[stream], cost.prediction.source
        event = Event(instruction.name, "region", "region", stream, begin, end, instruction.pieces, 0.0, 0.0, source)
        self.begin(_Open(event, instruction, cost), started)

    def begin(self, opened: _Open, started: dict[str, int]) -> None:
        key = next(self.keys)
        self.open[key] = opened
        started[opened.instruction.name] = key

    def finish(self, key: int) -> None:
        opened = self.open.pop(key)
        now, end = self.clock["compute"], opened.event.end_us
        self.clock["compute"] = max(now, end)
        if opened.cost.kind != "collective":
            self.waited_us += max(0.0, end - now)
            return
        self.closed.append(opened)
        for at in reversed(self.sent):  # the wait is shared out among the collectives that the network runs meanwhile
            event = self.events[at]
            if event.end_us <= now:
                break
            shared = min(end, event.end_us) - max(now, event.start_us)
            if shared > 0:
                self.exposed[at] = self.exposed.get(at, 0.0) + shared

    def timeline(self) -> Timeline:
        events = tuple(replace(event, exposed_us=self.exposed.get(at, 0.0)) for at, event in enumerate(self.events))
        rows = sorted((_row(opened, self.exposed.get(_place(opened), 0.0)) for opened in self.closed), key=_start)
        us = max(self.clock.values())
        bubbles = self.waited_us + us - self.clock["compute"]
        return Timeline(events, tuple(rows), us, bubbles, tuple(self.unknown_loops))


def _start(row: Collective) -> float:
    return row.start_us


def _place(opened: _Open) -> int:
    return -1 if opened.at is None else opened.at


def _row(opened: _Open, exposed_us: float) -> Collective:
    piece, cost = opened.event.piece, opened.cost
    return Collective(
        op=piece.op if piece else None,
        nano_batch=piece.piece if piece else None,
        layer=piece.layer if piece else None,
        kind=cost.collective,
        name=opened.instruction.name,
        bytes=int(cost.bytes),
        wire_bytes=int(cost.prediction.bytes),
        is_async=not is_sync(opened.instruction),
        beside=_names(event for event in opened.beside if event.kind in HEAVY),
        beside_other=_names(event for event in opened.beside if event.kind not in HEAVY),
        predicted_us=cost.prediction.us,
        exposed_us=exposed_us,
        start_us=opened.event.start_us,
        source=cost.prediction.source,
    )


def simulate(model: CostModel) -> Timeline:
    """Timeline of one run of the module. A loop without a known trip count runs once; a conditional takes its
    longest branch."""
    player = _Player(model)
    player.run(model.module.entry)
    for key in list(player.open):  # a start without a done: nothing waits for it but the end of the step
        opened = player.open[key]
        if opened.cost.kind == "collective":
            player.finish(key)
    return player.timeline()
