"""`SchedulePlan`: how a step's rows are cut into nano-batches and op pieces, and in which order one layer issues them.
`plan.file` has the TOML form that people and the search read and write."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from dataclasses import fields as fields_of
from itertools import accumulate, pairwise, takewhile

from nanoflow_jax.config import ConfigError, Experts, Layouts, ModelConfig
from nanoflow_jax.plan.ops import ALL, ATTENTION, DECODE, OPS, PREFILL, STRATEGIES, of_kind

ROW_QUANTUM = 8  # pieces of a rescaled plan start at multiples of this
GATHERS = (None, "fp8")
SPLIT_ABOVE = 512  # steps of fewer rows are bound by latency and weight reads: they run as one nano-batch


def row_quantum(devices: int) -> int:
    """What the rows of rescaled pieces are multiples of on a mesh of `devices`, so that a scattered nano-batch
    divides."""
    return math.lcm(ROW_QUANTUM, devices)


@dataclass(frozen=True)
class NanoBatch:
    """Rows that go through O, UG, D and their collectives together. rows None: all of the step's."""

    rows: int | None
    attention_output: str


@dataclass(frozen=True)
class Lane:
    """A stream beside the main one, and how many SMs (None: all) an op on it may use."""

    stream: int
    sms: int | None = None


@dataclass(frozen=True)
class Target:
    """What a plan was made for: a GPU, the sizes of a model, and the precision of its layers' weights where that is not
    the activations'."""

    gpu: str
    devices: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    # The plan does the same: its digests stay.
    quantization: str | None = field(default=None, repr=False)
    num_experts: int | None = field(default=None, repr=False)

    @staticmethod
    def of(config: ModelConfig, gpu: str, devices: int) -> Target:
        others = ("gpu", "devices", "num_experts")
        sizes = {f.name: getattr(config, f.name) for f in fields_of(Target) if f.name not in others}
        return Target(gpu, devices, **sizes, num_experts=None if config.experts is None else config.experts.count)


@dataclass(frozen=True)
class OpPiece:
    """One op on rows [start, stop) of the step."""

    op: str
    piece: int  # counted from 1
    start: int
    stop: int
    nano_batch: int  # counted from 1; the one that holds `start`

    @property
    def name(self) -> str:
        return f"{self.op}.{self.piece}"

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class SchedulePlan:
    """See the module's docstring for the fields and the file format."""

    name: str
    nano_batches: tuple[NanoBatch, ...]
    description: str = ""
    tokens_per_step: int | None = None
    decode_tokens: int | None = None
    splits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    lanes: Mapping[str, Lane] = field(default_factory=dict)
    target: Target | None = None
    gathers: str | None = None  # "fp8", or None: as the activations
    expert_parallel: bool | None = None

    def __post_init__(self) -> None:
        _check(self)

    def __hash__(self) -> int:
        return hash((self.name, self.nano_batches, self.tokens_per_step, self.decode_tokens, self.order))

    def __repr__(self) -> str:
        """Without what is None by default, so that digests of plans stay as releases add fields."""
        added = ("gathers", "expert_parallel")
        shown = (f for f in fields_of(self) if f.name not in added or getattr(self, f.name) is not None)
        return f"SchedulePlan({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def check_gathers(self, quantization: str | None) -> None:
        """Raises ConfigError where the plan's gathers are in a precision that the model's weights do not have."""
        if self.gathers not in (None, quantization):
            raise ConfigError(
                f"gathers: plan {self.name!r} gathers in {self.gathers}, and the model's weights are not in it; "
                f"accepted: quantization={self.gathers!r}, or a plan without gathers"
            )

    @property
    def digest(self) -> str:
        """Of all that a step does by it."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    @property
    def identity(self) -> str:
        """Name and digest."""
        return f"{self.name} {self.digest[:16]}"

    @property
    def strategies(self) -> frozenset[str]:
        return frozenset(nb.attention_output for nb in self.nano_batches)

    @property
    def needs_o_by_output(self) -> bool:
        """O split over N is used by some nano-batch."""
        return "gather" in self.strategies

    @property
    def needs_o_by_input(self) -> bool:
        """O split over K is used by some nano-batch."""
        return bool(self.strategies & {"reduce", "scatter"})

    def layouts(self, config: ModelConfig, devices: int) -> Layouts:
        """Which weights it needs of a model. Raises ConfigError where the experts cannot be split so."""
        experts, whole = config.experts, self.whole_experts(config.experts, devices)
        if experts is None:
            return Layouts(self.needs_o_by_output, self.needs_o_by_input)
        if (experts.count if whole else experts.size) % devices:
            what = f"{experts.count} experts" if whole else f"experts of size {experts.size}"
            raise ConfigError(
                f"expert_parallel: {str(whole).lower()} splits {what} over {devices} devices, which does not divide; "
                f"accepted: {str(not whole).lower()}"
            )
        return Layouts(self.needs_o_by_output, self.needs_o_by_input, whole)

    def whole_experts(self, experts: Experts | None, devices: int) -> bool:
        """Whether each is on one device."""
        if experts is None:
            return False
        return experts.count % devices == 0 if self.expert_parallel is None else self.expert_parallel

    def pieces(
        self, decode_rows: int, prefill_rows: int, quantum: int = ROW_QUANTUM, *, experts: bool = False
    ) -> tuple[OpPiece, ...]:
        """The plan on a step of `decode_rows + prefill_rows` rows, in issue order.

        At the plan's own size the rows are exactly the plan's. At other sizes the cuts are scaled, decode and
        prefill rows each by their own factor, to multiples of `quantum`; pieces that become empty are dropped. Below
        `SPLIT_ABOVE` rows there is one nano-batch, with the last one's strategy; so there is in a step with a kind of
        row (decode, prefill) that the plan has none of.

        experts: of a model that has some; else the ops that only those have are left out.
        """
        total = decode_rows + prefill_rows
        planned_total, planned_decode = self.tokens_per_step or total, self.decode_tokens or 0
        if self.tokens_per_step is None:
            planned_decode = decode_rows
        elif (total, decode_rows) != (planned_total, planned_decode) and (
            total < SPLIT_ABOVE
            or (decode_rows and not planned_decode)  # the plan says nothing of this kind of row
            or (prefill_rows and planned_decode == planned_total)
        ):
            return SchedulePlan(self.name, (NanoBatch(None, self.nano_batches[-1].attention_output),)).pieces(
                decode_rows, prefill_rows, experts=experts
            )

        def place(row: int) -> int:
            """A row of the plan -> a row of this step; monotone, so pieces stay nested."""
            if (total, decode_rows) == (planned_total, planned_decode):
                return row
            if row <= planned_decode:
                first, last, share = 0, decode_rows, row / max(planned_decode, 1)
            else:
                first, last, share = decode_rows, total, (row - planned_decode) / (planned_total - planned_decode)
            return last if share == 1 else min(last, first + round(share * (last - first) / quantum) * quantum)

        batches = [place(row) for row in self._cuts("O", planned_total, planned_decode)]
        found: dict[str, OpPiece] = {}
        for op in OPS:
            if OPS[op].experts and not experts:
                continue
            cuts = [place(row) for row in self._cuts(op, planned_total, planned_decode)]
            for i, (start, stop) in enumerate(pairwise(cuts), start=1):
                used = OPS[op].splittable or op in STRATEGIES[self.nano_batches[i - 1].attention_output]
                if used and start < stop:
                    batch = max(j for j, edge in enumerate(batches[:-1], start=1) if edge <= start)
                    found[f"{op}.{i}"] = OpPiece(op, i, start, stop, batch)
        order = self.order or tuple(f"{op}.{i}" for op in OPS for i in range(1, len(self._cuts(op, 2, 1))))
        if self.order and not self.names_experts:
            order = self._with_experts(order)
        return tuple(found[name] for name in order if name in found)

    @property
    def names_experts(self) -> bool:
        """Its order says when rows go to the experts and come from them."""
        return any(OPS[name.rpartition(".")[0]].experts for name in self.order)

    def _with_experts(self, order: tuple[str, ...]) -> tuple[str, ...]:
        """The ops that only models with experts have, each right ahead of the one after it in its strategy."""
        full: list[str] = []
        for name in order:
            op, _, piece = name.rpartition(".")
            if not OPS[op].splittable:
                chain = STRATEGIES[self.nano_batches[int(piece) - 1].attention_output]
                at = chain.index(op) if op in chain else 0
                before = takewhile(lambda op: OPS[op].experts, reversed(chain[:at]))
                full += reversed([f"{op}.{piece}" for op in before])
            full.append(name)
        return tuple(full)

    def _cuts(self, op: str, total: int, decode: int) -> list[int]:
        """Rows at which `op` is cut in a step of the plan's own size, both ends included."""
        first, last = {DECODE: (0, decode), PREFILL: (decode, total)}.get(OPS[op].rows, (0, total))
        if op in self.splits:
            return [first, *(first + rows for rows in accumulate(self.splits[op]))]
        batches = [0, *accumulate(total if nb.rows is None else nb.rows for nb in self.nano_batches)]
        return [min(max(row, first), last) for row in batches]


def _check(plan: SchedulePlan) -> None:
    """Everything that makes a plan unable to run. Raises ConfigError."""
    if plan.gathers not in GATHERS:
        raise ConfigError(f"gathers: {plan.gathers!r} is not accepted; expected 'fp8', or no such line")
    if not plan.nano_batches:
        raise ConfigError("nano_batches: at least one is needed")
    for i, batch in enumerate(plan.nano_batches, start=1):
        if batch.attention_output not in STRATEGIES:
            raise ConfigError(
                f"nano_batches[{i}].attention_output: {batch.attention_output!r} is unknown; "
                f"accepted: {', '.join(STRATEGIES)}"
            )
    if plan.tokens_per_step is None:
        sized = any(batch.rows is not None for batch in plan.nano_batches)
        if len(plan.nano_batches) > 1 or sized or plan.splits or plan.decode_tokens is not None:
            raise ConfigError("tokens_per_step: needed by a plan that gives rows, splits or decode_tokens")
    else:
        total, decode = plan.tokens_per_step, plan.decode_tokens
        if decode is None or not 0 <= decode <= total:
            raise ConfigError(f"decode_tokens: {decode} must be between 0 and tokens_per_step = {total}")
        _check_sum("nano_batches", [nb.rows for nb in plan.nano_batches], total, "tokens_per_step")
        rows = {
            ALL: (total, "tokens_per_step"),
            DECODE: (decode, "decode_tokens"),
            PREFILL: (total - decode, "tokens_per_step - decode_tokens"),
        }
        sums = {name: rows[op.rows] for name, op in OPS.items() if op.splittable}
        for op, sizes in plan.splits.items():
            if op not in sums:
                raise ConfigError(f"splits.{op}: op {op!r} is not one that can be split; accepted: {', '.join(sums)}")
            _check_sum(f"splits.{op}", list(sizes), *sums[op])
        missing = set(plan._cuts("O", total, decode)) - set(plan._cuts("KQV", total, decode))
        if missing:
            raise ConfigError(f"splits.KQV: pieces must end where nano-batches end, at row {min(missing)}")
    for op in plan.lanes:
        able = [name for name, known in OPS.items() if known.lane]
        if op not in able:
            raise ConfigError(f"lanes.{op}: op {op!r} cannot leave the main stream; accepted: {', '.join(able)}")
    if plan.order:
        _check_order(plan)


def _check_sum(name: str, sizes: list[int | None], total: int, what: str) -> None:
    if any(s is None or s <= 0 for s in sizes):
        raise ConfigError(f"{name}: every size must be a positive number of rows, not {sizes}")
    if (found := sum(s or 0 for s in sizes)) != total:
        raise ConfigError(f"{name}: sizes {sizes} add up to {found}, not to {what} = {total}")


def _check_order(plan: SchedulePlan) -> None:
    unordered = SchedulePlan(plan.name, plan.nano_batches, "", plan.tokens_per_step, plan.decode_tokens, plan.splits)
    total = plan.tokens_per_step or 2 * ROW_QUANTUM
    decode = plan.decode_tokens if plan.decode_tokens is not None else total // 2
    experts = any(name.startswith(tuple(f"{op}." for op in OPS if OPS[op].experts)) for name in plan.order)
    pieces = {p.name: p for p in unordered.pieces(decode, total - decode, experts=experts)}
    known = [pieces[name] for name in plan.order if name in pieces]
    deferred = deferred_gathers(known)
    for number in deferred:
        first = next((p.name for p in known if p.op == "KQV" and p.nano_batch == number), "")
        if first and plan.order.index(first) < plan.order.index(f"D.AG.{number}"):
            raise ConfigError(
                f"order: 'D.AG.{number}' must come after D.RS.{number}, or, for the layer before, ahead of {first}"
            )
    seen: set[str] = set()
    for name in plan.order:
        if name.rsplit(".", 1)[0] not in OPS:
            raise ConfigError(
                f"order: {name!r} is not a known op; accepted: {', '.join(OPS)}, each with its piece, as 'KQV.1'"
            )
        if name not in pieces:
            raise ConfigError(f"order: {name!r} is not a piece of this plan; its pieces: {', '.join(pieces)}")
        if name in seen:
            raise ConfigError(f"order: {name!r} is listed twice")
        for need in needs(pieces[name], pieces):
            if need not in seen and not (name.startswith("D.AG.") and pieces[name].piece in deferred):
                raise ConfigError(f"order: {name!r} needs {need}, which must come before it")
        seen.add(name)
    if left := [name for name in pieces if name not in seen]:
        raise ConfigError(f"order: {left[0]!r} is missing")


def deferred_gathers(pieces: Iterable[OpPiece]) -> set[int]:
    """Nano-batches whose D.AG is issued before their D.RS: it then gathers what the layer before left."""
    at = {piece.name: i for i, piece in enumerate(pieces)}
    numbers = {int(name.rsplit(".", 1)[1]) for name in at if name.startswith("D.AG.")}
    return {n for n in numbers if at[f"D.AG.{n}"] < at.get(f"D.RS.{n}", len(at))}


def needs(piece: OpPiece, pieces: Mapping[str, OpPiece]) -> list[str]:
    """Names of the pieces of the same layer whose results `piece` reads."""

    def overlapping(op: str, start: int, stop: int) -> list[str]:
        return [p.name for p in pieces.values() if p.op == op and p.start < stop and start < p.stop]

    op = OPS[piece.op]
    if op.reads is not None:  # causal: a chunk's later rows see its earlier ones
        first = min(p.start for p in pieces.values() if p.op == piece.op) if op.causal else piece.start
        return overlapping(op.reads, first, piece.stop)
    if op.splittable:
        return []
    chain = next(
        present
        for ops in STRATEGIES.values()
        if piece.op in (present := [o for o in ops if not OPS[o].experts or f"{o}.{piece.piece}" in pieces])
        and all(f"{o}.{piece.piece}" in pieces for o in present)
    )
    at = chain.index(piece.op)
    if at == 0:
        return [name for other in of_kind(ATTENTION) for name in overlapping(other, piece.start, piece.stop)]
    return [f"{chain[at - 1]}.{piece.piece}"]
