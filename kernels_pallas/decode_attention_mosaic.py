"""Decode attention for Hopper (sm_90a) with Mosaic GPU: wgmma tiles over pages that TMA streams in.

One program per SM, two warpgroups: one issues the copies, one computes, so copies run ahead across rows. A program
walks, with a stride, over work items (row, KV head, split): a contiguous range of the row's pages and the query heads
of one KV head.

GQA has too few query heads for wgmma's M of 64, so the 64 tokens of a page are M and the heads are N (8 or 16, padded):
S^T[tokens, heads] = K Q^T, then O^T[d, heads] = V^T P^T. The softmax runs down the columns, online, in float32. A step
takes one page or two: most of a step is latency (two wgmma, a maximum across warps), nearly the same for either.

There is one computing warpgroup because Mosaic's reductions across warps share one scratch buffer between warpgroups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
TILED_BF16 = (
    plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)


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

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.step_pages * PAGE_SIZE

    @property
    def items(self) -> int:
        return self.rows * self.kv_heads * self.splits

    def pages(self, length: jax.Array) -> jax.Array:
        """Pages of a row; a length beyond the page table ends with it."""
        return jnp.minimum(_ceil_div(length, PAGE_SIZE), self.row_pages)

    def split_pages(self, pages: Any) -> Any:
        """Pages of one split of a row that has `pages` of them."""
        return jnp.maximum(self.min_split_pages, _ceil_div(pages, self.splits))

    @property
    def tile(self) -> jax.ShapeDtypeStruct:
        """One item's result. Partial ones stay transposed, as wgmma gives them: float32 has no transposing store."""
        if self.splits == 1:
            return jax.ShapeDtypeStruct((self.heads, self.head_dim), jnp.bfloat16)
        return jax.ShapeDtypeStruct((self.head_dim, self.heads), jnp.float32)


def _ceil_div(x: jax.Array, by: int) -> jax.Array:
    return lax.div(x + jnp.int32(by - 1), jnp.int32(by))  # of non-negative numbers: floor_divide would test the signs


def _clear_tail(v: Any, left: jax.Array) -> None:
    """Zeroes the rows of v [64, d], in shared memory, from row `left` on."""
    row = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=plgpu.Layout.WGMMA)
    v[...] = jnp.where(row < left, plgpu.layout_cast(v[...], plgpu.Layout.WGMMA), jnp.bfloat16(0))


def _body(plan: Plan) -> Callable[..., None]:
    heads, d, tokens, stages = plan.heads, plan.head_dim, plan.tokens, plan.stages
    to_log2 = plan.scale * LOG2_E

    def body(
        q: Any,  # [rows * kv_heads, heads, d] bf16, global memory
        k_pages: Any,  # [pages * kv_heads, 64, d] bf16
        v_pages: Any,  # [pages * kv_heads, 64, d] bf16
        table: Any,  # [rows, M] int32
        lengths: Any,  # [rows] int32
        out: Any,  # [items, heads, d] bf16; with splits [items, d, heads] float32
        lse: Any,  # [items, heads] float32
        k_s: Any,  # [stages, tokens, d] bf16, shared memory
        v_s: Any,  # [stages, tokens, d] bf16
        q_s: Any,  # [Q_SLOTS, heads, d] bf16
        p_s: Any,  # [heads, tokens] bf16
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
        turns = lax.div(plan.items - program + (plan.programs - 1), jnp.int32(plan.programs))

        def item_of(turn: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
            """Item, its row, its row of q, its split."""
            item = program + turn * plan.programs
            q_row = lax.div(item, jnp.int32(plan.splits))
            return item, lax.div(q_row, jnp.int32(plan.kv_heads)), q_row, lax.rem(item, jnp.int32(plan.splits))

        def page_range(length: jax.Array, split: jax.Array) -> tuple[jax.Array, jax.Array]:
            """First page of the split and how many it has (0 beyond the length)."""
            pages = plan.pages(length)
            size = plan.split_pages(pages)
            first = split * size
            return first, jnp.clip(pages - first, 0, size)

        def load(turn: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            steps_done, items_done = carry
            row, q_row, split = item_of(turn)[1:]
            kv_head = lax.rem(q_row, jnp.int32(plan.kv_heads))
            first, count = page_range(lengths[row], split)

            @pl.when(count > 0)
            def _() -> None:
                slot = lax.rem(items_done, jnp.int32(Q_SLOTS))
                pl.when(items_done >= Q_SLOTS)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                plgpu.copy_gmem_to_smem(q.at[q_row], q_s.at[slot], q_full.at[slot])

            def step(i: jax.Array, _: None) -> None:
                number = steps_done + i
                slot = lax.rem(number, jnp.int32(stages))
                # A last step short of a page takes the one before again, out of L2: the softmax masks it.
                numbers = [jnp.minimum(i * plan.step_pages + j, count - 1) for j in range(plan.step_pages)]
                places = [table[row, first + n] * plan.kv_heads + kv_head for n in numbers]
                for pages, into, full, free in ((k_pages, k_s, k_full, k_free), (v_pages, v_s, v_full, v_free)):
                    pl.when(number >= stages)(partial(plgpu.barrier_wait, free.at[slot]))
                    for j, place in enumerate(places):
                        part = into.at[slot, pl.ds(j * PAGE_SIZE, PAGE_SIZE)]
                        plgpu.copy_gmem_to_smem(pages.at[place], part, full.at[slot])

            steps = _ceil_div(count, plan.step_pages)
            lax.fori_loop(0, steps, step, None)
            return steps_done + steps, items_done + (count > 0).astype(jnp.int32)

        def compute(turn: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            steps_done, items_done, length = carry
            item, split = item_of(turn)[::3]
            # The next item's length, asked for now: nothing waits for it until this item is done.
            next_length = lengths[item_of(jnp.minimum(turn + 1, turns - 1))[1]]
            first, count = page_range(length, split)
            visible = jnp.minimum(length - first * PAGE_SIZE, count * PAGE_SIZE)  # tokens of this split
            q_slot = lax.rem(items_done, jnp.int32(Q_SLOTS))
            pl.when(count > 0)(lambda: plgpu.barrier_wait(q_full.at[q_slot]))

            def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                # [d, heads], [heads], [tokens, heads]: the total's sum over tokens waits for the end
                acc, top, total = state
                slot = lax.rem(steps_done + i, jnp.int32(stages))
                left = visible - i * tokens
                plgpu.barrier_wait(k_full.at[slot])

                def scores(ref: Any) -> jax.Array:
                    plgpu.wgmma(ref, k_s.at[slot], q_s.at[q_slot].transpose((1, 0)))
                    return ref[...]

                s = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((tokens, heads), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                token = plgpu.broadcasted_iota(jnp.int32, (tokens, heads), 0, layout=plgpu.Layout.WGMMA)
                s = jnp.where(token < left, s * to_log2, -jnp.inf)
                new_top = jnp.maximum(top, s.max(axis=0))  # finite: a step has a token at least
                keep = jnp.exp2(top - new_top)
                p = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, (1,)))
                total = total * lax.broadcast_in_dim(keep, total.shape, (1,)) + p
                p_s.transpose((1, 0))[...] = p.astype(jnp.bfloat16)
                plgpu.barrier_wait(v_full.at[slot])

                for j in range(plan.step_pages):
                    # Slots past the length may hold anything, even NaN: a zero weight alone would not keep it out.
                    pl.when(left < (j + 1) * PAGE_SIZE)(
                        partial(_clear_tail, v_s.at[slot, pl.ds(j * PAGE_SIZE, PAGE_SIZE)], left - j * PAGE_SIZE)
                    )
                plgpu.commit_smem()

                def values(ref: Any) -> jax.Array:
                    plgpu.wgmma(ref, v_s.at[slot].transpose((1, 0)), p_s.transpose((1, 0)))
                    return ref[...]

                update = pl.run_scoped(values, plgpu.WGMMAAccumulatorRef((d, heads), jnp.float32))
                acc = acc * lax.broadcast_in_dim(keep, acc.shape, (1,)) + update
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new_top, total

            wgmma = plgpu.Layout.WGMMA
            start = (
                plgpu.layout_cast(jnp.zeros((d, heads), jnp.float32), wgmma),
                plgpu.layout_cast(jnp.full((heads,), -jnp.inf, jnp.float32), wgmma.reduce(0)),
                plgpu.layout_cast(jnp.zeros((tokens, heads), jnp.float32), wgmma),
            )
            steps = _ceil_div(count, plan.step_pages)
            acc, top, total = lax.fori_loop(0, steps, step, start)

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

            return steps_done + steps, items_done + (count > 0).astype(jnp.int32), next_length

        role = lax.axis_index("role")

        @pl.when(role == 0)
        def _() -> None:
            first_length = lengths[item_of(jnp.int32(0))[1]]
            lax.fori_loop(0, turns, compute, (jnp.int32(0), jnp.int32(0), first_length))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(role == 1)
        def _() -> None:
            steps_done, items_done = lax.fori_loop(0, turns, load, (jnp.int32(0), jnp.int32(0)))

            # The slots still in use: a program ends with every barrier observed.
            @pl.loop(jnp.maximum(steps_done - stages, 0), steps_done)
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

    heads, d, tokens, stages = plan.heads, plan.head_dim, plan.tokens, plan.stages
    return plgpu.kernel(
        _body(plan),
        out_type=(
            jax.ShapeDtypeStruct((plan.items, *plan.tile.shape), plan.tile.dtype),
            jax.ShapeDtypeStruct((plan.items, heads), jnp.float32),
        ),
        scratch_types=[
            tiles(stages, tokens, d),
            tiles(stages, tokens, d),
            tiles(Q_SLOTS, heads, d),
            tiles(heads, tokens),
            tiles(*plan.tile.shape) if plan.splits == 1 else plgpu.SMEM(plan.tile.shape, plan.tile.dtype),
            plgpu.SMEM((heads,), jnp.float32),
            *(plgpu.Barrier(num_barriers=stages, num_arrivals=plan.step_pages) for _ in range(2)),
            *(plgpu.Barrier(num_barriers=stages) for _ in range(2)),
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
    for name, x, dtype in (
        ("q", q, jnp.bfloat16),
        ("k_pages", k_pages, jnp.bfloat16),
        ("v_pages", v_pages, jnp.bfloat16),
        ("page_table", page_table, jnp.int32),
        ("lengths", lengths, jnp.int32),
    ):
        if x.dtype != dtype:
            raise ValueError(f"{name}: dtype {x.dtype}; backend 'mosaic' accepts {jnp.dtype(dtype).name}")
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
    """As `kernels_pallas.decode_attention`, which describes the arguments and has checked their shapes.

    sm_budget  SMs to use at most; the tuning's by default
    interpret  as `pallas_call`'s, for tests without a GPU
    """
    check_mosaic(q, k_pages, v_pages, page_table, lengths, sm_budget)
    rows, q_heads, d = q.shape
    kv_heads = k_pages.shape[1]
    repeats = q_heads // kv_heads
    heads = 8 if repeats <= 8 else 16
    sms = tuning.sms if sm_budget is None else min(sm_budget, tuning.sms)
    splits = choose_splits(rows * kv_heads, page_table.shape[1], sms, tuning)
    plan = Plan(
        rows=rows,
        kv_heads=kv_heads,
        row_pages=page_table.shape[1],
        heads=heads,
        head_dim=d,
        splits=splits,
        min_split_pages=tuning.min_split_pages,
        step_pages=tuning.step_pages,
        stages=tuning.stages(d),
        programs=min(sms, rows * kv_heads * splits),
        scale=scale,
    )
    q = q.reshape(rows * kv_heads, repeats, d)
    if heads != repeats:
        q = jnp.pad(q, ((0, 0), (0, heads - repeats), (0, 0)))
    # One index for page and head: with the tiling, a TMA descriptor has no dimension left for two.
    k_pages, v_pages = (x.reshape(-1, PAGE_SIZE, d) for x in (k_pages, v_pages))
    out, lse = _call(plan, interpret)(q, k_pages, v_pages, page_table, lengths)
    if splits > 1:
        shape = (rows, kv_heads, splits, heads)
        out, lse = _combine(plan, out.reshape(*shape[:3], d, heads), lse.reshape(shape), lengths)
    out, lse = out.reshape(rows, kv_heads, heads, d), lse.reshape(rows, kv_heads, heads)
    return out[:, :, :repeats].reshape(rows, q_heads, d), lse[:, :, :repeats].reshape(rows, q_heads)
