"""Joins the splits of decode attention: one small Mosaic kernel, where XLA would launch three to five.

A program of one warpgroup has COMBINE_DIM elements of an item's heads, in the layout that wgmma gave the partial
results: it reads AT_ONCE of them straight from global memory, where they are still in the L2 cache, weighs them as the
online softmax does, and goes on to the next. Programs are many and short: they have no budget of SMs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.decode_plan import Plan, ceil_div
from kernels_pallas.expected import scheduled_as
from kernels_pallas.mosaic_parts import WGMMA, copy_rows, store_heads
from kernels_pallas.tuning import COMBINE_DIM, DecodeTuning, combine_us

AT_ONCE = 8  # splits whose loads are issued together, so that one waits for all


def _body(plan: Plan, interpreted: bool) -> Callable[..., None]:
    """`interpreted`: in a form that Pallas' interpreter can run."""
    shape = (COMBINE_DIM, plan.heads)
    at_once = min(AT_ONCE, plan.splits)

    def per_head(x: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(x, shape, (1,))

    def body(
        parts: Any,  # [items, d, heads] float32, global memory
        part_lse: Any,  # [items, heads] float32
        lengths: Any,  # [rows] int32
        out: Any,  # [rows * kv_heads * repeats, d] bf16
        lse: Any,  # [rows * kv_heads, heads] float32
        out_s: Any,  # [heads, COMBINE_DIM] bf16, shared memory
        lse_s: Any,  # [heads] float32
    ) -> None:
        q_row, part = lax.axis_index("q_row"), lax.axis_index("part")
        column = part * COMBINE_DIM
        pages = plan.pages(lengths[lax.div(q_row, jnp.int32(plan.kv_heads))])
        size = plan.split_pages(pages)
        used = lax.div(pages + size - 1, size)  # what the splits beyond the length hold was never written

        def some(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            acc, top, total = state
            numbers = [i * at_once + j for j in range(at_once)]
            places = [q_row * plan.splits + jnp.minimum(n, used - 1) for n in numbers]
            sums = [plgpu.load(part_lse.at[p], layout=WGMMA.reduce(0), optimized=False) for p in places]
            values = [
                plgpu.load(parts.at[p, pl.ds(column, COMBINE_DIM)], layout=WGMMA, optimized=False) for p in places
            ]
            sums = [x + jnp.where(n < used, 0.0, -jnp.inf) for n, x in zip(numbers, sums, strict=True)]
            new_top = reduce(jnp.maximum, sums, top)  # finite: a split that is used has a token at least
            keep = jnp.exp(top - new_top)
            acc, total = acc * per_head(keep), total * keep
            for x, value in zip(sums, values, strict=True):
                weight = jnp.exp(x - new_top)
                acc, total = acc + value * per_head(weight), total + weight
            return acc, new_top, total

        start = (
            plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA),
            plgpu.layout_cast(jnp.full((plan.heads,), -jnp.inf, jnp.float32), WGMMA.reduce(0)),
            plgpu.layout_cast(jnp.zeros((plan.heads,), jnp.float32), WGMMA.reduce(0)),
        )
        acc, top, total = lax.fori_loop(0, ceil_div(used, at_once), some, start)
        safe = jnp.where(total == 0.0, 1.0, total)  # of an empty row
        store_heads(out_s, acc / per_head(safe))
        lse_s[...] = top + jnp.log(safe)
        plgpu.commit_smem()
        mine = out.at[:, pl.ds(column, COMBINE_DIM)]
        copy_rows(out_s, plan.offset(q_row), mine, q_row * plan.repeats, plan.repeats, interpreted)
        pl.when(part == 0)(lambda: plgpu.copy_smem_to_gmem(lse_s, lse.at[q_row]))
        plgpu.wait_smem_to_gmem(0)

    return body


def combine(
    plan: Plan,
    parts: jax.Array,
    part_lse: jax.Array,
    lengths: jax.Array,
    *,
    tuning: DecodeTuning,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Joins the splits of every row; those beyond its length may hold anything.

    parts     [rows * kv_heads * splits, d, heads] float32, part_lse [rows * kv_heads * splits, heads] float32
    lengths   [rows] int32

    Returns out [rows * kv_heads * repeats, d] bf16 and the log-sum-exp [rows * kv_heads, heads] float32.
    """
    q_rows, d = plan.rows * plan.kv_heads, plan.head_dim
    kernel = plgpu.kernel(
        _body(plan, interpret is not None),
        out_type=(
            jax.ShapeDtypeStruct((q_rows * plan.repeats, d), jnp.bfloat16),
            jax.ShapeDtypeStruct((q_rows, plan.heads), jnp.float32),
        ),
        scratch_types=[plgpu.SMEM((plan.heads, COMBINE_DIM), jnp.bfloat16), plgpu.SMEM((plan.heads,), jnp.float32)],
        grid=(q_rows, d // COMBINE_DIM),
        grid_names=("q_row", "part"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="decode_combine",
    )
    us = None if tuning.expected is None else combine_us(plan.splits, plan.work, tuning)
    with scheduled_as(us):
        return kernel(parts, part_lse, lengths)
