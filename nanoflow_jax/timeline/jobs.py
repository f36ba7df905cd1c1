"""A plan's op pieces as jobs on streams: what runs where, and what each waits for.

There are two runtimes. The library's own is what `step.trace` compiles to and the inspector reads: one compute
stream in the plan's order; a collective, or attention on a lane of its own, starts once everything issued before it
on the compute stream is done, and the first op that reads its result waits for it; a collective is issued once the one
in flight is done, which the compute stream waits for; a GPU without the Mosaic kernel ignores the lane. NanoFlow's has
three lanes (compute, memory, network), each in the plan's order, that wait for data alone: decode attention always has
a lane.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from kernels_pallas.targets import mosaic_supported
from nanoflow_jax.config import ConfigError, Mlp
from nanoflow_jax.cost.latency import Prediction
from nanoflow_jax.cost.shapes import SHARED, OpCosts
from nanoflow_jax.plan.ops import HIDDEN, WIDTH
from nanoflow_jax.plan.plan import OpPiece, SchedulePlan, row_quantum
from nanoflow_jax.step.attention import norm_fits
from nanoflow_jax.step.layer import (
    GATHER,
    GATHER_HEADS,
    GATHER_NORMED,
    GATHER_ROWS,
    REDUCE,
    SCATTER,
    StepProgram,
    Update,
)
from nanoflow_jax.step.rows import RowSpan
from nanoflow_jax.timeline.timeline import COMPUTE, NETWORK, Piece

SIDE = "stream 1"
RUNTIMES = ("library", "nanoflow")
SAMPLER_REDUCTIONS = 2  # of one number per sampled row, in a greedy step
GATHERS = (GATHER, GATHER_HEADS, GATHER_NORMED, GATHER_ROWS)
COLLECTIVES = {**dict.fromkeys(GATHERS, "all-gather"), REDUCE: "all-reduce", SCATTER: "reduce-scatter"}


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


Jobs = tuple[int, ...]  # what stands for a value: the jobs that make it


def build_jobs(
    plan: SchedulePlan,
    costs: OpCosts,
    layers: int,
    shares: Shares,
    runtime: str = "library",
    one_in_flight: bool = True,
    alike: bool = False,
) -> tuple[Job, ...]:
    """Jobs of a step of so many layers, in issue order. Raises ConfigError for an unknown runtime, a scattered
    nano-batch that does not divide, or gathers in a precision that the weights do not have.

    one_in_flight  False: without what the library waits for between collectives, which depends on the order
    alike          every layer is the mean of the kinds that there are
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"runtime: {runtime!r} is unknown; accepted: {', '.join(RUNTIMES)}")
    plan.check_gathers("fp8" if costs.quantised else None)
    lanes = runtime == "nanoflow"
    load, devices = costs.load, costs.shapes.devices
    experts = costs.shapes.experts is not None
    pieces = plan.pieces(load.decode_rows, load.prefill_rows, row_quantum(devices), experts=experts)
    machine = JobMaker(plan, pieces, costs, shares, lanes, one_in_flight and not lanes, alike)
    machine.head(StepProgram(machine, pieces, layers, devices).run())
    return tuple(machine.jobs)


class JobMaker:
    """Runs the layer program on jobs: a `step.layer.Machine`. Each op becomes the kernels that XLA makes of it."""

    def __init__(
        self,
        plan: SchedulePlan,
        pieces: Sequence[OpPiece],
        costs: OpCosts,
        shares: Shares,
        lanes: bool,
        one_in_flight: bool,
        alike: bool = False,
    ):
        self.costs, self.shares, self.lanes = costs, shares, lanes
        self.devices = costs.shapes.devices
        self.fp8_gathers = plan.gathers == "fp8"
        self.nano_batches = {p.piece: p.rows for p in pieces if p.op == "O"}
        # Of them, those whose norm is quantised by who reads it.
        self.read_whole = {p.piece for p in pieces if p.op == "O.RS" and not self.fp8_gathers}
        self.fused_norm = (
            mosaic_supported(costs.model.hardware.capability, "add_rms_norm")
            and norm_fits(costs.shapes.hidden, self.devices)
            and costs.shapes.norms == "before"
        )
        self.one_pass = costs.shapes.rows_kernel and mosaic_supported(costs.model.hardware.capability, "rows_to_fp8")
        self.first_prefill = min((p.start for p in pieces if p.op == "PF"), default=0)
        lane = plan.lanes.get("GEMV") if lanes or mosaic_supported(costs.model.hardware.capability) else None
        self.lane = lanes or lane is not None
        self.appends_at_once = lanes
        self.sms = lane.sms if lane else None
        self.jobs: list[Job] = []
        self.name = Piece(None, "EMBED", 1)
        self.issued: Jobs = ()  # the compute stream's last job
        self.one_in_flight = one_in_flight
        self.in_flight: Jobs = ()  # the last collective
        self.behind: Jobs = ()  # the one before it, for which the next job of the compute stream waits
        self.awaited: Jobs = ()  # attention on its lane, which the next writes to the pages wait for
        self.made: list[tuple[int, int, Jobs]] = []  # of a layer, by rows: what makes queries, and writes keys
        self.mlp = Mlp()
        self.mlps: list[tuple[str, float]] = []  # (end of their GEMMs' names, share of them) that all tokens go through
        self.routed = 0.0  # share of a layer of experts
        self.whole_experts = plan.whole_experts(costs.shapes.experts, self.devices)
        self.alike = alike
        self.layer: int | None = None  # None: the mean of all

    # -- kinds of jobs

    def run(self, kind: str, prediction: Prediction, *needs: Jobs) -> Jobs:
        """A kernel of the compute stream."""
        wanted = tuple(sorted({*self.behind}.union(*needs)))
        self.behind = ()
        self.jobs.append(Job(self.name, kind, COMPUTE, prediction, wanted, 0.0, prediction.bytes))
        self.issued = (len(self.jobs) - 1,)
        return self.issued

    def _gemm(self, name: str, rows: int, *needs: Jobs, ready: bool = False, share: float = 1.0) -> Jobs:
        """In fp8, with what makes its operand if that is not ready, and what scales its result where no kernel follows
        that does (after KQV the rotary embedding, after UG the product, on one device after O and D the addition).
        share: of it; in fp8 it is whole."""
        if not self.costs.quantised:
            return self.run("gemm", self.costs.gemm(name, rows).times(share), *needs)
        if not ready:
            # O over N's comes transposed, which the kernel does not take.
            one_pass = self.one_pass and name != "O over N"
            needs = (self.run("elementwise", self.costs.quantise(name, rows, one_pass), *needs),)
        done = self.run("gemm", self.costs.gemm(name, rows), *needs)
        adds = self.costs.shapes.adds_products and name in ("O over K", "D")
        return done if adds or name in ("KQV", "UG") else self.run("elementwise", self.costs.scale(name, rows), done)

    def _start(self, job: Job) -> Jobs:
        needs = job.needs if self.lanes else tuple(sorted({*job.needs, *self.issued}))
        self.jobs.append(replace(job, needs=needs))
        started = (len(self.jobs) - 1,)
        if job.stream == NETWORK and self.one_in_flight:
            self.in_flight, self.behind = started, (*self.behind, *self.in_flight)
        return started

    def start(self, collective: str, rows: int, columns: str, x: Jobs) -> Jobs:
        """On one device there is none."""
        if self.devices == 1:
            return x
        kind, width = COLLECTIVES[collective], {HIDDEN: self.costs.shapes.hidden, WIDTH: self.costs.shapes.width}
        row = width[columns] * self.costs.shapes.element_bytes
        if self.fp8_gathers and collective in (GATHER_HEADS, GATHER_NORMED):
            scales = self.devices if collective == GATHER_HEADS else 1
            row = width[columns] + 4 * scales
        prediction = self.costs.collective(kind, rows * row)
        whole = float(rows * row)
        return self._start(Job(self.name, "collective", NETWORK, prediction, x, self.shares.network, whole, kind))

    def wait(self, x: Jobs) -> Jobs:
        if not self.lanes:
            self.awaited += x
        return x

    @contextmanager
    def scope(self, layer: int | None, op: str, number: int) -> Iterator[None]:
        outer, self.name = self.name, Piece(layer, op, number)
        yield
        self.name = outer

    def begin(self, layer: int) -> None:
        self.made.clear()
        self.layer = None if self.alike else layer
        shapes = self.costs.shapes
        self.routed = shapes.routed_share if self.alike else float(shapes.routed[layer % len(shapes.routed)])
        shares = {"": (shapes.ffn, 1 - self.routed), SHARED: (shapes.shared, self.routed)}
        self.mlps = [(name, share) for name, (size, share) in shares.items() if size and share]
        self.mlp = Mlp()
        if self.routed and shapes.experts is not None:
            self.mlp = Mlp(experts=replace(shapes.experts, shared=len(self.mlps)))

    # -- ends of a step

    def embed(self, piece: OpPiece) -> Jobs:
        return self.run("elementwise", self.costs.embed(piece.rows))

    def shard(self, piece: OpPiece, x: Jobs) -> tuple[Jobs, Jobs]:
        return x, self.run("elementwise", self.costs.norm(piece.rows), x)

    def gather_last(self, rows: int, x: Jobs) -> Jobs:
        return self.start(GATHER_ROWS, rows, HIDDEN, x)

    def head(self, residuals: Sequence[Jobs]) -> None:
        self.name = Piece(None, "HEAD", 1)
        ready = self.run("gemm", self.costs.gemm("HEAD", self.costs.sampled_rows), *residuals)
        self.name = Piece(None, "SAMPLE", 1)
        ready = self.run("elementwise", self.costs.sampling(), ready)
        for _ in range(SAMPLER_REDUCTIONS if self.devices > 1 else 0):
            ready = self._start(
                Job(
                    self.name, "collective", NETWORK, self.costs.reduction(), ready, self.shares.network,
                    self.costs.sampled_rows * 4.0, "all-reduce",
                )
            )  # fmt: skip

    # -- residual and norm

    def add_and_norm(
        self, layer: int, which: int, rows: int, x: Jobs, update: Update[Jobs] | None, gathered: bool
    ) -> tuple[Jobs, Jobs]:
        done = x if update is None else update[0]
        quantise = self.costs.quantised and (self.fp8_gathers or not gathered)
        if quantise and self.fused_norm:
            done = self.run("elementwise", self.costs.norm_quantised(rows), done)
            return done, done
        for _ in range(2 if self.costs.shapes.norms == "both" else 1):
            done = self.run("elementwise", self.costs.norm(rows), done)
        return done, self.run("elementwise", self.costs.quantise("KQV", rows), done) if quantise else done

    def add(self, rows: int, x: Jobs, update: Update[Jobs]) -> Jobs:
        return self.run("elementwise", self.costs.norm(rows), update[0])

    def bias(self, op: str) -> None:
        return None

    # -- attention

    def kqv(self, piece: OpPiece, span: RowSpan, normed: Sequence[Jobs]) -> Jobs:
        ready = piece.nano_batch not in self.read_whole
        if self.costs.quantised and ready and piece.rows < self.nano_batches[piece.nano_batch]:
            normed = [self.run("elementwise", self.costs.cut(piece.rows), *normed)]  # cuBLAS takes no slice in fp8
        self._gemm("KQV", piece.rows, *normed, ready=ready)
        factors: Jobs = ()
        if self.costs.shapes.qk_norm:
            factors = self.run("elementwise", self.costs.squares(piece.rows))
        if self.costs.shapes.qk_norm == "projection" and self.devices > 1:
            summed, share = self.costs.squares_reduction(piece.rows), self.shares.network
            job = Job(self.name, "collective", NETWORK, summed, factors, share, piece.rows * 8.0, "all-reduce")
            factors = self._start(job)
        made = self.run("elementwise", self.costs.rope(piece.rows), factors)
        self.made.append((piece.start, piece.stop, made))
        return made

    def queries(self, kqv: Jobs) -> Jobs:
        return kqv

    def append(self, piece: OpPiece, kqv: Jobs) -> None:
        written = self.run("kernel", self.costs.append(piece.rows), self.awaited)
        self.made.append((piece.start, piece.stop, written))

    def _reads(self, start: int, stop: int) -> Jobs:
        """What makes or writes any of rows [start, stop)."""
        self.awaited = ()
        return tuple(sorted({j for first, last, jobs in self.made if first < stop and start < last for j in jobs}))

    def decode_attention(self, piece: OpPiece, span: RowSpan, q: Sequence[Jobs]) -> Jobs:
        needs = self._reads(piece.start, piece.stop)
        prediction = self.costs.decode_attention(piece.rows, self.sms, self.layer)
        if not self.lane:
            return self.run("attention", prediction, needs)
        share, capped = self.shares.attention, self.sms is not None
        if self.sms is not None:
            share = min(1.0, self.sms / self.costs.model.hardware.sm_count)
        elif not self.lanes:
            share = 1.0  # nothing holds the kernel back
        return self._start(Job(self.name, "attention", SIDE, prediction, needs, share, prediction.bytes, capped=capped))

    def prefill_attention(self, piece: OpPiece, span: RowSpan, q: Sequence[Jobs]) -> Jobs:
        """A chunk's later rows see its earlier ones."""
        needs = self._reads(self.first_prefill, piece.stop)
        return self.run("attention", self.costs.prefill_attention(piece.rows, self.layer), needs)

    # -- GEMMs after attention

    def heads(self, piece: OpPiece, span: RowSpan, attention: Sequence[Jobs]) -> Jobs:
        if self.fp8_gathers:
            return self.run("elementwise", self.costs.quantise("O over K", piece.rows, self.one_pass), *attention)
        if self.lanes:
            return tuple(sorted(set().union(*attention)))
        return self.run("elementwise", self.costs.transpose(piece.rows), *attention)

    def o_over_n(self, piece: OpPiece, gathered: Jobs) -> Jobs:
        if not self.fp8_gathers:
            return self._gemm("O over N", piece.rows, gathered)
        joined = self.run("elementwise", self.costs.join(piece.rows), gathered)
        return self._gemm("O over N", piece.rows, joined, ready=True)

    def o_over_k(self, piece: OpPiece, span: RowSpan, attention: Sequence[Jobs]) -> Jobs:
        return self._gemm("O over K", piece.rows, *attention)

    def up_gate(self, piece: OpPiece, span: RowSpan, normed: Sequence[Jobs]) -> Jobs:
        done: Jobs = ()
        for name, share in self.mlps:
            name, ready = f"UG{name}", piece.piece not in self.read_whole
            done = self._gemm(name, piece.rows, *normed, done, ready=ready, share=share)
            done = self._activated(name, piece.rows, done, share)
        return done

    def _activated(self, name: str, rows: int, done: Jobs, share: float) -> Jobs:
        if self.costs.quantised and self.one_pass and self.costs.shapes.gated_in_one:
            return self.run("elementwise", self.costs.silu_quantised(rows))
        done = self.run("elementwise", self.costs.silu(name, rows).times(share), done)
        if self.costs.quantised and self.one_pass:
            done = self.run("elementwise", self.costs.quantise("D", rows, True), done)
        return done

    # -- experts

    def route(self, piece: OpPiece, span: RowSpan, normed: Sequence[Jobs]) -> Jobs:
        ready = self._routed("gemm", self.costs.router(piece.rows), *normed)
        for prediction in self.costs.places(piece.rows, self.whole_experts):
            ready = self._routed("elementwise", prediction, ready)
        for _ in range(2 if self.costs.grouped_kernels else 0):
            ready = self._routed("elementwise", self.costs.tiles(), ready)
        return ready

    def _routed(self, kind: str, prediction: Prediction, *needs: Jobs) -> Jobs:
        """A kernel that layers without experts do not have."""
        return self.run(kind, prediction.times(self.routed), *needs)

    def dispatch(self, piece: OpPiece, routing: Jobs, span: RowSpan, normed: Sequence[Jobs]) -> Jobs:
        return self._routed("kernel", self.costs.dispatch(piece.rows, self.whole_experts), routing, *normed)

    def experts_up(self, piece: OpPiece, routing: Jobs, rows: Jobs) -> Jobs:
        return self._grouped("UG", piece, routing, rows)

    def experts_down(self, piece: OpPiece, routing: Jobs, activated: Jobs) -> Jobs:
        return self._grouped("D", piece, routing, activated)

    def _grouped(self, name: str, piece: OpPiece, routing: Jobs, x: Jobs) -> Jobs:
        return self._routed("gemm", self.costs.grouped(name, piece.rows, self.whole_experts), routing, x)

    def combine(self, piece: OpPiece, routing: Jobs, projected: Jobs, shared: Jobs | None) -> Jobs:
        done = self.costs.combine(piece.rows, self.whole_experts)
        return self._routed("kernel", done, routing, projected, shared or ())

    def down(self, piece: OpPiece, activated: Jobs) -> Jobs:
        for name, share in self.mlps:
            activated = self._gemm(f"D{name}", piece.rows, activated, ready=self.one_pass, share=share)
        return activated
