"""This package's kernels in the benchmark: their inputs, whether they are right, how long they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.append_kv import append_kv, quantise
from kernels_pallas.bench.cases import AppendCase, Case, DecodeCase, PrefillCase
from kernels_pallas.bench.expert_cases import ExpertCase
from kernels_pallas.bench.experts import expert_call
from kernels_pallas.bench.goals import expected_us
from kernels_pallas.bench.measure import FULL, Effort, chained, checked, row_error, seconds
from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.prefill_attention import prefill_attention
from kernels_pallas.targets import mosaic_supported
from kernels_pallas.tuning import APPEND, DECODE, DEFAULT_GPU, GROUPED, PAGE_TOKENS, PREFILL

CHECKED_ROWS = 8
DRAWN_PAGES = 4099  # a pool repeats after as many: what page is read still shows, and drawing stays quick
FP8_UNIT = 1 / 16  # of random pages in fp8: the largest of normal numbers stay in range


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how hard. `interpret`: as the kernels take it; the CPU alone has one."""

    gpu: str = DEFAULT_GPU
    capability: tuple[int, int] = (9, 0)
    effort: Effort = FULL
    interpret: Any = None

    def mosaic(self, tunings: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments that choose the Mosaic backend."""
        return {"backend": "mosaic", "interpret": self.interpret, "tuning": tunings[self.gpu]}

    def calls(self, case: Case) -> int:
        """In one timed program."""
        us = expected_us(case, self.gpu)
        return self.effort.most_calls if us is None else self.effort.calls(us * 1e-6)

    def sets(self, case: Case) -> int:
        """Of inputs, that those calls use in turn."""
        if isinstance(case, PrefillCase):
            size = 2 * case.pages * PAGE_TOKENS * case.model.kv_heads * case.model.head_dim * 2
        else:
            size = case.bytes
        return self.effort.sets(size, self.calls(case))


def decode_call(case: DecodeCase, setting: Setting) -> Callable[..., Any]:
    def call(q: Any, shared: Any, table: Any) -> Any:
        keys, values, lengths, *scales = shared
        named = dict(zip(("k_scale", "v_scale"), scales, strict=True)) if case.fp8 else {}
        return decode_attention(q, keys, values, table, lengths, **named, **setting.mosaic(DECODE))[0]

    return call


def append_call(case: AppendCase, setting: Setting, backend: str) -> Callable[..., Any]:
    more = setting.mosaic(APPEND) if backend == "mosaic" else {}

    def call(k_pages: Any, v_pages: Any, k: Any, v: Any, pages: Any, slots: Any, *scales: Any) -> Any:
        named = dict(zip(("k_scale", "v_scale"), scales, strict=True)) if case.fp8 else {}
        return append_kv(k_pages, v_pages, k, v, pages, slots, **named, **more)

    return call


def prefill_call(setting: Setting) -> Callable[..., Any]:
    def call(q: Any, shared: Any, table: Any) -> Any:
        keys, values, starts, lengths = shared
        return prefill_attention(q, keys, values, table, starts, lengths, **setting.mosaic(PREFILL))

    return call


def programs(case: Case, setting: Setting) -> dict[str, tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]]:
    """What is measured of a case, by implementation, as functions of the case's avals: for compiling without a GPU."""
    if isinstance(case, ExpertCase):
        names, many = jax.tree.structure(case.avals()), tuple(jax.tree.leaves(case.avals()))

        def flat(call: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *x: call(*jax.tree.unflatten(names, x))

        backends = {"mosaic": setting.mosaic(GROUPED), "xla": {}}
        return {name: (flat(expert_call(case, options)), many) for name, options in backends.items()}
    if isinstance(case, AppendCase):
        return {name: (append_call(case, setting, name), case.avals()) for name in ("mosaic", "xla")}
    if isinstance(case, DecodeCase):
        decode = decode_call(case, setting)
        return {"mosaic": (lambda q, k, v, t, n, *s: decode(q, (k, v, n, *s), t), case.avals(case.pages))}
    if not mosaic_supported(setting.capability, "prefill_attention"):
        return {}
    prefill = prefill_call(setting)
    return {"mosaic": (lambda q, k, v, t, starts, n: prefill(q, (k, v, starts, n), t), case.avals())}


@partial(jax.jit, static_argnums=(1, 2, 3))
def draw(name: jax.Array, shape: tuple[int, ...], dtype: Any, unit: float = 1.0) -> jax.Array:
    """Normal numbers in units of `unit`. Beyond DRAWN_PAGES, what the leading axis holds repeats. Names are of "rbg",
    the generator that XLA compiles fastest."""
    some = (min(shape[0], DRAWN_PAGES), *shape[1:])
    drawn = (jax.random.normal(name, some, jnp.bfloat16).astype(jnp.float32) / unit).astype(dtype)
    return drawn if some == shape else drawn[jnp.arange(shape[0], dtype=jnp.int32) % DRAWN_PAGES]


def _scales(case: DecodeCase | AppendCase) -> tuple[jax.Array, ...]:
    """K's and V's, different for every head."""
    if not case.fp8:
        return ()
    heads = jnp.arange(case.model.kv_heads, dtype=jnp.float32)
    return (1 + heads / 8) * FP8_UNIT, (1.5 - heads / 16) * FP8_UNIT


def decode_tables(case: DecodeCase, sets: int) -> np.ndarray:
    """[sets, rows, row_pages]: each set owns pages of its own, in random order; entries past a length are 0."""
    order = np.random.default_rng(1).permutation(sets * case.pages).astype(np.int32)
    needed = -(-case.lengths() // PAGE_TOKENS)
    tables = np.zeros((sets, case.rows, case.row_pages), np.int32)
    tables[:, np.arange(case.row_pages)[None, :] < needed[:, None]] = order.reshape(sets, case.pages)
    return tables


@dataclass(frozen=True)
class DecodeInputs:
    q: jax.Array
    keys: jax.Array
    values: jax.Array
    lengths: jax.Array
    scales: tuple[jax.Array, ...]
    tables: list[jax.Array]
    calls: int  # of a timed program

    @classmethod
    def make(cls, case: DecodeCase, setting: Setting) -> DecodeInputs:
        sets = setting.sets(case)
        q_aval, pool, *_ = case.avals(sets * case.pages)
        names = jax.random.split(jax.random.key(0, impl="rbg"), 3)
        unit = FP8_UNIT if case.fp8 else 1.0
        return cls(
            draw(names[0], q_aval.shape, jnp.dtype(jnp.bfloat16)),
            draw(names[1], pool.shape, case.dtype, unit),
            draw(names[2], pool.shape, case.dtype, unit),
            jnp.asarray(case.lengths()),
            _scales(case),
            [jnp.asarray(table) for table in decode_tables(case, sets)],
            setting.calls(case),
        )

    def error(self, out: jax.Array) -> float:
        """Of some requests of the first set, against float32 on the same device."""
        table, rows = self.tables[0], self.q.shape[0]
        some = np.unique(np.linspace(0, rows - 1, min(CHECKED_ROWS, rows)).astype(np.int32))
        pools = [pool[table[some].reshape(-1)].astype(jnp.float32) for pool in (self.keys, self.values)]
        if self.scales:
            pools = [pool * scale[None, :, None, None] for pool, scale in zip(pools, self.scales, strict=True)]
        identity = jnp.arange(len(some) * table.shape[1], dtype=jnp.int32).reshape(len(some), -1)
        want, _ = jax.jit(decode_attention)(self.q[some].astype(jnp.float32), *pools, identity, self.lengths[some])
        return row_error(out[some], want)


def time_decode(
    call: Callable[..., Any], inputs: DecodeInputs, effort: Effort, pools: tuple[jax.Array, jax.Array] | None = None
) -> dict[str, Any]:
    """One implementation: its error, then its time. Raises RuntimeError when the error is beyond the tolerance.

    `pools`: the same K and V in another layout.
    """
    shared = (*(pools or (inputs.keys, inputs.values)), inputs.lengths, *inputs.scales)
    error = checked(inputs.error(jax.jit(call)(inputs.q, shared, inputs.tables[0])))
    program = chained(call, len(inputs.tables), inputs.calls)
    took = seconds(lambda: program(inputs.q, shared, inputs.tables), effort)
    return {"error": error, "seconds": took / inputs.calls}


def append_places(case: AppendCase, sets: int) -> np.ndarray:
    """[sets, 2, rows]: pages and slots, no place twice in a set."""
    rng = np.random.default_rng(2)
    drawn = [rng.choice(case.pages * PAGE_TOKENS, case.rows, replace=False) for _ in range(sets)]
    return np.stack([np.divmod(places.astype(np.int32), PAGE_TOKENS) for places in drawn])


def appends(call: Callable[..., Any], sets: int, calls: int) -> Callable[..., Any]:
    """A program of `calls` appends, each to the pools that the one before wrote: its first argument, donated."""

    @partial(jax.jit, donate_argnums=0)
    def program(pools: Any, own: list[Any], scales: Any) -> Any:
        once = jax.jit(call)
        for i in range(calls):
            pools = once(*pools, *own[i % sets], *scales)
        return pools

    return program


def time_append(case: AppendCase, setting: Setting, backend: str) -> dict[str, Any]:
    """The error is that of the rows written, bit for bit; any other place that changes counts as infinite."""
    calls, sets = setting.calls(case), setting.sets(case)
    pool, _, row, *_ = case.avals()
    names = jax.random.split(jax.random.key(0, impl="rbg"), 2 + 2 * sets)
    pools = tuple(draw(name, pool.shape, case.dtype) for name in names[:2])
    places = jnp.asarray(append_places(case, sets))
    own = [
        (*(draw(name, row.shape, jnp.dtype(jnp.bfloat16)) for name in names[2 + 2 * i : 4 + 2 * i]), *places[i])
        for i in range(sets)
    ]
    call, scales = append_call(case, setting, backend), _scales(case)
    k, v, pages, slots = own[0]
    rows = tuple(quantise(x, s) for x, s in zip((k, v), scales, strict=True)) if case.fp8 else (k, v)
    # Written in another way than either backend's: by XLA, one index for the page and one for the slot.
    want = jax.jit(lambda pools: tuple(p.at[pages, :, slots].set(x) for p, x in zip(pools, rows, strict=True)))(pools)
    got = jax.jit(call)(*pools, *own[0], *scales)
    same = all(bool((_bits(a) == _bits(b)).all()) for a, b in zip(got, want, strict=True))
    checked(0.0 if same else np.inf)
    del want, got

    program = appends(call, sets, calls)

    def run() -> Any:
        nonlocal pools
        pools = program(pools, own, scales)
        return pools

    return {"error": 0.0, "seconds": seconds(run, setting.effort) / calls}


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint8 if x.dtype.itemsize == 1 else jnp.uint16)


@dataclass(frozen=True)
class PrefillInputs:
    q: jax.Array
    keys: jax.Array
    values: jax.Array
    starts: jax.Array
    lengths: jax.Array
    tables: list[jax.Array]
    calls: int  # of a timed program

    @classmethod
    def make(cls, case: PrefillCase, setting: Setting) -> PrefillInputs:
        q, pool, *_ = case.avals()
        sets = setting.sets(case)
        names = jax.random.split(jax.random.key(0, impl="rbg"), 3)
        shape, bf16 = (sets * case.pages, *pool.shape[1:]), jnp.dtype(jnp.bfloat16)
        order = np.random.default_rng(1).permutation(sets * case.pages).astype(np.int32)
        return cls(
            draw(names[0], q.shape, bf16),
            draw(names[1], shape, bf16),
            draw(names[2], shape, bf16),
            jnp.array([0, case.rows], jnp.int32),
            jnp.array([case.context], jnp.int32),
            [jnp.asarray(table) for table in order.reshape(sets, 1, case.pages)],
            setting.calls(case),
        )

    def error(self, out: jax.Array) -> float:
        """Of some rows: each is a decode step over what it sees, in float32 on the same device."""
        rows = self.q.shape[0]
        some = np.unique(np.linspace(0, rows - 1, min(CHECKED_ROWS, rows)).astype(np.int32))
        pools = [pool[self.tables[0][0]].astype(jnp.float32) for pool in (self.keys, self.values)]
        identity = jnp.broadcast_to(jnp.arange(pools[0].shape[0], dtype=jnp.int32), (len(some), pools[0].shape[0]))
        seen = self.lengths[0] - rows + jnp.asarray(some) + 1
        want, _ = jax.jit(decode_attention)(self.q[some].astype(jnp.float32), *pools, identity, seen)
        return row_error(out[some], want)


def time_prefill(
    call: Callable[..., Any], inputs: PrefillInputs, effort: Effort, contiguous: list[Any] | None = None
) -> dict[str, Any]:
    """`contiguous`: K and V of every table, for a kernel that knows no pages."""
    shared = (inputs.keys, inputs.values, inputs.starts, inputs.lengths)
    own = inputs.tables if contiguous is None else contiguous
    error = checked(inputs.error(jax.jit(call)(inputs.q, shared, own[0])))
    program = chained(call, len(own), inputs.calls)
    took = seconds(lambda: program(inputs.q, shared, own), effort)
    return {"error": error, "seconds": took / inputs.calls}
