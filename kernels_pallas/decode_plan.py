"""What surrounds decode attention's Mosaic kernel: the static plan of a call, its arguments, joining the splits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.checks import FP8
from kernels_pallas.tuning import DecodeTuning, choose_splits

PAGE_SIZE = 64  # tokens: wgmma's M
HEAD_DIMS = (64, 128)
MAX_REPEATS = 16  # query heads per KV head
LOG2_E = math.log2(math.e)
UPCAST_SLOTS = 2  # steps of V that are float16 at a time, with fp8 pages


@dataclass(frozen=True)
class Plan:
    """Everything static about one call; a function of shapes and tuning alone, so no row depends on its neighbours."""

    rows: int
    kv_heads: int
    row_pages: int  # of the page table
    heads: int  # query heads per KV head, padded to 8 or 16
    head_dim: int
    splits: int
    min_split_pages: int
    step_pages: int  # pages of one step of the softmax
    stages: int  # steps (K and V) in flight
    programs: int
    scale: float
    fp8: bool  # pages of float8_e4m3fn

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.step_pages * PAGE_SIZE

    @property
    def items(self) -> int:
        return self.rows * self.kv_heads * self.splits

    @property
    def terms(self) -> int:
        """Terms a query is the sum of."""
        return 2 if self.fp8 else 1

    @property
    def dtype(self) -> Any:
        """Of the weights, and of V where wgmma reads it."""
        return jnp.float16 if self.fp8 else jnp.bfloat16

    def pages(self, length: jax.Array) -> jax.Array:
        """Pages of a row; a length beyond the page table ends with it."""
        return jnp.minimum(ceil_div(length, PAGE_SIZE), self.row_pages)

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
    q: jax.Array, k_pages: jax.Array, page_table: jax.Array, scale: float, tuning: DecodeTuning, sm_budget: int | None
) -> Plan:
    rows, q_heads, d = q.shape
    kv_heads = k_pages.shape[1]
    fp8 = k_pages.dtype == FP8
    sms = tuning.sms if sm_budget is None else min(sm_budget, tuning.sms)
    splits = choose_splits(rows * kv_heads, page_table.shape[1], sms, tuning)
    upcast_bytes = UPCAST_SLOTS * tuning.step_pages * PAGE_SIZE * d * 2 if fp8 else 0
    return Plan(
        rows=rows,
        kv_heads=kv_heads,
        row_pages=page_table.shape[1],
        heads=8 if q_heads <= 8 * kv_heads else 16,
        head_dim=d,
        splits=splits,
        min_split_pages=tuning.min_split_pages,
        step_pages=tuning.step_pages,
        stages=tuning.stages(d, k_pages.dtype.itemsize, upcast_bytes),
        programs=min(sms, rows * kv_heads * splits),
        scale=scale,
        fp8=fp8,
    )


def expected_us(plan: Plan, context: int, tuning: DecodeTuning) -> float | None:
    """Microseconds of a call whose rows have `context` tokens each: K and V, the queries and the result."""
    expected = tuning.expected_fp8 if plan.fp8 else tuning.expected
    if expected is None:
        return None
    kv = 2 * plan.rows * context * plan.kv_heads * plan.head_dim * (1 if plan.fp8 else 2)
    rows = plan.rows * plan.kv_heads * plan.heads * plan.head_dim * 2 * 2
    return expected.us(moved=kv + rows, sms=plan.programs, all_sms=tuning.sms)


def ceil_div(x: jax.Array, by: int) -> jax.Array:
    return lax.div(x + jnp.int32(by - 1), jnp.int32(by))  # of non-negative numbers: floor_divide would test the signs


def two_terms(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """bfloat16 queries [n, heads, d] as sums of two float8_e4m3fn: terms [n, 2, heads, d], and what the sums have to be
    multiplied with, [n, heads] float32.

    Four bits of significand and four more hold the eight of bfloat16, because a power of two scales each head to below
    256: exact for elements above 2^-9 of the head's largest, and within 2^-17 of the largest for the others.
    """
    wide = q.astype(jnp.float32)
    bits = lax.bitcast_convert_type(jnp.abs(wide).max(axis=-1), jnp.int32)
    exponent = jnp.maximum(bits >> 23, 34)  # biased by 127; of a head of nothing but zeros, one that overflows nothing

    def power(biased: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(biased << 23, jnp.float32)

    wide = wide * power(261 - exponent)[..., None]  # the largest comes to lie in [128, 256)
    high = wide.astype(FP8)
    low = (wide - high.astype(jnp.float32)).astype(FP8)
    # A selection, not a concatenation: it becomes one kernel with what stands above.
    term = lax.broadcasted_iota(jnp.int32, (1, 2, 1, 1), 1)
    return jnp.where(term == 0, high[:, None], low[:, None]), power(exponent - 7)


def make_factors(plan: Plan, unit: jax.Array, k_scale: jax.Array, v_scale: jax.Array) -> jax.Array:
    """[rows * kv_heads, 2, 16] float32: what turns products of fp8 numbers into logarithms to base 2, and into values.

    unit [rows * kv_heads, heads]: what the terms of the queries are multiples of.
    """
    unit = lax.pad(
        unit, jnp.zeros((), unit.dtype), ((0, 0, 0), (0, MAX_REPEATS - plan.heads, 0))
    )  # not jnp.pad: a call
    unit = unit.reshape(-1, plan.kv_heads, 1, MAX_REPEATS)
    k_scale, v_scale = (x[None, :, None, None] for x in (k_scale * (plan.scale * LOG2_E), v_scale))
    which = lax.broadcasted_iota(jnp.int32, (1, 1, 2, 1), 2)
    return jnp.where(which == 0, unit * k_scale, v_scale).reshape(-1, 2, MAX_REPEATS)


def combine(plan: Plan, out: jax.Array, lse: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Joins the splits, out [rows, kv_heads, splits, d, heads] and lse [rows, kv_heads, splits, heads] float32."""
    pages = plan.pages(lengths)
    size = plan.split_pages(pages)
    used = lax.div(pages + size - 1, size)
    alive = (jnp.arange(plan.splits, dtype=jnp.int32)[None, :] < used[:, None])[:, None, :, None]
    # What the splits beyond the length hold was never written.
    lse = jnp.where(alive, lse, -jnp.inf)
    top = lse.max(axis=2, keepdims=True)
    weight = jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top))
    total = weight.sum(axis=2, keepdims=True)
    some = jnp.where(total == 0.0, 1.0, total)
    joined = (jnp.where(alive[..., None], out, 0.0) * (weight / some)[..., None, :]).sum(axis=2)
    return joined.astype(jnp.bfloat16).transpose(0, 1, 3, 2), (top + jnp.log(total))[:, :, 0]


def check_mosaic(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    sm_budget: int | None,
) -> None:
    """Raises ValueError, one line that names the argument, for what the kernel does not take."""
    pages = (jnp.dtype(jnp.bfloat16), jnp.dtype(FP8))
    for name, x, dtypes in (
        ("q", q, pages[:1]),
        ("k_pages", k_pages, pages),
        ("v_pages", v_pages, (k_pages.dtype,)),
        ("page_table", page_table, (jnp.dtype(jnp.int32),)),
        ("lengths", lengths, (jnp.dtype(jnp.int32),)),
    ):
        if x.dtype not in dtypes:
            accepted = ", ".join(dtype.name for dtype in dtypes)
            raise ValueError(f"{name}: dtype {x.dtype}; backend 'mosaic' accepts {accepted}")
    if k_pages.shape[2] != PAGE_SIZE:
        raise ValueError(f"k_pages, v_pages: page size {k_pages.shape[2]}; backend 'mosaic' accepts {PAGE_SIZE}")
    if q.shape[2] not in HEAD_DIMS:
        accepted = ", ".join(map(str, HEAD_DIMS))
        raise ValueError(f"q: head size {q.shape[2]}; backend 'mosaic' accepts {accepted}")
    if (repeats := q.shape[1] // k_pages.shape[1]) > MAX_REPEATS:
        raise ValueError(f"q: {repeats} query heads per KV head; backend 'mosaic' accepts 1 to {MAX_REPEATS}")
    if 0 in (q.shape[0], page_table.shape[1], k_pages.shape[0]):
        raise ValueError(
            "q, page_table, k_pages: backend 'mosaic' accepts at least one row, one page of a row, one page"
        )
    if sm_budget is not None and sm_budget < 1:
        raise ValueError(f"sm_budget: {sm_budget} must be at least 1")
