"""The layer program: what the op pieces of a plan do with the rows of a step, written once.

A machine runs it, and alone knows what a value is: `step.trace` traces arrays, `timeline.jobs` makes the jobs of a
simulated timeline. The program says which op reads what, what a collective's result is added to, and when.

A collective's result is pending until the op that reads it first adds it to the residual (`_settle`), together with the
norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from nanoflow_jax.config import ConfigError, Mlp
from nanoflow_jax.plan.ops import APPEND, HIDDEN, OPS
from nanoflow_jax.plan.plan import OpPiece, deferred_gathers
from nanoflow_jax.step.rows import Rows, RowSpan

type Update[V] = tuple[V, V | None]  # what is added to a residual: a collective's result, and a bias

ATTENTION, MLP = 0, 1  # the norms of a layer
# Collectives. Of what GATHER_HEADS and GATHER_NORMED give, a GEMM is the only reader.
GATHER, GATHER_HEADS, GATHER_NORMED, GATHER_ROWS = "gather", "gather_heads", "gather_normed", "gather_rows"
REDUCE, SCATTER = "reduce", "scatter"


class Machine[V](Protocol):
    """What the program needs done, each on the rows of a piece; p devices. A value that is read by rows comes as a span
    and the pieces to call it on (`Rows`)."""

    mlp: Mlp  # of the layer that has begun
    lane: bool  # decode attention has a stream of its own
    appends_at_once: bool  # keys and values are written as soon as they are there, not ahead of what reads them

    def scope(self, layer: int | None, op: str, number: int) -> AbstractContextManager[Any]:
        """Names what is done in it."""
        ...

    def begin(self, layer: int) -> None:
        """The ops that follow are this layer's."""
        ...

    def embed(self, piece: OpPiece) -> V: ...
    def shard(self, piece: OpPiece, x: V) -> tuple[V, V]:
        """This device's rows of the first residual, and the norm of all rows."""
        ...

    def add_and_norm(
        self, layer: int, which: int, rows: int, x: V, update: Update[V] | None, gathered: bool
    ) -> tuple[V, V]:
        """The sum, and its norm ahead of ATTENTION or MLP of a layer, as what reads it takes it. gathered: that is
        GATHER_NORMED."""
        ...

    def add(self, rows: int, x: V, update: Update[V]) -> V: ...
    def kqv(self, piece: OpPiece, span: RowSpan, normed: Sequence[V]) -> V: ...
    def queries(self, kqv: V) -> V: ...
    def append(self, piece: OpPiece, kqv: V) -> None:
        """Writes keys and values to the pages."""
        ...

    def decode_attention(self, piece: OpPiece, span: RowSpan, q: Sequence[V]) -> V: ...
    def prefill_attention(self, piece: OpPiece, span: RowSpan, q: Sequence[V]) -> V: ...
    def heads(self, piece: OpPiece, span: RowSpan, attention: Sequence[V]) -> V:
        """This device's, as GATHER_HEADS takes them."""
        ...

    def o_over_n(self, piece: OpPiece, gathered: V) -> V: ...
    def o_over_k(self, piece: OpPiece, span: RowSpan, attention: Sequence[V]) -> V: ...
    def up_gate(self, piece: OpPiece, span: RowSpan, normed: Sequence[V]) -> V: ...
    def down(self, piece: OpPiece, activated: V) -> V: ...
    def route(self, piece: OpPiece, span: RowSpan, normed: Sequence[V]) -> Any:
        """Which experts the rows go to, and where."""
        ...

    def dispatch(self, piece: OpPiece, routing: Any, span: RowSpan, normed: Sequence[V]) -> V:
        """The rows by expert."""
        ...

    def experts_up(self, piece: OpPiece, routing: Any, rows: V) -> V: ...
    def experts_down(self, piece: OpPiece, routing: Any, activated: V) -> V: ...
    def combine(self, piece: OpPiece, routing: Any, projected: V, shared: V | None) -> V: ...
    def bias(self, op: str) -> V | None: ...
    def start(self, collective: str, rows: int, columns: str, x: V) -> V:
        """Starts a collective, whose whole result has so many rows. Whoever reads it waits for it."""
        ...

    def wait(self, x: V) -> V:
        """What is issued later runs once an op of another stream is done."""
        ...

    def gather_last(self, rows: int, x: V) -> V:
        """All rows of the last residual."""
        ...


@dataclass
class _Layer[V]:
    """Values of one layer on their way from op to op, by rows or by nano-batch."""

    index: int
    settled: set[int] = field(default_factory=set)  # nano-batches whose KQV input is normed
    unwritten: list[tuple[OpPiece, V]] = field(default_factory=list)  # whose keys and values are not in the pages
    in_flight: list[tuple[OpPiece, V]] = field(default_factory=list)  # attention on another stream
    q: Rows[V] = field(default_factory=Rows)  # [n, h, d]
    attention: Rows[V] = field(default_factory=Rows)  # [n, h * d]
    gathered: dict[int, V] = field(default_factory=dict)  # [w, n], or in fp8 [p, n, w/p]
    projected: dict[int, V] = field(default_factory=dict)  # O or D before its collective
    activated: dict[int, V] = field(default_factory=dict)  # [n, F/p]
    routing: dict[int, Any] = field(default_factory=dict)  # which experts rows go to
    by_expert: dict[int, V] = field(default_factory=dict)  # rows, activations and results in the experts' order


class StepProgram[V]:
    """The layers of a step on a machine, between `embed` and `residuals`."""

    def __init__(self, machine: Machine[V], pieces: tuple[OpPiece, ...], layers: int, devices: int):
        """Raises ConfigError, one line, when a scattered nano-batch does not divide."""
        self.machine, self.pieces, self.layers, self.devices = machine, pieces, layers, devices
        self.nano_batches = {p.piece: p for p in pieces if p.op == "O"}
        self.scattered = {p.piece for p in pieces if p.op == "O.RS"}
        for number in self.scattered:
            if (rows := self.nano_batches[number].rows) % devices:
                raise ConfigError(
                    f"nano_batches[{number}]: {rows} rows cannot scatter over {devices} devices; "
                    "accepted: a multiple of them"
                )
        self.deferred = deferred_gathers(pieces)
        self.residual: dict[int, V] = {}  # nano-batch -> [n, H], or this device's rows [n/p, H] when scattered
        self.pending: dict[int, Update[V]] = {}  # nano-batch -> what its residual lacks
        self.normed: Rows[V] = Rows()  # [n, H]: the input of the next KQV or UG

    def run(self) -> list[V]:
        """The residual of each nano-batch after the last layer, [n, H]."""
        self._embed()
        for index in range(self.layers):
            self.machine.begin(index)
            layer = _Layer[V](index)
            for piece in self.pieces:
                with self.machine.scope(index, piece.op, piece.piece):
                    getattr(self, piece.op.replace(".", "_").lower())(piece, layer)
        return self._residuals()

    def _embed(self) -> None:
        for number, piece in self.nano_batches.items():
            with self.machine.scope(None, "EMBED", number):
                x = self.machine.embed(piece)
            with self.machine.scope(None, "EMBED.AR", number):
                x = self.residual[number] = self.machine.start(REDUCE, piece.rows, HIDDEN, x)
            if number in self.scattered:
                with self.machine.scope(None, "EMBED", number):
                    self.residual[number], normed = self.machine.shard(piece, x)
                self.normed.put(piece.start, piece.stop, normed)

    def _residuals(self) -> list[V]:
        for number in sorted(self.pending):
            with self.machine.scope(None, "HEAD", number):
                x = self.machine.add(self._rows(number), self.residual[number], self.pending[number])
            with self.machine.scope(None, "HEAD.AG", number):
                whole = number not in self.scattered
                rows = self.nano_batches[number].rows
                self.residual[number] = x if whole else self.machine.gather_last(rows, x)
        return [self.residual[number] for number in sorted(self.nano_batches)]

    # -- attention

    def kqv(self, piece: OpPiece, s: _Layer[V]) -> None:
        number = piece.nano_batch
        if number not in self.scattered and number not in s.settled:
            self._settle(number, s.index, ATTENTION)
            s.settled.add(number)
        kqv = self.machine.kqv(piece, *self.normed.get(piece.start, piece.stop))
        s.q.put(piece.start, piece.stop, kqv, self.machine.queries)
        s.unwritten.append((piece, kqv))
        if self.machine.appends_at_once:
            self._append(s)

    def _append(self, s: _Layer[V]) -> None:
        """Writes the keys and values that are not in the pages yet: ahead of the first op that reads any.

        Attention on a stream of its own reads the pages that are written in place here, so it is waited for first.
        """
        if not s.unwritten:
            return
        for piece, out in s.in_flight:
            s.attention.put(piece.start, piece.stop, self.machine.wait(out))
        s.in_flight.clear()
        for piece, kqv in s.unwritten:
            with self.machine.scope(s.index, APPEND, piece.piece):
                self.machine.append(piece, kqv)
        s.unwritten.clear()

    def gemv(self, piece: OpPiece, s: _Layer[V]) -> None:
        self._append(s)
        out = self.machine.decode_attention(piece, *s.q.get(piece.start, piece.stop))
        if self.machine.lane:
            s.in_flight.append((piece, out))
        s.attention.put(piece.start, piece.stop, out)

    def pf(self, piece: OpPiece, s: _Layer[V]) -> None:
        self._append(s)
        out = self.machine.prefill_attention(piece, *s.q.get(piece.start, piece.stop))
        s.attention.put(piece.start, piece.stop, out)

    # -- attention output to residual

    def gemv_ag(self, piece: OpPiece, s: _Layer[V]) -> None:
        local = self.machine.heads(piece, *s.attention.get(piece.start, piece.stop))
        s.gathered[piece.piece] = self.machine.start(GATHER_HEADS, piece.rows, OPS[piece.op].columns, local)

    def o(self, piece: OpPiece, s: _Layer[V]) -> None:
        if piece.piece in s.gathered:
            s.projected[piece.piece] = self.machine.o_over_n(piece, s.gathered.pop(piece.piece))
        else:
            s.projected[piece.piece] = self.machine.o_over_k(piece, *s.attention.get(piece.start, piece.stop))

    def o_ag(self, piece: OpPiece, s: _Layer[V]) -> None:
        if piece.piece in self.scattered:
            self._gather_normed(piece, s.index, MLP)
        else:
            self._collect(GATHER, piece, s)

    def o_ar(self, piece: OpPiece, s: _Layer[V]) -> None:
        self._collect(REDUCE, piece, s)

    def o_rs(self, piece: OpPiece, s: _Layer[V]) -> None:
        self._collect(SCATTER, piece, s)

    # -- MLP

    def ug(self, piece: OpPiece, s: _Layer[V]) -> None:
        number, experts = piece.piece, self.machine.mlp.experts
        if experts is not None:
            s.by_expert[number] = self.machine.experts_up(piece, s.routing[number], s.by_expert[number])
        elif number not in self.scattered:
            self._settle(number, s.index, MLP)
        if experts is None or experts.shared:
            s.activated[number] = self.machine.up_gate(piece, *self.normed.get(piece.start, piece.stop))

    def d(self, piece: OpPiece, s: _Layer[V]) -> None:
        number = piece.piece
        if self.machine.mlp.experts is not None:
            s.by_expert[number] = self.machine.experts_down(piece, s.routing[number], s.by_expert[number])
        if number in s.activated:
            s.projected[number] = self.machine.down(piece, s.activated.pop(number))

    # -- experts: in a layer that has none, these do nothing

    def route(self, piece: OpPiece, s: _Layer[V]) -> None:
        if self.machine.mlp.experts is None:
            return
        if piece.piece not in self.scattered:
            self._settle(piece.piece, s.index, MLP)
        s.routing[piece.piece] = self.machine.route(piece, *self.normed.get(piece.start, piece.stop))

    def dispatch(self, piece: OpPiece, s: _Layer[V]) -> None:
        if self.machine.mlp.experts is None:
            return
        normed = self.normed.get(piece.start, piece.stop)
        s.by_expert[piece.piece] = self.machine.dispatch(piece, s.routing[piece.piece], *normed)

    def combine(self, piece: OpPiece, s: _Layer[V]) -> None:
        if self.machine.mlp.experts is None:
            return
        number = piece.piece
        routing, out, shared = s.routing.pop(number), s.by_expert.pop(number), s.projected.pop(number, None)
        s.projected[number] = self.machine.combine(piece, routing, out, shared)

    d_ar, d_rs = o_ar, o_rs

    def d_ag(self, piece: OpPiece, s: _Layer[V]) -> None:
        """Gathers the normed input of the next KQV: the next layer's, or this one's when the plan puts it before
        KQV. The first layer's comes whole from the embedding; what the last layer leaves is gathered at the end."""
        layer = s.index + (piece.piece not in self.deferred)
        if piece.piece in self.pending and layer < self.layers:
            self._gather_normed(piece, layer, ATTENTION)

    # -- from collective to norm

    def _collect(self, collective: str, piece: OpPiece, s: _Layer[V]) -> None:
        """Starts the collective of O or D; its result is added when it is read."""
        started = self.machine.start(collective, piece.rows, OPS[piece.op].columns, s.projected.pop(piece.piece))
        self.pending[piece.piece] = started, self.machine.bias(piece.op.partition(".")[0])

    def _add_and_norm(self, number: int, layer: int, which: int, gathered: bool = False) -> V:
        x, update = self.residual[number], self.pending.pop(number, None)
        rows = self._rows(number)
        self.residual[number], normed = self.machine.add_and_norm(layer, which, rows, x, update, gathered)
        return normed

    def _settle(self, number: int, layer: int, which: int) -> None:
        """Adds what is pending to a residual that is whole on each device, and norms it."""
        rows = self.nano_batches[number]
        self.normed.put(rows.start, rows.stop, self._add_and_norm(number, layer, which))

    def _gather_normed(self, piece: OpPiece, layer: int, which: int) -> None:
        """The same on this device's rows of a scattered residual, and gathers the norm."""
        normed = self._add_and_norm(piece.piece, layer, which, gathered=True)
        self.normed.put(piece.start, piece.stop, self.machine.start(GATHER_NORMED, piece.rows, HIDDEN, normed))

    def _rows(self, number: int) -> int:
        """Of the residual on this device."""
        rows = self.nano_batches[number].rows
        return rows // self.devices if number in self.scattered else rows
