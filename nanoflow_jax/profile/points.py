"""What is measured: ops by their local shapes, at which sizes, and which pairs. Data alone: no device is touched."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoflow_jax.config import ConfigError
from nanoflow_jax.cost.shapes import Shapes
from nanoflow_jax.plan.ops import COLLECTIVE, WIDTH
from nanoflow_jax.plan.ops import OPS as PLAN_OPS
from nanoflow_jax.plan.plan import OpPiece, SchedulePlan, row_quantum

BYTES = {"f32": 4, "bf16": 2}

# The sizes of each op that a table interpolates over, beside those that name a shape.
AXES: Mapping[str, tuple[str, ...]] = {
    "copy": ("bytes",),
    "gemm": ("m",),
    "decode_attention": ("requests", "context", "sms"),
    "prefill_attention": ("tokens", "context"),
    "collective": ("bytes",),
    "append": ("rows",),
    "norm": ("rows",),
    "sampling": ("rows",),
    "grouped_gemm": ("rows",),
    "gather": ("rows",),
    "combine": ("rows",),
}
OPS = (*AXES, "pair")
_HEADS = ("q_heads", "kv_heads", "head_dim", "dtype")
# What names a shape.
SHAPE: Mapping[str, tuple[str, ...]] = {
    "copy": (),
    "gemm": ("n", "k", "dtype"),
    "decode_attention": _HEADS,
    "prefill_attention": _HEADS,
    "collective": ("kind", "devices", "dtype"),
    "append": ("kv_heads", "head_dim", "dtype"),
    "norm": ("hidden", "dtype"),
    "sampling": ("vocab",),
    # Of experts; the sizes are those of `LatencyModel`.
    "grouped_gemm": ("experts", "n", "k", "parts", "room", "dtype"),
    "gather": ("hidden", "room", "dtype"),
    "combine": ("hidden", "choices", "spread", "dtype"),
}
_TEXTS: Mapping[str, Collection[str]] = {
    "dtype": tuple(BYTES),
    "kind": tuple({op.collective for op in PLAN_OPS.values() if op.kind == COLLECTIVE}),
}
LARGEST_SIZE = 2**48
SMALL_BYTES = 1024  # per device, of the smallest collective: what it takes to start one
PAIR_CONTEXT = 1024  # of decode attention in a pair, at most

Size = int | str


@dataclass(frozen=True)
class Point:
    """One op at one size. sizes: its axes (`AXES`) and the rest of its shape, by name; `sms` 0: all of them."""

    op: str
    sizes: tuple[tuple[str, Size], ...]

    @staticmethod
    def of(op: str, **sizes: Size) -> Point:
        return Point(op, tuple(sorted(sizes.items())))

    def __getitem__(self, name: str) -> Any:
        return dict(self.sizes)[name]

    @property
    def family(self) -> tuple[tuple[str, Size], ...]:
        """The sizes that are not axes: points that differ in axes alone are one grid. A collective moves bytes of any
        dtype."""
        left_out = (*AXES[self.op], "dtype") if self.op == "collective" else AXES[self.op]
        return tuple(pair for pair in self.sizes if pair[0] not in left_out)

    def times(self, count: int) -> Point:
        """The op with so many times the work, all of it along its first axis: rows, tokens, requests or bytes."""
        axis = AXES[self.op][0]
        return Point.of(self.op, **{**dict(self.sizes), axis: self[axis] * count})

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, **dict(self.sizes)}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Point:
        """Raises ValueError naming what is wrong."""
        sizes = {name: value for name, value in fields.items() if name != "op"}
        op = str(fields.get("op"))
        if op not in AXES or set(sizes) != {*AXES[op], *SHAPE[op]}:
            raise ValueError(f"{dict(fields)} is not a point; op must be one of {', '.join(AXES)}, with its sizes")
        for name, value in sizes.items():
            if name in _TEXTS:
                if not isinstance(value, str) or value not in _TEXTS[name]:
                    raise ValueError(f"{op}: {name} = {value!r} must be one of {', '.join(_TEXTS[name])}")
            elif type(value) is not int or not (name != "sms") <= value <= LARGEST_SIZE:
                raise ValueError(f"{op}: size {name} = {value!r} must be a whole number above 0")
        return Point.of(op, **sizes)


@dataclass(frozen=True)
class Pair:
    """Two ops that run at once; `second` on another stream, or on the network."""

    first: Point
    second: Point
    op: str = "pair"

    def to_json(self) -> dict[str, Any]:
        return {"op": "pair", "first": self.first.to_json(), "second": self.second.to_json()}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Pair:
        """Raises ValueError naming what is wrong."""
        if not all(isinstance(fields.get(name), dict) for name in ("first", "second")):
            raise ValueError("a pair needs two points: first and second")
        return Pair(Point.from_json(fields["first"]), Point.from_json(fields["second"]))


@dataclass(frozen=True)
class Grid:
    """How finely the axes are sampled, and how long each point is measured.

    rows, contexts, sms, sizes: samples of each axis; runs of `seconds` each, of which the median counts.
    """

    rows: int
    contexts: int
    sms: int
    sizes: int
    runs: int
    seconds: float


GRIDS = {
    "few": Grid(rows=3, contexts=3, sms=2, sizes=3, runs=5, seconds=0.01),
    "normal": Grid(rows=7, contexts=5, sms=5, sizes=7, runs=9, seconds=0.05),
    "dense": Grid(rows=13, contexts=9, sms=8, sizes=13, runs=15, seconds=0.1),
}


@dataclass(frozen=True)
class Scope:
    """What a table is about. tokens: of a step; context: the longest.

    sms: budgets can be given to decode attention, of so many SMs; 0: they cannot. streams: two kernels can run at once
    on one device. network: the devices are there, so that collectives can run. pool_bytes: the most that the pages of
    one point may take.
    """

    shapes: Shapes
    plans: tuple[SchedulePlan, ...]
    tokens: int
    context: int
    page_size: int
    sms: int
    streams: bool
    network: bool
    pool_bytes: int

    @property
    def pool_tokens(self) -> int:
        return self.pool_bytes // (2 * self.shapes.kv_heads * self.shapes.head_dim * self.shapes.element_bytes)


def spread(low: int, high: int, count: int, step: int = 1) -> list[int]:
    """About `count` sizes from `low` to `high`, evenly on a logarithmic scale, rounded to multiples of `step` but for
    the ends."""
    low = min(low, high)
    if count < 2:
        return [high]
    inner = (low * (high / low) ** (i / (count - 1)) for i in range(1, count - 1))
    return sorted({low, high} | {max(low, min(high, round(x / step) * step)) for x in inner})


def points(scope: Scope, grid: Grid, ops: Iterable[str] = OPS) -> list[Point | Pair]:
    """All points of a table, one of each op first, smallest first: an estimate of the time left is soon of use.

    Raises ConfigError for an op that is not known.
    """
    ops = list(ops)
    if unknown := [op for op in ops if op not in OPS]:
        raise ConfigError(f"ops: unknown op {unknown[0]!r}; accepted: {', '.join(OPS)}")
    found: dict[str, list[Point | Pair]] = {op: [] for op in OPS}
    for point in dict.fromkeys([*_single(scope, grid), *_pairs(scope)]):
        found[point.op].append(point)
    chosen = [found[op] for op in OPS if op in ops]
    return [*(p[0] for p in chosen if p), *(point for p in chosen for point in p[1:])]


def gemm_shapes(scope: Scope) -> dict[str, tuple[int, int]]:
    """(n, k) of the GEMMs on one device: the weights `[n, k]` that the plans use."""
    needed = {
        "O over N": any(plan.needs_o_by_output for plan in scope.plans),
        "O over K": any(plan.needs_o_by_input for plan in scope.plans),
    }
    return {name: shape for name, shape in scope.shapes.gemms.items() if needed.get(name, True)}


def _rows(scope: Scope, grid: Grid) -> list[int]:
    """Rows of ops over any part of a step: up to all of it, and the exact sizes of the plans' pieces."""
    rows = set(spread(8, scope.tokens, grid.rows, 8))
    if grid.rows > 3:
        rows |= {piece.rows for plan in scope.plans for piece in _pieces(scope, plan)}
    return sorted(rows)


def _pieces(scope: Scope, plan: SchedulePlan) -> Sequence[OpPiece]:
    exact = plan.tokens_per_step == scope.tokens and plan.decode_tokens is not None
    quantum = row_quantum(scope.shapes.devices)
    decode = plan.decode_tokens if exact else scope.tokens * 5 // 8 // quantum * quantum
    assert decode is not None
    return plan.pieces(decode, scope.tokens - decode, quantum, experts=scope.shapes.experts is not None)


def _collectives(scope: Scope) -> dict[str, int]:
    """Kinds that the plans use, and bytes per row of the widest of each."""
    s, found = scope.shapes, dict[str, int]()
    for plan in scope.plans if scope.network else ():
        for op in dict.fromkeys(PLAN_OPS[piece.op] for piece in _pieces(scope, plan)):
            if op.kind == COLLECTIVE:
                columns = s.width if op.columns == WIDTH else s.hidden
                found[op.collective] = max(found.get(op.collective, 0), columns * s.element_bytes)
    return found


def _single(scope: Scope, grid: Grid) -> list[Point]:
    s, rows = scope.shapes, _rows(scope, grid)
    kv: dict[str, Size] = {"kv_heads": s.kv_heads, "head_dim": s.head_dim, "dtype": s.dtype}
    heads = {"q_heads": s.q_heads, **kv}
    found = [Point.of("copy", bytes=max(scope.pool_bytes // 8, 2**20))]
    found += [Point.of("gemm", m=m, n=n, k=k, dtype=s.dtype) for n, k in gemm_shapes(scope).values() for m in rows]
    for context in spread(scope.page_size, scope.context, grid.contexts, scope.page_size):
        for requests in spread(1, scope.tokens, grid.rows):
            if requests * context <= scope.pool_tokens:
                for sms in _budgets(scope, grid):
                    found.append(Point.of("decode_attention", requests=requests, context=context, sms=sms, **heads))
        for tokens in spread(16, scope.tokens, grid.rows, 16):
            if context + tokens <= scope.pool_tokens:
                found.append(Point.of("prefill_attention", tokens=tokens, context=context, **heads))
    for kind, row_bytes in _collectives(scope).items():
        found.append(_moved(scope, kind, SMALL_BYTES * s.devices))
        for n in spread(8 * s.devices, scope.tokens // s.devices * s.devices, grid.sizes, 8 * s.devices):
            found.append(_moved(scope, kind, n * row_bytes))
    found += [Point.of("append", rows=n, **kv) for n in rows]
    found += [Point.of("norm", rows=n, hidden=s.hidden, dtype=s.dtype) for n in (1, *rows)]
    found += [Point.of("sampling", rows=n, vocab=s.vocab) for n in spread(8, scope.tokens, grid.rows, 8)]
    return found + [point for whole in _splits(scope) for n in rows for point in _of_experts(scope, n, whole)]


def _splits(scope: Scope) -> list[bool]:
    """Whether experts are whole, each on one device, in any of the plans; nothing where there are none."""
    s = scope.shapes
    return sorted({plan.whole_experts(s.experts, s.devices) for plan in scope.plans}) if s.experts else []


def _of_experts(scope: Scope, tokens: int, whole: bool) -> list[Point]:
    """The grouped GEMMs of so many tokens, UG first, and what brings rows to them and from them."""
    s = scope.shapes
    assert s.experts is not None
    spread = s.devices if whole else 1
    rows, room = max(1, tokens * s.experts.per_token // spread), s.room(whole)
    found = [
        Point.of("grouped_gemm", rows=rows, experts=count, n=n, k=k, parts=parts, room=room, dtype=s.dtype)
        for count, n, k, parts in s.expert_gemms(whole).values()
    ]
    found.append(Point.of("gather", rows=rows, hidden=s.hidden, room=room, dtype=s.dtype))
    choices = s.experts.per_token
    return [*found, Point.of("combine", rows=tokens, hidden=s.hidden, choices=choices, spread=spread, dtype=s.dtype)]


def _moved(scope: Scope, kind: str, whole_bytes: int) -> Point:
    s = scope.shapes
    return Point.of("collective", kind=kind, devices=s.devices, dtype=s.dtype, bytes=whole_bytes)


def _budgets(scope: Scope, grid: Grid) -> list[int]:
    """SM budgets, all of them (0) first."""
    steps = (max(8, round(scope.sms * i / (grid.sms + 1) / 4) * 4) for i in range(1, grid.sms + 1))
    return [0, *sorted(set(steps))] if scope.sms else [0]


def _pairs(scope: Scope) -> list[Pair]:
    """UG beside decode attention on each SM budget; UG and both attentions beside each kind of collective; at half a
    step."""
    s, half = scope.shapes, max(8, scope.tokens // 2 // 8 * 8)
    if s.ffn:
        n, k = gemm_shapes(scope)["UG"]
        gemm = Point.of("gemm", m=half, n=n, k=k, dtype=s.dtype)
    else:
        gemm = _of_experts(scope, half, any(_splits(scope)))[0]
    context = min(PAIR_CONTEXT, scope.context, max(scope.page_size, scope.pool_tokens // half))

    heads: dict[str, Size] = {"q_heads": s.q_heads, "kv_heads": s.kv_heads, "head_dim": s.head_dim, "dtype": s.dtype}
    prefill = Point.of("prefill_attention", tokens=half, context=context, **heads)

    def attention(sms: int) -> Point:
        return Point.of("decode_attention", requests=half, context=context, sms=sms, **heads)

    found = []
    if scope.streams:
        budgets = _budgets(scope, GRIDS["normal"])
        found += [Pair(gemm, attention(sms)) for sms in (budgets[1:] or budgets)]
    for kind, row_bytes in _collectives(scope).items():
        moved = _moved(scope, kind, max(1, half // s.devices) * s.devices * row_bytes)
        found += [Pair(first, moved) for first in (gemm, attention(0), prefill)]
    return found
