"""When each instruction of a compiled program would run, and what each collective runs beside.

The scheduled order is put on streams that are each in order, as XLA's runtime does: kernels on the compute stream,
collectives on the network's, `call-start` regions and host copies on their own. A start waits for what the compute
stream holds at that point; a done makes the compute stream wait. `timeline.play` plays them, with what ops lose beside
each other, as it does for the simulator.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from nanoflow_jax.cost.latency import Prediction
from nanoflow_jax.inspect.costs import CONTROL, Cost, CostModel
from nanoflow_jax.inspect.hlo import Computation, Instruction, Module
from nanoflow_jax.timeline.played import timeline
from nanoflow_jax.timeline.timeline import COMPUTE, NETWORK, Piece, Timeline

HOST, SIDE = "host", "side"
OWN_STREAMS = {"collective": NETWORK, "host_copy": HOST}
Budgets = Mapping[str, int]  # op → the most SMs that it uses on a stream of its own


@dataclass(frozen=True)
class Issued:
    """One run of an instruction: a `NamedOp`."""

    name: str
    kind: str
    stream: str
    pieces: tuple[Piece, ...]
    prediction: Prediction
    needs: tuple[int, ...]
    share: float
    bytes: float
    collective: str
    capped: bool
    is_async: bool


@dataclass
class _Stream:
    """What the next op of a stream starts after: `last`, its last op (the stream is in order), and `awaited`, ops of
    other streams that it was made to wait for since."""

    last: tuple[int, ...] = ()
    awaited: tuple[int, ...] = ()

    @property
    def held(self) -> tuple[int, ...]:
        return self.last + self.awaited


def is_sync(instruction: Instruction) -> bool:
    """Whether XLA will run a collective on the compute stream."""
    return not instruction.opcode.endswith("-start") or '"is_sync":true' in instruction.config


def trip_count(instruction: Instruction) -> int | None:
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.config)
    return int(found.group(1)) if found else None


class _Reader:
    """Reads computations in order. State of one reading; `simulate` is the door."""

    def __init__(self, model: CostModel, budgets: Budgets) -> None:
        self.model, self.budgets = model, budgets
        self.module: Module = model.module
        self.hardware = model.latency.hardware
        self.ops: list[Issued] = []
        self.streams: dict[str, _Stream] = {COMPUTE: _Stream()}
        self.inside: tuple[Piece, ...] = ()  # pieces of the loop, branch or region that is being read
        self.unknown_loops: dict[str, None] = {}
        self.left_out_us = 0.0
        self.cache: dict[tuple[str, str], Cost] = {}

    def cost(self, computation: Computation, instruction: Instruction) -> Cost:
        key = (computation.name, instruction.name)
        if key not in self.cache:
            self.cache[key] = self.model.of_instruction(computation, instruction)
        return self.cache[key]

    def put(self, instruction: Instruction, cost: Cost, stream: str, issuer: str, is_async: bool = True) -> int:
        """Puts a run at the end of a stream; on another than the issuer's, after what the issuer holds now."""
        queue = self.streams.setdefault(stream, _Stream())
        needs = queue.awaited if stream == issuer else queue.awaited + self.streams[issuer].held
        share, capped = self._share(cost, stream)
        # XLA shares a loop's body between layers: inside one, the loop's own name says whose work it is.
        pieces = self.inside or cost.pieces
        self.ops.append(
            Issued(
                instruction.name, cost.kind, stream, pieces, cost.prediction, needs, share, cost.bytes,
                cost.collective, capped, is_async,
            )
        )  # fmt: skip
        at = len(self.ops) - 1
        queue.last, queue.awaited = (at,), ()
        return at

    def _share(self, cost: Cost, stream: str) -> tuple[float, bool]:
        """Of the SMs, that an op takes from the compute stream, and whether it was costed on them alone. Beside the
        compute stream, what no budget holds back takes all."""
        if cost.kind == "collective":
            return self.hardware.calibration.network_share, False
        if stream in (COMPUTE, HOST):
            return 0.0, False
        sms = self.budgets.get(cost.pieces[0].op) if cost.kind == "attention" and cost.pieces else None
        return (min(1.0, sms / self.hardware.sm_count), True) if sms else (1.0, False)

    def run(self, computation: Computation, stream: str = COMPUTE) -> None:
        # By name in this computation: the places of the ops whose done has not come; None: an empty region's.
        started: dict[str, int | None] = {}
        for instruction in computation.instructions:
            if instruction.opcode.endswith("-done") or instruction.opcode == "async-update":
                at = started.get(instruction.operands[0]) if instruction.operands else None
                if instruction.opcode == "async-update":
                    started[instruction.name] = at
                elif at is not None:
                    self.streams[stream].awaited += (at,)
            elif instruction.opcode in CONTROL:
                self.control(instruction, stream)
            else:
                self.issue(computation, instruction, stream, started)

    def control(self, instruction: Instruction, stream: str) -> None:
        given = self.model.given(instruction.piece, self.model.loops)
        if given is not None and not self.inside:
            self.put(instruction, given, stream, stream)
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
            weights = [self._weight(computation) for computation in called]
            self.run(called[weights.index(min(weights))], stream)
            self.left_out_us += max(weights) - min(weights)
        else:
            for computation in called:
                self.run(computation, stream)
        self.inside = outer

    def _weight(self, computation: Computation) -> float:
        """Microseconds of a branch, its own branches at their longest."""
        total = 0.0
        for instruction in computation.instructions:
            if instruction.opcode not in CONTROL:
                total += self.cost(computation, instruction).prediction.us
                continue
            inner = [self._weight(called) for called in self.module.called(instruction)] or [0.0]
            branches = instruction.opcode == "conditional"
            total += max(inner) if branches else sum(inner) * (trip_count(instruction) or 1)
        return total

    def issue(
        self, computation: Computation, instruction: Instruction, stream: str, started: dict[str, int | None]
    ) -> None:
        cost = self.cost(computation, instruction)
        if cost.kind == "free":
            return
        starts = instruction.opcode.endswith("-start")
        if cost.kind == "collective" and is_sync(instruction):
            at = self.put(instruction, cost, NETWORK, stream, is_async=False)
            self.streams[stream].awaited += (at,)
        elif starts and cost.kind != "collective" and instruction.base in ("call", "async"):
            started[instruction.name] = self.region(instruction, stream)
        elif starts:
            started[instruction.name] = self.put(instruction, cost, OWN_STREAMS.get(cost.kind, SIDE), stream)
        else:
            self.put(instruction, cost, stream, stream)

    def region(self, instruction: Instruction, issuer: str) -> int | None:
        """Instructions that XLA runs on another stream, one after another. The place of the last one, None: there is
        none."""
        found = re.search(r'_xla_stream_annotation="(\w+)"', instruction.attributes.get("frontend_attributes", ""))
        stream = f"stream {found.group(1)}" if found else SIDE
        queue, before = self.streams.setdefault(stream, _Stream()), len(self.ops)
        queue.awaited += self.streams[issuer].held
        outer, self.inside = self.inside, self.inside or instruction.pieces
        for computation in self.module.called(instruction):
            self.run(computation, stream)
        self.inside = outer
        return queue.last[0] if len(self.ops) > before else None


def simulate(model: CostModel, budgets: Budgets) -> Timeline:
    """Timeline of one run of the module. A loop without a known trip count runs once; a conditional takes its
    shortest branch, which in our steps is the one where no request asks for more than greedy decoding. budgets: of
    ops in `call-start` regions."""
    reader = _Reader(model, budgets)
    reader.run(model.module.entry)
    return timeline(reader.ops, model.latency, tuple(reader.unknown_loops), reader.left_out_us)
