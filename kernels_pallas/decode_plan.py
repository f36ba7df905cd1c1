"""What surrounds decode attention's Mosaic kernels: the static plan of a call, its arguments, queries in fp8."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import expected
from kernels_pallas.checks import FP8, PAGE_SIZE, check_dtypes, check_mosaic_attention, check_sm_budget
from kernels_pallas.tuning import DecodeTuning, DecodeWork, choose_splits

MAX_REPEATS = 16  # query heads per KV head
Q_SLOTS = 2  # items whose queries are in shared memory
UPCAST_SLOTS = 2  # steps of V that are float16 at a time, with fp8 pages


@dataclass(frozen=True)
class Plan:
    """Everything static about one call; a function of shapes and tuning alone, so no row depends on its neighbours."""

    rows: int
    kv_heads: int
    row_pages: int  # of the page table
    repeats: int  # query heads per KV head; what does not divide `heads` is padded to that
    heads: int  # 8 or 16: rows of the queries that are read for an item
    head_dim: int
    splits: int
    min_split_pages: int
    step_pages: int  # pages of one step of the softmax
    stages: int  # steps (K and V) in flight
    programs: int
    scale: float
    fp8: bool  # pages of float8_e4m3fn
    window: int | None  # tokens that a row sees; None: all

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.step_pages * PAGE_SIZE

    @property
    def items(self) -> int:
        return self.rows * self.kv_heads * self.splits

    def block(self, item: jax.Array) -> jax.Array:
        """Which `heads` rows of the queries hold the heads of an item (row and KV head). Tiles have 8 rows: the others
        are those of the item's neighbours, and become columns that are not written."""
        return lax.div(item * self.repeats, jnp.int32(self.heads))

    def offset(self, item: jax.Array) -> jax.Array:
        """Where the heads of an item are in its block."""
        return lax.rem(item * self.repeats, jnp.int32(self.heads))

    def lse_of_heads(self, lse: jax.Array) -> jax.Array:
        """[rows * kv_heads, repeats] of what the kernel wrote, [rows * kv_heads, heads]."""
        if self.whole:
            return lse
        item = jnp.arange(lse.shape[0], dtype=jnp.int32)
        head = self.offset(item)[:, None] + jnp.arange(self.repeats, dtype=jnp.int32)[None, :]
        return jnp.take_along_axis(lse, head, axis=1)

    @property
    def whole(self) -> bool:
        """No item reads what is not its own."""
        return self.repeats == self.heads

    @property
    def work(self) -> DecodeWork:
        return DecodeWork(
            items=self.rows * self.kv_heads,
            row_pages=self.seen_pages,
            heads=self.heads,
            head_dim=self.head_dim,
            itemsize=1 if self.fp8 else 2,
        )

    @property
    def terms(self) -> int:
        """Terms a query is the sum of."""
        return 2 if self.fp8 else 1

    @property
    def dtype(self) -> Any:
        """Of the weights, and of V where wgmma reads it."""
        return jnp.float16 if self.fp8 else jnp.bfloat16

    @property
    def seen_pages(self) -> int:
        """Pages of the longest row that it sees a token of, wherever in a page its window begins."""
        return self.row_pages if self.window is None else min(self.row_pages, -(-(self.window - 1) // PAGE_SIZE) + 1)

    def first_token(self, length: jax.Array) -> jax.Array:
        """The first token that a row sees, with a window."""
        assert self.window is not None
        return jnp.maximum(length - self.window, 0)

    def first_page(self, length: jax.Array) -> Any:
        """The page that holds it. Those before are not read."""
        return 0 if self.window is None else lax.div(self.first_token(length), jnp.int32(PAGE_SIZE))

    def pages(self, length: jax.Array) -> jax.Array:
        """Pages of a row from its first one on; a length beyond the page table ends with it."""
        pages = jnp.minimum(ceil_div(length, PAGE_SIZE), self.row_pages)
        return pages if self.window is None else jnp.maximum(pages - self.first_page(length), 0)

    def split_pages(self, pages: Any) -> Any:
        """Pages of one split of a row that has `pages` of them."""
        return jnp.maximum(self.min_split_pages, ceil_div(pages, self.splits))

    @property
    def tile(self) -> jax.ShapeDtypeStruct:
        """One item's result. Partial ones stay transposed, as wgmma gives them: float32 has no transposing store."""
        if self.splits == 1:
            return jax.ShapeDtypeStruct((self.heads, self.head_dim), jnp.bfloat16)
        return jax.ShapeDtypeStruct((self.head_dim, self.heads), jnp.float32)


def make_plan(
    q: jax.Array, k_pages: jax.Array, page_table: jax.Array, scale: float, tuning: DecodeTuning, sm_budget: int | None,
    window: int | None = None,
) -> Plan:  # fmt: skip
    rows, q_heads, d = q.shape
    kv_heads = k_pages.shape[1]
    repeats, fp8 = q_heads // kv_heads, k_pages.dtype == FP8
    heads = 8 if repeats <= 8 else 16
    sms = tuning.sms if sm_budget is None else min(sm_budget, tuning.sms)
    # Of shared memory: V as float16, and queries as they came.
    fp8_bytes = UPCAST_SLOTS * tuning.step_pages * PAGE_SIZE * d * 2 + Q_SLOTS * heads * d * 2
    plan = Plan(
        rows=rows,
        kv_heads=kv_heads,
        row_pages=page_table.shape[1],
        repeats=repeats if heads % repeats == 0 else heads,
        heads=heads,
        head_dim=d,
        splits=1,
        min_split_pages=tuning.min_split_pages,
        step_pages=tuning.step_pages,
        stages=tuning.stages(d, k_pages.dtype.itemsize, fp8_bytes if fp8 else 0),
        programs=sms,
        scale=scale,
        fp8=fp8,
        window=window,
    )
    plan = replace(plan, splits=choose_splits(plan.work, sms, tuning))
    return replace(plan, programs=min(sms, plan.items))


def expected_us(plan: Plan, context: int, tuning: DecodeTuning) -> float | None:
    """Microseconds of a call whose rows have `context` tokens each: K and V of those they see, the queries and the
    result."""
    seen = context if plan.window is None else min(context, plan.window)
    kv = 2 * plan.rows * seen * plan.kv_heads * plan.head_dim * (1 if plan.fp8 else 2)
    rows = plan.rows * plan.kv_heads * plan.repeats * plan.head_dim * 2 * 2
    rates = tuning.expected_fp8 if plan.fp8 else tuning.expected
    return expected.expected_us(rates, kv + rows, plan.programs, tuning.sms)


def ceil_div(x: jax.Array, by: int) -> jax.Array:
    return lax.div(x + jnp.int32(by - 1), jnp.int32(by))  # of non-negative numbers: floor_divide would test the signs


def two_terms(q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """bfloat16 queries [heads, d] as sums of two float8_e4m3fn, high and low [heads, d], and what the sums have to be
    multiplied with, [heads] float32.

    Four bits of significand and four more hold the eight of bfloat16, because a power of two scales each head to below
    256: exact for elements above 2^-9 of the head's largest, and within 2^-17 of the largest for the others.
    """
    wide = q.astype(jnp.float32)
    bits = lax.bitcast_convert_type(jnp.abs(wide).max(axis=1), jnp.int32)
    exponent = jnp.maximum(bits >> 23, 34)  # biased by 127; of a head of nothing but zeros, one that overflows nothing

    def power(biased: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(biased << 23, jnp.float32)

    wide = wide * lax.broadcast_in_dim(power(261 - exponent), q.shape, (0,))  # the largest comes to lie in [128, 256)
    high = wide.astype(FP8)
    return high, (wide - high.astype(jnp.float32)).astype(FP8), power(exponent - 7)


def cut_blocks(plan: Plan, q: jax.Array) -> jax.Array:
    """q [rows, q_heads, d] as blocks [n, heads, d], which needs no copy where heads fill them."""
    rows, d = q.shape[0], q.shape[2]
    q = q.reshape(rows, plan.kv_heads, -1, d)
    more_heads = plan.repeats - q.shape[2]
    more_rows = next(n for n in range(plan.heads) if (rows + n) * plan.kv_heads * plan.repeats % plan.heads == 0)
    if more_heads or more_rows:
        # Not `jnp.pad`, a function of its own: on a stream of its own, XLA finds no stream for a call within a call.
        q = lax.pad(q, jnp.zeros((), q.dtype), ((0, more_rows, 0), (0, 0, 0), (0, more_heads, 0), (0, 0, 0)))
    return q.reshape(-1, plan.heads, d)


def check_mosaic(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array, lengths: jax.Array,
    sm_budget: int | None,
) -> None:  # fmt: skip
    """Raises ValueError, one line that names the argument, for what the kernel does not take."""
    check_dtypes(("q", q, (jnp.bfloat16,)), ("k_pages", k_pages, (jnp.bfloat16, FP8)))
    check_dtypes(("v_pages", v_pages, (k_pages.dtype,)))
    check_dtypes(("page_table", page_table, (jnp.int32,)), ("lengths", lengths, (jnp.int32,)))
    check_mosaic_attention(q, k_pages)
    if (repeats := q.shape[1] // k_pages.shape[1]) > MAX_REPEATS:
        raise ValueError(f"q: {repeats} query heads per KV head; backend 'mosaic' accepts 1 to {MAX_REPEATS}")
    if 0 in (q.shape[0], page_table.shape[1], k_pages.shape[0]):
        raise ValueError(
            "q, page_table, k_pages: backend 'mosaic' accepts at least one row, one page of a row, one page"
        )
    check_sm_budget(sm_budget)
