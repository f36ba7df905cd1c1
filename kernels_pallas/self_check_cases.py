"""Inputs of each Mosaic kernel at small shapes, and what judges its result: what `self_check` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.add_norm import add_rms_norm
from kernels_pallas.append_kv import append_kv, quantise
from kernels_pallas.checks import FP8
from kernels_pallas.combine_rows import combine_rows
from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.gate import Gate
from kernels_pallas.grouped_gemm import gather_rows, grouped_gemm
from kernels_pallas.prefill_attention import prefill_attention
from kernels_pallas.rows_to_fp8 import rows_to_fp8
from kernels_pallas.tuning import ADD_NORM, DECODE, DEFAULT_GPU, GROUPED, PAGE_TOKENS, ROWS

TOLERANCE = 2e-2  # of a row, relative to its norm; the kernels' own tests hold 5e-3
FP8_TOLERANCE = 6e-2  # of a row that was rounded to fp8, which alone is 2.7e-2
ROW_PAGES = 40  # of the longest context: more steps than any tuning has stages, several times
# Of contexts: one token, none, whole pages, many, and enough rows for a program to have several in turn.
LENGTHS = (1, 0, 2 * PAGE_TOKENS, ROW_PAGES * PAGE_TOKENS - 57, 3 * PAGE_TOKENS + 7, 64, 0, 321, 65, 130, 2)
CHUNKS = (1, 0, 1, 72, 20)  # rows of prefill at the end of the first contexts; PADDING rows after them belong to none
PADDING = 3
APPENDED = 261  # rows, more than a program's blocks in flight
NORMED, PARTS, EPS = 101, 4, 1e-5  # rows, more than a program has in shared memory; devices they are gathered from
EXPERT, EXPERT_ROWS = 128, (8, 0, 152, 16, 0)  # size of an expert; rows of each: none, and more than a tile
WIDEST = 1000  # tokens: of a wider window than this, this one is checked, which cuts the longest context
WINDOWED = ("decode_attention", "prefill_attention")  # kernels that know windows
FIRST_PAGE = 5  # where the pages of "this layer" begin: those before belong to nobody


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Of one device. `fp8`: pages of float8_e4m3fn; quantised: weights, so that norms are given in fp8, too; hidden: a
    row of the residual; ffn: columns of an MLP; windows: of the model's attention, where it has some, in tokens: each
    is checked besides attention to everything; sinks: it has those; gate: of its experts, where it has some."""

    q_heads: int
    kv_heads: int
    head_dim: int
    fp8: bool = False
    quantised: bool = False
    hidden: int = 2048
    ffn: int = 1536
    windows: tuple[int, ...] = ()
    sinks: bool = False
    gate: Gate | None = None

    def checked_windows(self, kernel: str) -> list[int | None]:
        """None is all that there is."""
        return [None, *(sorted({min(window, WIDEST) for window in self.windows}) if kernel in WINDOWED else ())]


@dataclass(frozen=True)
class Variant:
    """A way to run a kernel. sm_budget: None is all SMs; splits: of each row of decode attention, which alone has them:
    whole rows and split ones are two kernels; window: tokens that a query sees, None is all."""

    sm_budget: int | None
    splits: int = 1
    window: int | None = None

    @property
    def text(self) -> str:
        sms = "all SMs" if self.sm_budget is None else f"sm_budget {self.sm_budget}"
        splits = "" if self.splits == 1 else f", {self.splits} splits"
        return sms + splits + ("" if self.window is None else f", window {self.window}")


@dataclass(frozen=True)
class Check:
    """One kernel's inputs, and how it is judged.

    run        (variant, *arrays) -> the kernel's result
    reference  (*arrays) -> what it should be, by the XLA path
    error      (result, what it should be) -> the worst row's, relative to its norm
    """

    arrays: tuple[jax.Array, ...]
    run: Callable[..., Any]
    reference: Callable[..., Any]
    error: Callable[[Any, Any], float]


@dataclass(frozen=True)
class _Pages:
    k: jax.Array
    v: jax.Array
    table: jax.Array  # [contexts, ROW_PAGES], less FIRST_PAGE
    scales: dict[str, jax.Array]

    def options(self) -> dict[str, Any]:
        return {"first_page": jnp.int32(FIRST_PAGE), **self.scales}

    def in_float32(self, *arrays: jax.Array) -> list[jax.Array]:
        """Queries and pages, these with the scales in them."""
        q, *pages = (x.astype(jnp.float32) for x in arrays)
        scales = self.scales.values() if self.scales else (jnp.ones(pages[0].shape[1]),) * 2
        return [q, *(x * scale[None, :, None, None] for x, scale in zip(pages, scales, strict=True))]


def _make(heads: Heads, lows: Sequence[int] = ()) -> _Pages:
    """Random contexts in random pages. What nobody owns is large, so that reading it shows. Of a context with a window,
    the pages that lie wholly below token `low` hold NaN, so that reading them shows though they are masked."""
    rng = np.random.default_rng(0)
    count = len(LENGTHS) * ROW_PAGES
    pages = rng.standard_normal((2, FIRST_PAGE + count, heads.kv_heads, PAGE_TOKENS, heads.head_dim), np.float32)
    table = rng.permutation(count).astype(np.int32).reshape(len(LENGTHS), ROW_PAGES)
    for row, length in enumerate(LENGTHS):
        slots = np.arange(ROW_PAGES * PAGE_TOKENS).reshape(ROW_PAGES, PAGE_TOKENS) >= length
        pages[:, FIRST_PAGE + table[row]] += 30 * slots[None, :, None, :, None]
    pages[:, :FIRST_PAGE] += 30
    for row, low in enumerate(lows):
        pages[:, FIRST_PAGE + table[row, : low // PAGE_TOKENS]] = np.nan
    if not heads.fp8:
        k, v = (jnp.asarray(x, jnp.bfloat16) for x in pages)
        return _Pages(k, v, jnp.asarray(table), {})
    scales = {
        name: jnp.asarray(0.25 * (1 + rng.random(heads.kv_heads)), jnp.float32) for name in ("k_scale", "v_scale")
    }
    k, v = (jnp.asarray(x).astype(FP8) for x in pages)
    return _Pages(k, v, jnp.asarray(table), scales)


def _sinks(heads: Heads) -> dict[str, jax.Array]:
    """As large as the log-sum-exp of a few scores."""
    if not heads.sinks:
        return {}
    return {"sinks": jnp.asarray(np.random.default_rng(4).standard_normal(heads.q_heads) + 2, jnp.float32)}


def _queries(heads: Heads, rows: int) -> jax.Array:
    values = np.random.default_rng(1).standard_normal((rows, heads.q_heads, heads.head_dim))
    return jnp.asarray(values, jnp.bfloat16)


def _decode(heads: Heads, mosaic: dict[str, Any], window: int | None) -> Check:
    given = _make(heads, [max(0, n - window) for n in LENGTHS] if window else ())
    tuning, sinks = mosaic.get("tuning") or DECODE[DEFAULT_GPU], _sinks(heads)

    def run(variant: Variant, *arrays: jax.Array) -> Any:
        pages = ROW_PAGES if window is None else min(ROW_PAGES, -(-(window - 1) // PAGE_TOKENS) + 1)
        widest = -(-pages // variant.splits)  # a longer row is split, however few SMs there are
        split = replace(tuning, max_splits=variant.splits, min_split_pages=1, max_split_pages=widest)
        options = mosaic | {"tuning": split, "sm_budget": variant.sm_budget}
        return decode_attention(*arrays, **given.options(), **sinks, window=window, **options)

    def reference(q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> Any:
        return decode_attention(
            *given.in_float32(q, k, v), *rest, first_page=jnp.int32(FIRST_PAGE), window=window, **sinks
        )

    def error(got: Any, want: Any) -> float:
        lse = jnp.where(got[1] == want[1], 0.0, jnp.abs(got[1] - want[1]))  # -inf of empty rows
        return max(_error(got[0], want[0]), float(jnp.where(jnp.isfinite(lse), lse, jnp.inf).max()))

    lengths = jnp.asarray(LENGTHS, jnp.int32)
    return Check((_queries(heads, len(LENGTHS)), given.k, given.v, given.table, lengths), run, reference, error)


def _prefill(heads: Heads, mosaic: dict[str, Any], window: int | None) -> Check:
    firsts = [n - c + 1 for n, c in zip(LENGTHS, CHUNKS, strict=False)]  # what the first row of each chunk sees at most
    given, contexts = _make(heads, [max(0, n - window) for n in firsts] if window else ()), len(CHUNKS)
    more = {"window": window, **_sinks(heads)}

    def run(variant: Variant, *arrays: jax.Array) -> Any:
        return prefill_attention(*arrays, **given.options(), **more, **mosaic, sm_budget=variant.sm_budget)

    def reference(q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> Any:
        return prefill_attention(*given.in_float32(q, k, v), *rest, first_page=jnp.int32(FIRST_PAGE), **more)

    starts = jnp.asarray(np.cumsum((0, *CHUNKS)), jnp.int32)
    lengths = jnp.asarray(LENGTHS[:contexts], jnp.int32)
    q = _queries(heads, sum(CHUNKS) + PADDING)
    return Check((q, given.k, given.v, given.table[:contexts], starts, lengths), run, reference, _error)


def _append(heads: Heads, mosaic: dict[str, Any]) -> Check:
    """Its error is 0 when every page is as it should be, bit for bit, else infinite."""
    given = _make(heads)
    count = given.k.shape[0]
    rng = np.random.default_rng(2)
    k, v = (
        jnp.asarray(rng.standard_normal((APPENDED, heads.kv_heads, heads.head_dim)), jnp.bfloat16) for _ in range(2)
    )
    places = rng.choice((count - FIRST_PAGE) * PAGE_TOKENS, APPENDED, replace=False)
    pages, slots = (jnp.asarray(x, jnp.int32) for x in np.divmod(places, PAGE_TOKENS))
    pages = pages.at[jnp.array([3, APPENDED - 2])].set(count)  # dropped

    def run(variant: Variant, *arrays: jax.Array) -> Any:
        return append_kv(*arrays, **given.options(), **mosaic, sm_budget=variant.sm_budget)

    def reference(k_pages: Any, v_pages: Any, k: Any, v: Any, pages: Any, slots: Any) -> Any:
        """Written in another way than either backend's: one index for the page and one for the slot."""
        rows = [quantise(x, s) for x, s in zip((k, v), given.scales.values(), strict=True)] if heads.fp8 else (k, v)
        at = pages + FIRST_PAGE
        return tuple(
            pool.at[at, :, slots].set(x, mode="drop") for pool, x in zip((k_pages, v_pages), rows, strict=True)
        )

    def error(got: Any, want: Any) -> float:
        return 0.0 if same_bits(got, want) else float("inf")

    return Check((given.k, given.v, k, v, pages, slots), run, reference, error)


def _add_norm(heads: Heads, mosaic: dict[str, Any]) -> Check:
    """The sums are right bit for bit, or the error is infinite."""
    rng = np.random.default_rng(3)
    tuning = mosaic.get("tuning") or ADD_NORM[DEFAULT_GPU]
    x, whole, weight = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((NORMED, heads.hidden), (NORMED, heads.hidden), (heads.hidden,))
    )
    columns = whole.reshape(NORMED, PARTS, -1).transpose(1, 0, 2)  # as gathered from so many devices

    def run(variant: Variant, x: jax.Array, whole: jax.Array, columns: jax.Array, weight: jax.Array) -> Any:
        chosen = replace(tuning, sms=variant.sm_budget or tuning.sms)
        options = mosaic | {"tuning": chosen, "eps": EPS}
        found = [add_rms_norm(x, update, weight, **options) for update in (whole, columns)]
        if heads.quantised:
            total, (values, scales) = add_rms_norm(x, columns, weight, quantise=True, **options)
            found.append((total, values.astype(jnp.float32) * scales[:, None]))
        return found

    def reference(x: jax.Array, whole: jax.Array, columns: jax.Array, weight: jax.Array) -> Any:
        total = (x + whole).astype(jnp.float32)
        normed = total / jnp.sqrt((total * total).mean(axis=1, keepdims=True) + EPS)
        return [(x + whole, normed * weight.astype(jnp.float32)[None])] * (2 + heads.quantised)

    def error(got: Any, want: Any) -> float:
        if not all(same_bits(mine[0], right[0]) for mine, right in zip(got, want, strict=True)):
            return float("inf")
        errors = [_error(mine[1], right[1]) for mine, right in zip(got, want, strict=True)]
        return max(*errors[:2], *(error * TOLERANCE / FP8_TOLERANCE for error in errors[2:]))

    return Check((x, whole, columns, weight), run, reference, error)


def _rows_to_fp8(heads: Heads, mosaic: dict[str, Any]) -> Check:
    """Attention's output in two pieces, over powers of two as well, and what becomes of an MLP's products."""
    rng = np.random.default_rng(6)
    tuning = mosaic.get("tuning") or ROWS[DEFAULT_GPU]
    width = max(512, -(-heads.q_heads * heads.head_dim // 128) * 128)  # of few elements the mean error varies more
    sizes = 0.5 + 4 * rng.random((3, NORMED, 1))  # rows differ, and so do channels
    first, second = (jnp.asarray(rng.standard_normal((NORMED, width)) * size, jnp.bfloat16) for size in sizes[:2])
    product = jnp.asarray(rng.standard_normal((NORMED, 2 * heads.ffn)), jnp.bfloat16)
    token, channel = (jnp.asarray(s, jnp.float32) for s in (sizes[2, :, 0], 0.2 + rng.random(2 * heads.ffn)))
    cuts, gate = ((NORMED - 37, NORMED), (0, NORMED - 5)), heads.gate or Gate()

    def run(variant: Variant, first: Any, second: Any, product: Any, token: Any, channel: Any) -> Any:
        options: dict[str, Any] = mosaic | {"tuning": replace(tuning, sms=variant.sm_budget or tuning.sms)}
        found = [rows_to_fp8(first, second, cuts=cuts, power_of_two=power, **options) for power in (False, True)]
        return [*found, rows_to_fp8(product, gate=gate, scales=(token, channel), **options)]

    def reference(first: Any, second: Any, product: Any, token: Any, channel: Any) -> Any:
        parts = [x.astype(jnp.float32)[a:b] for x, (a, b) in zip((first, second), cuts, strict=True)]
        both = product.astype(jnp.float32) * token[:, None] * channel[None, :]
        return [jnp.concatenate(parts)] * 2 + [gate(both[:, : heads.ffn], both[:, heads.ffn :])]

    def error(got: Any, want: Any) -> float:
        wide = [values.astype(jnp.float32) * scale[:, None] for values, scale in got]
        return max(_error(mine, right) for mine, right in zip(wide, want, strict=True)) * TOLERANCE / FP8_TOLERANCE

    return Check((first, second, product, token, channel), run, reference, error)


def _grouped_gemm(heads: Heads, mosaic: dict[str, Any]) -> Check:
    """An expert MLP, as a layer has it: rows gathered, both weights of a gate, the weight after it, with biases, and
    weighted sums of its rows. Some experts have no row, one has more than a tile, some rows no expert, and a token has
    three choices, none, or some."""
    rng = np.random.default_rng(5)
    tuning = mosaic.get("tuning") or GROUPED[DEFAULT_GPU]
    count, gate, hidden = len(EXPERT_ROWS), heads.gate or Gate(), heads.hidden
    shapes = (NORMED, hidden), (count, 2, EXPERT, hidden), (count, 2, EXPERT), (count, hidden, EXPERT), (count, hidden)
    x, up, up_bias, down, down_bias = (
        jnp.asarray(rng.standard_normal(s) * (s[-1] ** -0.5 if len(s) > 2 and s[-1] != EXPERT else 1), jnp.bfloat16)
        for s in shapes
    )
    sizes, used = jnp.asarray(EXPERT_ROWS, jnp.int32), sum(EXPERT_ROWS)
    rows = jnp.asarray(rng.integers(0, NORMED, used + 64), jnp.int32)
    biases = up_bias, down_bias
    places = np.where(
        rng.random((NORMED, 3)) < np.linspace(0, 1, NORMED)[:, None], rng.integers(0, used, (NORMED, 3)), -1
    )
    place, weights = jnp.asarray(places, jnp.int32), jnp.asarray(rng.random((NORMED, 3)), jnp.float32)

    def mlp(biases: Any, x: Any, rows: Any, sizes: Any, up: Any, down: Any, **options: Any) -> jax.Array:
        by_expert = gather_rows(x, rows, jnp.int32(used), **options)
        inner = grouped_gemm(by_expert, up, sizes, bias=biases[0], gate=gate, **options)
        out = grouped_gemm(inner, down, sizes, bias=biases[1], **options)
        return jnp.concatenate([out[:used], combine_rows(out, place, weights, **options)])

    def run(variant: Variant, *arrays: Any) -> jax.Array:
        options = mosaic | {"tuning": replace(tuning, sms=variant.sm_budget or tuning.sms)}
        return partial(mlp, biases, **options)(*arrays)

    def reference(x: Any, rows: Any, sizes: Any, up: Any, down: Any) -> jax.Array:
        wide = [value.astype(jnp.float32) for value in (x, up, down, *biases)]
        return mlp(wide[3:], wide[0], rows, sizes, wide[1], wide[2])

    return Check((x, rows, sizes, up, down), run, reference, _error)


def _error(got: jax.Array, want: jax.Array) -> float:
    """Of the worst row, relative to its norm; a row that should be 0 must be."""
    off = jnp.linalg.norm(got.astype(jnp.float32) - want, axis=-1)
    norm = jnp.linalg.norm(want, axis=-1)
    error = jnp.where(norm > 0, off / jnp.where(norm > 0, norm, 1.0), jnp.where(off == 0, 0.0, jnp.inf))
    return float(jnp.where(jnp.isfinite(error), error, jnp.inf).max())


@jax.jit
def same_bits(got: Any, want: Any) -> jax.Array:
    """bool [], without waiting for it."""

    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])

    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return jnp.all(jnp.stack([(bits(a) == bits(b)).all() for a, b in pairs]))


_CHECKS: dict[str, Callable[..., Check]] = {
    "decode_attention": _decode,
    "prefill_attention": _prefill,
    "append_kv": _append,
    "add_rms_norm": _add_norm,
    "rows_to_fp8": _rows_to_fp8,
    "grouped_gemm": _grouped_gemm,
}


def make_check(
    kernel: str, heads: Heads, *, window: int | None = None, tuning: Any = None, interpret: Any = None
) -> Check:
    """Inputs of one kernel and what judges it; the arguments are those of `check_kernel`. `window`: of WINDOWED's."""
    mosaic = {"backend": "mosaic", "tuning": tuning, "interpret": interpret}
    return _CHECKS[kernel](heads, mosaic, window) if kernel in WINDOWED else _CHECKS[kernel](heads, mosaic)
