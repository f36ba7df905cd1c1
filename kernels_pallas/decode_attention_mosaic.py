"""Decode attention for Hopper (sm_90a) with Mosaic GPU: wgmma tiles over pages that TMA streams in.

One program per SM, two warpgroups: one issues the copies, one computes, so copies run ahead across rows. A program walks, with
a stride, over work items (row, KV head, split): a contiguous range of the row's pages and the query heads of one KV head.

GQA has too few query heads for wgmma's M of 64, so the 64 tokens of a page are M and the heads are N (8 or 16, padded):
S^T[tokens, heads] = K Q^T, then O^T[d, heads] = V^T P^T. The softmax runs down the columns, online, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.tuning import DecodeTuning, choose_splits

PAGE_SIZE = 64  # tokens: wgmma's M
HEAD_DIMS = (64, 128)
MAX_REPEATS = 16  # query heads per KV head
LOG2_E = math.log2(math.e)
Q_SLOTS = 2

# K, V, Q and P as wgmma reads them from shared memory: tiles of 8 rows by 128 bytes, swizzled.
TILED_BF16 = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


@dataclass(frozen=True)
class Plan:
    """Everything static about one call; a function of shapes and tuning alone, so no row depends on its neighbours."""

    rows: int
    kv_heads: int
    heads: int  # query heads per KV head, padded to 8 or 16
    head_dim: int
    splits: int
    min_split_pages: int
    stages: int  # pages (K and V) in flight
    programs: int
    scale: float

    @property
    def items(self) -> int:
        return self.rows * self.kv_heads * self.splits

    def split_pages(self, pages: Any) -> Any:
        """Pages of one split of a row that has `pages` of them."""
        return jnp.maximum(self.min_split_pages, (pages + (self.splits - 1)) // self.splits)

    @property
    def tile(self) -> jax.ShapeDtypeStruct:
        """One item's result. Partial ones stay transposed, as wgmma gives them: float32 has no transposing store."""
        if self.splits == 1:
            return jax.ShapeDtypeStruct((self.heads, self.head_dim), jnp.bfloat16)
        return jax.ShapeDtypeStruct((self.head_dim, self.heads), jnp.float32)


def page_count(length: jax.Array) -> jax.Array:
    return (length + (PAGE_SIZE - 1)) // PAGE_SIZE


def _body(plan: Plan) -> Callable[..., None]:
    heads, d, stages = plan.heads, plan.head_dim, plan.stages
    to_log2 = plan.scale * LOG2_E

    def body(
        q: Any,  # [rows * kv_heads, heads, d] bf16, global memory
        k_pages: Any,  # [pages, kv_heads, 64, d] bf16
        v_pages: Any,  # [pages, kv_heads, 64, d] bf16
        table: Any,  # [rows, M] int32
        lengths: Any,  # [rows] int32
        out: Any,  # [items, heads, d] bf16; with splits [items, d, heads] float32
        lse: Any,  # [items, heads] float32
        k_s: Any,  # [stages, 64, d] bf16, shared memory
        v_s: Any,  # [stages, 64, d] bf16
        q_s: Any,  # [Q_SLOTS, heads, d] bf16
        p_s: Any,  # [heads, 64] bf16
        out_s: Any,  # one item of out
        lse_s: Any,  # [heads] float32
        k_full: Any,  # barriers: [stages]
        v_full: Any,
        k_free: Any,
        v_free: Any,
        q_full: Any,  # barriers: [Q_SLOTS]
        q_free: Any,
    ) -> None:
        program = lax.axis_index("program")
        steps = (plan.items - program + (plan.programs - 1)) // plan.programs

        def item_of(step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
            """Item, its row, its row of q, its split."""
            item = program + step * plan.programs
            q_row = item // plan.splits
            return item, q_row // plan.kv_heads, q_row, item % plan.splits

        def page_range(length: jax.Array, split: jax.Array) -> tuple[jax.Array, jax.Array]:
            """First page of the split and how many it has (0 beyond the length)."""
            pages = page_count(length)
            size = plan.split_pages(pages)
            first = split * size
            return first, jnp.clip(pages - first, 0, size)

        def load(step: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            pages_done, items_done = carry
            _, row, q_row, split = item_of(step)
            first, count = page_range(lengths[row], split)

            @pl.when(count > 0)
            def _() -> None:
                slot = lax.rem(items_done, jnp.int32(Q_SLOTS))
                pl.when(items_done >= Q_SLOTS)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                plgpu.copy_gmem_to_smem(q.at[q_row], q_s.at[slot], q_full.at[slot])

            def page(i: jax.Array, _: None) -> None:
                number = pages_done + i
                slot = lax.rem(number, jnp.int32(stages))
                place = (table[row, first + i], lax.rem(q_row, jnp.int32(plan.kv_heads)))
                pl.when(number >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                plgpu.copy_gmem_to_smem(k_pages.at[place], k_s.at[slot], k_full.at[slot])
                pl.when(number >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                plgpu.copy_gmem_to_smem(v_pages.at[place], v_s.at[slot], v_full.at[slot])

            lax.fori_loop(0, count, page, None)
            return pages_done + count, items_done + (count > 0).astype(jnp.int32)

        def compute(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            pages_done, items_done, length = carry
            item, _, _, split = item_of(step)
            # The next item's length, asked for now: nothing waits for it until this item is done.
            next_length = lengths[item_of(jnp.minimum(step + 1, steps - 1))[1]]
            first, count = page_range(length, split)
            q_slot = lax.rem(items_done, jnp.int32(Q_SLOTS))
            pl.when(count > 0)(lambda: plgpu.barrier_wait(q_full.at[q_slot]))

            def page(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                acc, top, total = (
                    state  # [d, heads], [heads], [64, heads]: the total's sum over tokens is taken at the end
                )
                slot = lax.rem(pages_done + i, jnp.int32(stages))
                left = length - (first + i) * PAGE_SIZE  # tokens of the context from this page on
                plgpu.barrier_wait(k_full.at[slot])

                def scores(ref: Any) -> jax.Array:
                    plgpu.wgmma(ref, k_s.at[slot], q_s.at[q_slot].transpose((1, 0)))
                    return ref[...]

                s = pl.run_scoped(scores, plgpu.ACC((PAGE_SIZE, heads), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                token = plgpu.broadcasted_iota(jnp.int32, (PAGE_SIZE, heads), 0, layout=plgpu.Layout.WGMMA)
                s = jnp.where(token < left, s * to_log2, -jnp.inf)
                new_top = jnp.maximum(top, s.max(axis=0))  # finite: a page of the range has a token
                keep = jnp.exp2(top - new_top)
                p = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, (1,)))
                total = total * lax.broadcast_in_dim(keep, total.shape, (1,)) + p
                p_s.transpose((1, 0))[...] = p.astype(jnp.bfloat16)
                plgpu.barrier_wait(v_full.at[slot])

                @pl.when(left < PAGE_SIZE)
                def _() -> None:
                    # Slots past the length may hold anything, even NaN: a zero weight alone would not keep it out.
                    v = v_s.at[slot]
                    row = plgpu.broadcasted_iota(jnp.int32, (PAGE_SIZE, d), 0, layout=plgpu.Layout.WGMMA)
                    v[...] = jnp.where(row < left, plgpu.layout_cast(v[...], plgpu.Layout.WGMMA), jnp.bfloat16(0))

                plgpu.commit_smem()

                def values(ref: Any) -> jax.Array:
                    plgpu.wgmma(ref, v_s.at[slot].transpose((1, 0)), p_s.transpose((1, 0)))
                    return ref[...]

                update = pl.run_scoped(values, plgpu.ACC((d, heads), jnp.float32))
                acc = acc * lax.broadcast_in_dim(keep, acc.shape, (1,)) + update
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new_top, total

            wgmma = plgpu.Layout.WGMMA
            start = (
                plgpu.layout_cast(jnp.zeros((d, heads), jnp.float32), wgmma),
                plgpu.layout_cast(jnp.full((heads,), -jnp.inf, jnp.float32), wgmma.reduce(0)),
                plgpu.layout_cast(jnp.zeros((PAGE_SIZE, heads), jnp.float32), wgmma),
            )
            acc, top, total = lax.fori_loop(0, count, page, start)

            @pl.when(count > 0)
            def _() -> None:
                plgpu.barrier_arrive(q_free.at[q_slot])

            # With splits, the combine ignores the ones beyond a row's length; without, an empty row is answered here.
            @pl.when((count > 0) | (plan.splits == 1))
            def _() -> None:
                weight = total.sum(axis=0)
                some = jnp.where(weight == 0.0, 1.0, weight)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last item's result has left out_s and lse_s
                result = acc / lax.broadcast_in_dim(some, acc.shape, (1,))
                if plan.splits == 1:
                    out_s.transpose((1, 0))[...] = result.astype(jnp.bfloat16)
                else:
                    out_s[...] = result
                lse_s[...] = jnp.where(weight == 0.0, -jnp.inf, top * (1.0 / LOG2_E) + jnp.log(some))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s, out.at[item])
                plgpu.copy_smem_to_gmem(lse_s, lse.at[item])

            return pages_done + count, items_done + (count > 0).astype(jnp.int32), next_length

        role = lax.axis_index("role")

        @pl.when(role == 0)
        def _() -> None:
            first_length = lengths[item_of(jnp.int32(0))[1]]
            lax.fori_loop(0, steps, compute, (jnp.int32(0), jnp.int32(0), first_length))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(role == 1)
        def _() -> None:
            pages_done, items_done = lax.fori_loop(0, steps, load, (jnp.int32(0), jnp.int32(0)))

            # The slots still in use: a program ends with every barrier observed.
            @pl.loop(jnp.maximum(pages_done - stages, 0), pages_done)
            def _(number: jax.Array) -> None:
                plgpu.barrier_wait(k_free.at[lax.rem(number, jnp.int32(stages))])
                plgpu.barrier_wait(v_free.at[lax.rem(number, jnp.int32(stages))])

            @pl.loop(jnp.maximum(items_done - Q_SLOTS, 0), items_done)
            def _(number: jax.Array) -> None:
                plgpu.barrier_wait(q_free.at[lax.rem(number, jnp.int32(Q_SLOTS))])

    return body


def _call(plan: Plan, interpret: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def tiles(*shape: int) -> Any:
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=TILED_BF16)

    heads, d, stages = plan.heads, plan.head_dim, plan.stages
    return plgpu.kernel(
        _body(plan),
        out_type=(
            jax.ShapeDtypeStruct((plan.items, *plan.tile.shape), plan.tile.dtype),
            jax.ShapeDtypeStruct((plan.items, heads), jnp.float32),
        ),
        scratch_types=[
            tiles(stages, PAGE_SIZE, d),
            tiles(stages, PAGE_SIZE, d),
            tiles(Q_SLOTS, heads, d),
            tiles(heads, PAGE_SIZE),
            tiles(*plan.tile.shape) if plan.splits == 1 else plgpu.SMEM(plan.tile.shape, plan.tile.dtype),
            plgpu.SMEM((heads,), jnp.float32),
            *(plgpu.Barrier(num_barriers=stages) for _ in range(4)),
            *(plgpu.Barrier(num_barriers=Q_SLOTS) for _ in range(2)),
        ],
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=2,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="decode_attention",
    )


def _combine(plan: Plan, out: jax.Array, lse: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Joins the splits, out [rows, kv_heads, splits, d, heads] and lse [rows, kv_heads, splits, heads] float32."""
    pages = page_count(lengths)
    used = (pages + plan.split_pages(pages) - 1) // plan.split_pages(pages)
    alive = (jnp.arange(plan.splits, dtype=jnp.int32)[None, :] < used[:, None])[:, None, :, None]
    # What the splits beyond the length hold was never written.
    lse = jnp.where(alive, lse, -jnp.inf)
    top = lse.max(axis=2, keepdims=True)
    weight = jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top))
    total = weight.sum(axis=2, keepdims=True)
    some = jnp.where(total == 0.0, 1.0, total)
    joined = (jnp.where(alive[..., None], out, 0.0) * (weight / some)[..., None, :]).sum(axis=2)
    return joined.astype(jnp.bfloat16).transpose(0, 1, 3, 2), (top + jnp.log(total))[:, :, 0]


def decode_attention_mosaic(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    tuning: DecodeTuning,
    sm_budget: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels_pallas.decode_attention`, whose wrapper has checked the arguments. `sm_budget`: SMs to use, at most."""
    rows, q_heads, d = q.shape
    kv_heads = k_pages.shape[1]
    repeats = q_heads // kv_heads
    heads = 8 if repeats <= 8 else 16
    sms = tuning.sms if sm_budget is None else min(sm_budget, tuning.sms)
    splits = choose_splits(rows * kv_heads, page_table.shape[1], sms, tuning)
    plan = Plan(
        rows=rows,
        kv_heads=kv_heads,
        heads=heads,
        head_dim=d,
        splits=splits,
        min_split_pages=tuning.min_split_pages,
        stages=tuning.stages(d),
        programs=min(sms, rows * kv_heads * splits),
        scale=scale,
    )
    q = q.reshape(rows * kv_heads, repeats, d)
    if heads != repeats:
        q = jnp.pad(q, ((0, 0), (0, heads - repeats), (0, 0)))
    out, lse = _call(plan, interpret)(q, k_pages, v_pages, page_table, lengths)
    if splits > 1:
        shape = (rows, kv_heads, splits, heads)
        out, lse = _combine(plan, out.reshape(*shape[:3], d, heads), lse.reshape(shape), lengths)
    out, lse = out.reshape(rows, kv_heads, heads, d), lse.reshape(rows, kv_heads, heads)
    return out[:, :, :repeats].reshape(rows, q_heads, d), lse[:, :, :repeats].reshape(rows, q_heads)
