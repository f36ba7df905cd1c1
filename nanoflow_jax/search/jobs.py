"""A plan's op pieces as jobs on streams: what runs where, and what each waits for.

There are two runtimes. The library's own is what `schedule.step` compiles to and the inspector reads: one compute
stream in the plan's order; a collective, or attention on a lane of its own, starts once everything issued before it
on the compute stream is done, and the first op that reads its result waits for it; a collective is issued once the one
in flight is done, which the compute stream waits for; a GPU without the Mosaic kernel ignores the lane. NanoFlow's has
three lanes (compute, memory, network), each in the plan's order, that wait for data alone: decode attention always has
a lane.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kernels_pallas.targets import mosaic_supported
from nanoflow_jax.config import ConfigError
from nanoflow_jax.schedule.plan import OpPiece, SchedulePlan, deferred_gathers, row_quantum
from nanoflow_jax.search.latency import Prediction
from nanoflow_jax.search.shapes import OpCosts
from nanoflow_jax.search.timeline import COMPUTE, NETWORK, Piece

SIDE = "stream 1"
RUNTIMES = ("library", "nanoflow")
SAMPLER_REDUCTIONS = 2
COLLECTIVES = {"AG": "all-gather", "AR": "all-reduce", "RS": "reduce-scatter"}


@dataclass(frozen=True)
class Job:
    """One kernel or collective of a plan: a `NamedOp`."""

    piece: Piece
    kind: str
    stream: str
    prediction: Prediction
    needs: tuple[int, ...]
    share: float
    bytes: float
    collective: str = ""
    capped: bool = False

    @property
    def name(self) -> str:
        return str(self.piece)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (self.piece,)

    @property
    def is_async(self) -> bool:
        return True


@dataclass(frozen=True)
class Shares:
    """Shares of the SMs. network: of a collective beside other work; attention: of decode attention on its lane, where
    the plan does not say (`sms`)."""

    network: float
    attention: float

    def __post_init__(self) -> None:
        if not (self.network > 0 and self.attention > 0 and self.network + self.attention < 1):
            raise ConfigError(
                f"shares: network {self.network} and attention {self.attention} must be above 0, their sum below 1"
            )


@dataclass
class _Layer:
    """Jobs of one layer that others read: by nano-batch, or (start, stop, jobs) by rows."""

    index: int | None
    q: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)
    attention: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)
    unwritten: list[OpPiece] = field(default_factory=list)
    in_flight: tuple[int, ...] = ()
    normed: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of KQV's input
    gathered: dict[int, tuple[int, ...]] = field(default_factory=dict)
    projected: dict[int, tuple[int, ...]] = field(default_factory=dict)


def build_jobs(
    plan: SchedulePlan,
    costs: OpCosts,
    layers: int,
    shares: Shares,
    runtime: str = "library",
    one_in_flight: bool = True,
) -> tuple[Job, ...]:
    """Jobs of a step of so many layers, in issue order. one_in_flight False: without what the library waits for between
    collectives, which depends on the order. Raises ConfigError for an unknown runtime, or a scattered nano-batch that
    does not divide."""
    if runtime not in RUNTIMES:
        raise ConfigError(f"runtime: {runtime!r} is unknown; accepted: {', '.join(RUNTIMES)}")
    lanes = runtime == "nanoflow"
    builder = _Builder(plan, costs, layers, shares, lanes, one_in_flight and not lanes)
    builder.embed()
    for index in range(layers):
        builder.layer(index)
    builder.head()
    return tuple(builder.jobs)


class _Builder:
    """Follows `schedule.step._StepRun` op by op. `pending`: nano-batch → what its residual waits for."""

    def __init__(
        self, plan: SchedulePlan, costs: OpCosts, layers: int, shares: Shares, lanes: bool, one_in_flight: bool
    ):
        self.costs, self.layers, self.shares, self.lanes = costs, layers, shares, lanes
        load, devices = costs.load, costs.shapes.devices
        self.devices = devices
        self.pieces = plan.pieces(load.decode_rows, load.prefill_rows, row_quantum(devices))
        self.nano_batches = {p.piece: p for p in self.pieces if p.op == "O"}
        self.gathers = {p.piece for p in self.pieces if p.op == "GEMV.AG"}
        self.scattered = {p.piece for p in self.pieces if p.op == "O.RS"}
        for number in self.scattered:
            if (rows := self.nano_batches[number].rows) % devices:
                raise ConfigError(f"nano_batches[{number}]: {rows} rows cannot scatter over {devices} devices")
        self.deferred = deferred_gathers(self.pieces)
        lane = plan.lanes.get("GEMV") if lanes or mosaic_supported(costs.model.hardware.capability) else None
        self.attention_lane = lanes or lane is not None
        self.sms = lane.sms if lane else None
        self.jobs: list[Job] = []
        self.issued: tuple[int, ...] = ()  # the compute stream's last job
        self.one_in_flight = one_in_flight
        self.in_flight: tuple[int, ...] = ()  # the last collective
        self.behind: tuple[int, ...] = ()  # the one before it, for which the next job of the compute stream waits
        self.pending: dict[int, tuple[int, ...]] = {}
        self.shards: dict[int, tuple[int, ...]] = {}  # of a scattered nano-batch: what its KQV waits for

    # -- kinds of jobs

    def run(self, piece: Piece, kind: str, prediction: Prediction, needs: tuple[int, ...] = ()) -> tuple[int, ...]:
        """A kernel of the compute stream."""
        needs = tuple(sorted({*needs, *self.behind}))
        self.behind = ()
        self.jobs.append(Job(piece, kind, COMPUTE, prediction, needs, 0.0, prediction.bytes))
        self.issued = (len(self.jobs) - 1,)
        return self.issued

    def start(self, piece: Piece, rows: int, columns: int, needs: tuple[int, ...]) -> tuple[int, ...]:
        """A collective of `rows` rows. On one device there is none."""
        if self.devices == 1:
            return needs
        name = COLLECTIVES[piece.op.rpartition(".")[2]]
        prediction = self.costs.collective(name, rows, columns)
        whole = float(rows * columns * self.costs.shapes.element_bytes)
        return self._start(Job(piece, "collective", NETWORK, prediction, needs, self.shares.network, whole, name))

    def _start(self, job: Job) -> tuple[int, ...]:
        needs = job.needs if self.lanes else tuple(sorted({*job.needs, *self.issued}))
        self.jobs.append(replace(job, needs=needs))
        started = (len(self.jobs) - 1,)
        if job.stream == NETWORK and self.one_in_flight:
            self.in_flight, self.behind = started, (*self.behind, *self.in_flight)
        return started

    # -- ends of a step

    def embed(self) -> None:
        for number, piece in self.nano_batches.items():
            table = self.run(Piece(None, "EMBED", number), "elementwise", self.costs.embed(piece.rows))
            self.pending[number] = self.start(
                Piece(None, "EMBED.AR", number), piece.rows, self.costs.shapes.hidden, table
            )
            if number in self.scattered:
                self.shards[number] = self.run(
                    Piece(None, "EMBED", number), "elementwise", self.costs.norm(piece.rows), self.pending[number]
                )

    def head(self) -> None:
        rows = {number: piece.rows for number, piece in self.nano_batches.items()}
        ready: tuple[int, ...] = ()
        for number in sorted(self.pending):
            shard = rows[number] // self.devices if number in self.scattered else rows[number]
            added = self.run(Piece(None, "HEAD", number), "elementwise", self.costs.norm(shard), self.pending[number])
            if number in self.scattered:
                added = self.start(Piece(None, "HEAD.AG", number), rows[number], self.costs.shapes.hidden, added)
            ready += added
        ready = self.run(Piece(None, "HEAD", 1), "gemm", self.costs.head(), ready)
        ready = self.run(Piece(None, "SAMPLE", 1), "elementwise", self.costs.sampling(), ready)
        for _ in range(SAMPLER_REDUCTIONS if self.devices > 1 else 0):
            prediction = self.costs.reduction()
            job = Job(
                Piece(None, "SAMPLE", 1), "collective", NETWORK, prediction, ready, self.shares.network,
                self.costs.sampled_rows * 4.0, "all-reduce",
            )  # fmt: skip
            ready = self._start(job)

    # -- a layer

    def layer(self, index: int) -> None:
        layer = _Layer(index)
        for piece in self.pieces:
            getattr(self, _METHODS[piece.op])(piece, layer, Piece(index, piece.op, piece.piece))

    def _settle(self, number: int, name: Piece, rows: int) -> tuple[int, ...]:
        return self.run(name, "elementwise", self.costs.norm(rows), self.pending[number])

    def _kqv(self, piece: OpPiece, layer: _Layer, name: Piece) -> None:
        number = piece.nano_batch
        if number in self.scattered:
            ready = self.shards[number]
        else:
            if number not in layer.normed:
                layer.normed[number] = self._settle(number, name, self.nano_batches[number].rows)
            ready = layer.normed[number]
        self.run(name, "gemm", self.costs.kqv(piece.rows), ready)
        q = self.run(name, "elementwise", self.costs.rope(piece.rows))
        layer.unwritten.append(piece)
        layer.q.append((piece.start, piece.stop, q))
        if self.lanes:
            self._append(layer)

    def _append(self, layer: _Layer) -> None:
        """Keys and values are written ahead of the first attention that reads any, and, in the library, once attention
        in flight, which reads the same pages, is done."""
        for piece in layer.unwritten:
            name = Piece(layer.index, "KV.APPEND", piece.piece)
            written = self.run(name, "kernel", self.costs.append(piece.rows), layer.in_flight)
            layer.q.append((piece.start, piece.stop, written))
        if layer.unwritten:
            layer.in_flight = ()
        layer.unwritten.clear()

    def _gemv(self, piece: OpPiece, layer: _Layer, name: Piece) -> None:
        self._append(layer)
        needs = _reads(layer.q, piece.start, piece.stop)
        prediction = self.costs.decode_attention(piece.rows, self.sms)
        if self.attention_lane:
            share, capped = self.shares.attention, self.sms is not None
            if self.sms is not None:
                share = min(1.0, self.sms / self.costs.model.hardware.sm_count)
            elif not self.lanes:
                share = 1.0  # nothing holds the kernel back
            done = self._start(Job(name, "attention", SIDE, prediction, needs, share, prediction.bytes, capped=capped))
            if not self.lanes:
                layer.in_flight += done
        else:
            done = self.run(name, "attention", prediction, needs)
        layer.attention.append((piece.start, piece.stop, done))

    def _pf(self, piece: OpPiece, layer: _Layer, name: Piece) -> None:
        self._append(layer)
        first = min(p.start for p in self.pieces if p.op == "PF")
        done = self.run(name, "attention", self.costs.prefill_attention(piece.rows), _reads(layer.q, first, piece.stop))
        layer.attention.append((piece.start, piece.stop, done))

    def _gemv_ag(self, piece: OpPiece, layer: _Layer, name: Piece) -> None:
        needs = _reads(layer.attention, piece.start, piece.stop)
        if not self.lanes:
            needs = self.run(name, "elementwise", self.costs.transpose(piece.rows), needs)
        layer.gathered[piece.piece] = self.start(name, piece.rows, self.costs.shapes.width, needs)

    def _o(self, piece: OpPiece, layer: _Layer, name: Piece) -> None:
        over_n = piece.piece in self.gathers
        needs = layer.gathered[piece.piece] if over_n else _reads(layer.attention, piece.start, piece.stop)
        layer.projected[piece.piece] = self.run(name, "gemm", self.costs.o(piece.rows, over_n), needs)

    def _collect(self, piece: OpPiece, layer: _Layer, name: Piece) -> None:
        """O.AG of a gather, O.AR, O.RS, D.AR, D.RS."""
        needs = layer.projected.pop(piece.piece)
        self.pending[piece.piece] = self.start(name, piece.rows, self.costs.shapes.hidden, needs)

    def _o_ag(self, piece: OpPiece, layer: _Layer, name: Piece) -> None:
        if piece.piece in self.scattered:
            self._gather_shards(piece, name)
        else:
            self._collect(piece, layer, name)

    def _gather_shards(self, piece: OpPiece, name: Piece) -> None:
        """The norm on shards, then their gather."""
        normed = self._settle(piece.piece, name, piece.rows // self.devices)
        self.shards[piece.piece] = self.start(name, piece.rows, self.costs.shapes.hidden, normed)

    def _ug(self, piece: OpPiece, layer: _Layer, name: Piece) -> None:
        number = piece.piece
        ready = self.shards[number] if number in self.scattered else self._settle(number, name, piece.rows)
        self.run(name, "gemm", self.costs.up_gate(piece.rows), ready)
        layer.projected[number] = self.run(name, "elementwise", self.costs.silu(piece.rows))

    def _d(self, piece: OpPiece, layer: _Layer, name: Piece) -> None:
        layer.projected[piece.piece] = self.run(name, "gemm", self.costs.down(piece.rows), layer.projected[piece.piece])

    def _d_ag(self, piece: OpPiece, layer: _Layer, name: Piece) -> None:
        whole = layer.index == 0 if piece.piece in self.deferred else layer.index == self.layers - 1
        if not whole:  # the first layer's input comes whole from the embedding; the head gathers the last one's
            self._gather_shards(piece, name)


def _reads(rows: list[tuple[int, int, tuple[int, ...]]], start: int, stop: int) -> tuple[int, ...]:
    """Jobs that make any of rows [start, stop)."""
    return tuple(sorted({job for first, last, jobs in rows if first < stop and start < last for job in jobs}))


_METHODS = {
    "KQV": "_kqv",
    "GEMV": "_gemv",
    "PF": "_pf",
    "GEMV.AG": "_gemv_ag",
    "O": "_o",
    "O.AG": "_o_ag",
    "O.AR": "_collect",
    "O.RS": "_collect",
    "UG": "_ug",
    "D": "_d",
    "D.AR": "_collect",
    "D.RS": "_collect",
    "D.AG": "_d_ag",
}
