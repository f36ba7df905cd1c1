"""Prefill attention for Hopper (sm_90a) with Mosaic GPU: causal attention of packed chunks over paged K and V.

A persistent program per SM has two warpgroups that compute and one that copies. A work item is a tile of 128 query rows
that share a KV head, 64 rows per computing warpgroup; both read the same steps of 128 tokens (two pages) of K and V.
With a multiple of 8 query heads per KV head the rows are 16 tokens x 8 heads, so that short chunks fill a tile too;
otherwise 64 tokens x 2 heads, or 128 tokens of one.

Technique (FlashAttention-3, Shah et al. 2024): P stays in registers as wgmma's A operand; the scores of a step and the
values of the step before are multiplied together while the softmax runs; the two warpgroups take turns to issue their
products, so that one's softmax runs beside the other's. Steps go from the diagonal back to the first token: what needs
a mask comes first. With a window, a tile's steps end with the one that holds the first key of its first row: no page
before that key's is read, and the steps that its last row does not see whole have a mask again.

The tiles depend on the packing, so XLA lists them, heaviest first, and programs take them in snake order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.checks import PAGE_SIZE, check_dtypes, check_mosaic_attention, check_sm_budget
from kernels_pallas.expected import scheduled_as
from kernels_pallas.mosaic_parts import tiled
from kernels_pallas.prefill_body_mosaic import Q_SLOTS, prefill_body
from kernels_pallas.prefill_tiles import GROUPS, ROWS, STEP, UNIT, UNITS, Plan, list_tiles
from kernels_pallas.tuning import PrefillTuning


def _call(plan: Plan, shape: tuple[int, ...], interpret: Any) -> Callable[..., jax.Array]:
    d, stages = plan.head_dim, plan.stages
    return plgpu.kernel(
        prefill_body(plan, interpret is not None),
        out_type=jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        scratch_types=[
            tiled((stages, STEP, d)),
            tiled((stages, STEP, d)),
            tiled((Q_SLOTS, GROUPS, ROWS, d)),
            tiled((GROUPS, ROWS, STEP)) if interpret is not None else None,
            [plgpu.RefUnion(tiled((ROWS, d)), plgpu.SMEM((ROWS, d), jnp.bfloat16)) for _ in range(GROUPS)],
            *(plgpu.Barrier(num_barriers=stages, num_arrivals=2) for _ in range(2)),
            *(plgpu.Barrier(num_barriers=stages, num_arrivals=GROUPS) for _ in range(2)),
            plgpu.Barrier(num_barriers=Q_SLOTS, num_arrivals=GROUPS * UNITS),
            plgpu.Barrier(num_barriers=Q_SLOTS, num_arrivals=GROUPS),
            plgpu.Barrier(num_barriers=stages, num_arrivals=GROUPS),
            plgpu.Barrier(num_barriers=GROUPS),
        ],
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=GROUPS + 1,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="prefill_attention",
    )


def check_mosaic(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array, row_starts: jax.Array,
    lengths: jax.Array, scale: float, sm_budget: int | None,
) -> None:  # fmt: skip
    """Raises ValueError, one line that names the argument, for what the kernel does not take."""
    bf16, whole = (jnp.bfloat16,), (jnp.int32,)
    check_dtypes(("q", q, bf16), ("k_pages", k_pages, bf16), ("v_pages", v_pages, bf16))
    check_dtypes(("page_table", page_table, whole), ("row_starts", row_starts, whole), ("lengths", lengths, whole))
    check_mosaic_attention(q, k_pages)
    if 0 in (q.shape[0], *page_table.shape, k_pages.shape[0]):
        raise ValueError(
            "q, page_table, k_pages: backend 'mosaic' accepts at least one row, one segment, one page of it, one page"
        )
    if not scale > 0:
        raise ValueError(f"scale: {scale} must be positive with backend 'mosaic'")
    check_sm_budget(sm_budget)


def _expected_us(plan: Plan, context: int, tuning: PrefillTuning) -> float | None:
    """Microseconds of a call whose rows see `context` tokens each, which 128 rows together read from memory once. Few
    rows are few tiles, and not every SM has one."""
    if tuning.expected is None:
        return None
    context = context if plan.window is None else min(context, plan.window)
    flops = 4 * plan.tokens * context * plan.q_heads * plan.head_dim
    rows = 2 * plan.tokens * plan.q_heads * plan.head_dim * 2
    kv = 2 * max(1, plan.tokens // 128) * context * plan.kv_heads * plan.head_dim * 2
    busy = min(plan.sms, max(1, plan.tokens // plan.tile_tokens) * plan.head_groups)
    return tuning.expected.us(moved=rows + kv, flops=flops, sms=busy, all_sms=tuning.sms)


def prefill_attention_mosaic(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array, row_starts: jax.Array,
    lengths: jax.Array, *, first_page: jax.Array, scale: float, window: int | None = None,
    sinks: jax.Array | None = None, tuning: PrefillTuning, sm_budget: int | None = None,
    expected_context: int | None = None, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """As `kernels_pallas.prefill_attention`, which describes the arguments and has checked their shapes."""
    check_mosaic(q, k_pages, v_pages, page_table, row_starts, lengths, scale, sm_budget)
    tokens, q_heads, d = q.shape
    kv_heads = k_pages.shape[1]
    packed = (q_heads // kv_heads) % UNIT == 0
    padding = 0 if packed else -tokens % UNIT
    if padding:
        q = jnp.pad(q, ((0, padding), (0, 0), (0, 0)))
    plan = Plan(
        tokens=tokens + padding,
        q_heads=q_heads,
        kv_heads=kv_heads,
        row_pages=page_table.shape[1],
        segments=page_table.shape[0],
        head_dim=d,
        stages=tuning.stages(d),
        sms=tuning.sms if sm_budget is None else min(sm_budget, tuning.sms),
        scale=scale,
        ping_pong=tuning.ping_pong,
        window=window,
        sinks=sinks is not None,
    )
    q = q.reshape((tokens, -1, UNIT, d) if packed else (-1, UNIT, q_heads, d))
    # One index for page and head: with the tiling, a TMA descriptor has no dimension left for two.
    k_pages, v_pages = (x.reshape(-1, PAGE_SIZE, d) for x in (k_pages, v_pages))
    tiles = list_tiles(plan, row_starts, lengths)
    context = plan.row_pages * PAGE_SIZE if expected_context is None else expected_context
    with scheduled_as(_expected_us(plan, context, tuning)):
        more = () if sinks is None else (sinks,)
        out = _call(plan, q.shape, interpret)(q, k_pages, v_pages, page_table, tiles, first_page[None], *more)
    return out.reshape(-1, q_heads, d)[:tokens]
