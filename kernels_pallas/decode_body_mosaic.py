"""The program of the Hopper decode attention kernel, one per SM: a warpgroup copies, one computes, and with fp8 pages a
third makes the terms of queries and upcasts V."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.checks import PAGE_SIZE
from kernels_pallas.decode_plan import Q_SLOTS, UPCAST_SLOTS, Plan, ceil_div, two_terms
from kernels_pallas.mosaic_parts import LOG2_E, WGMMA, clear_tail, copy_rows, drain, store_heads


def _row_per_warp(width: int) -> Any:
    """Layout of [4 n, width]: a row belongs to one warp, so that its maximum needs no other."""
    tiling = Tiling(((4, width), (width // 32,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _upcast(from_s: Any, into_s: Any, left: Any) -> None:
    """fp8 [64, d] to float16; rows from `left` on, where it is given, become zeros."""
    x = plgpu.load(from_s, layout=plgpu.Layout.WGMMA_UPCAST_2X).astype(jnp.float16)
    x = plgpu.layout_cast(x, WGMMA)
    if left is not None:
        row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=WGMMA)
        x = jnp.where(row < left, x, jnp.float16(0))
    into_s[...] = x


def decode_body(plan: Plan, interpreted: bool) -> Callable[..., None]:
    """`interpreted`: in a form that Pallas' interpreter can run."""
    heads, d, tokens, stages = plan.heads, plan.head_dim, plan.tokens, plan.stages
    to_log2 = plan.scale * LOG2_E

    def body(
        q: Any,  # [blocks, heads, d] bf16, global memory
        k_pages: Any,  # [pages * kv_heads, 64, d] bf16 or fp8
        v_pages: Any,  # [pages * kv_heads, 64, d]
        table: Any,  # [rows, M] int32
        lengths: Any,  # [rows] int32
        first_page: Any,  # [1] int32, added to the table's entries
        *rest: Any,  # with fp8 pages scales [2, kv_heads] float32, of K and V;
        #              out [rows * kv_heads * repeats, d] bf16, with splits [items, d, heads] float32;
        #              lse [items, heads] float32
        k_s: Any,  # [stages, tokens, d], shared memory
        v_s: Any,  # [stages, tokens, d]
        q_s: Any,  # [Q_SLOTS, terms * heads, d]
        p_s: Any,  # [heads, tokens] bf16 or f16
        out_s: Any,  # one item of out
        lse_s: Any,  # [heads] float32
        k_full: Any,  # barriers: [stages]
        v_full: Any,
        k_free: Any,
        v_free: Any,
        q_full: Any,  # barriers: [Q_SLOTS]
        q_free: Any,
        raw_s: Any = None,  # with fp8 pages: [Q_SLOTS, heads, d] bf16, what becomes q_s
        unit_s: Any = None,  # [Q_SLOTS, heads] float32, what the terms of the queries are multiples of
        terms_full: Any = None,  # barriers: [Q_SLOTS]
        terms_free: Any = None,
        wide_s: Any = None,  # [UPCAST_SLOTS, tokens, d] f16, what v_s becomes
        wide_full: Any = None,  # barriers: [UPCAST_SLOTS]
        wide_free: Any = None,
    ) -> None:
        *scales, out, lse = rest
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
            begin = split * size
            count = jnp.clip(pages - begin, 0, size)
            return begin if plan.window is None else begin + plan.first_page(length), count

        def load(turn: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            steps_done, items_done = carry
            row, q_row, split = item_of(turn)[1:]
            kv_head = lax.rem(q_row, jnp.int32(plan.kv_heads))
            first, count = page_range(lengths[row], split)
            base = first_page[0]

            @pl.when(count > 0)
            def _() -> None:
                slot = lax.rem(items_done, jnp.int32(Q_SLOTS))
                pl.when(items_done >= Q_SLOTS)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                into = raw_s if plan.fp8 else q_s
                plgpu.copy_gmem_to_smem(q.at[plan.block(q_row)], into.at[slot], q_full.at[slot])

            def step(i: jax.Array, _: None) -> None:
                number = steps_done + i
                slot = lax.rem(number, jnp.int32(stages))
                # A last step short of a page takes the one before again, out of L2: the softmax masks it.
                numbers = [jnp.minimum(i * plan.step_pages + j, count - 1) for j in range(plan.step_pages)]
                places = [(table[row, first + n] + base) * plan.kv_heads + kv_head for n in numbers]
                for pages, into, full, free in ((k_pages, k_s, k_full, k_free), (v_pages, v_s, v_full, v_free)):
                    pl.when(number >= stages)(partial(plgpu.barrier_wait, free.at[slot]))
                    for j, place in enumerate(places):
                        part = into.at[slot, pl.ds(j * PAGE_SIZE, PAGE_SIZE)]
                        plgpu.copy_gmem_to_smem(pages.at[place], part, full.at[slot])

            steps = ceil_div(count, plan.step_pages)
            lax.fori_loop(0, steps, step, None)
            return steps_done + steps, items_done + (count > 0).astype(jnp.int32)

        def make_terms(slot: jax.Array) -> None:
            raw = plgpu.load(raw_s.at[slot], layout=_row_per_warp(d), optimized=False)
            *terms, unit = two_terms(raw)
            for i, term in enumerate(terms):
                q_s.at[slot, pl.ds(i * heads, heads)][...] = term
            unit_s[slot, :] = unit

        def upcast(turn: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            steps_done, items_done = carry
            row, split = item_of(turn)[1::2]
            first, count = page_range(lengths[row], split)
            visible = lengths[row] - first * PAGE_SIZE

            @pl.when(count > 0)
            def _() -> None:
                slot = lax.rem(items_done, jnp.int32(Q_SLOTS))
                plgpu.barrier_wait(q_full.at[slot])
                pl.when(items_done >= Q_SLOTS)(lambda: plgpu.barrier_wait(terms_free.at[slot]))
                make_terms(slot)
                plgpu.commit_smem()
                plgpu.barrier_arrive(q_free.at[slot])
                plgpu.barrier_arrive(terms_full.at[slot])

            def step(i: jax.Array, _: None) -> None:
                number = steps_done + i
                slot, wide = lax.rem(number, jnp.int32(stages)), lax.rem(number, jnp.int32(UPCAST_SLOTS))
                plgpu.barrier_wait(v_full.at[slot])
                pl.when(number >= UPCAST_SLOTS)(partial(plgpu.barrier_wait, wide_free.at[wide]))
                for j in range(plan.step_pages):
                    part = pl.ds(j * PAGE_SIZE, PAGE_SIZE)
                    convert = partial(_upcast, v_s.at[slot, part], wide_s.at[wide, part])
                    left = visible - i * tokens - j * PAGE_SIZE
                    # Slots past the length may hold anything, even NaN: a zero weight alone would not keep it out.
                    pl.when(left >= PAGE_SIZE)(partial(convert, None))
                    pl.when(left < PAGE_SIZE)(partial(convert, left))
                plgpu.commit_smem()
                plgpu.barrier_arrive(v_free.at[slot])
                plgpu.barrier_arrive(wide_full.at[wide])

            steps = ceil_div(count, plan.step_pages)
            lax.fori_loop(0, steps, step, None)
            return steps_done + steps, items_done + (count > 0).astype(jnp.int32)

        # What the computing warpgroup multiplies: queries as they came, or terms; V as it came, or upcast.
        queries_full, queries_free = (terms_full, terms_free) if plan.fp8 else (q_full, q_free)
        values_s, values_full, values_free, values_slots = (
            (wide_s, wide_full, wide_free, UPCAST_SLOTS) if plan.fp8 else (v_s, v_full, v_free, stages)
        )

        def ask(turn: jax.Array) -> tuple[jax.Array, ...]:
            """An item's length and, of fp8, its scales of K and V."""
            row, q_row = item_of(turn)[1:3]
            kv_head = lax.rem(q_row, jnp.int32(plan.kv_heads))
            return lengths[row], *(scale[i, kv_head] for scale in scales for i in range(2))

        def compute(turn: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            steps_done, items_done, (length, *scale) = carry
            item, split = item_of(turn)[::3]
            # The next item's, asked for now: nothing waits for them until this item is done.
            asked = ask(jnp.minimum(turn + 1, turns - 1))
            first, count = page_range(length, split)
            visible = jnp.minimum(length - first * PAGE_SIZE, count * PAGE_SIZE)  # tokens of this split
            # A token of the split.
            lowest = None if plan.window is None else plan.first_token(length) - first * PAGE_SIZE
            q_slot = lax.rem(items_done, jnp.int32(Q_SLOTS))
            pl.when(count > 0)(lambda: plgpu.barrier_wait(queries_full.at[q_slot]))

            def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                # [d, heads], [heads], [tokens, heads]: the total's sum over tokens waits for the end
                acc, top, total = state
                number = steps_done + i
                slot, v_slot = lax.rem(number, jnp.int32(stages)), lax.rem(number, jnp.int32(values_slots))
                left = visible - i * tokens
                plgpu.barrier_wait(k_full.at[slot])

                def scores(ref: Any) -> jax.Array:
                    plgpu.wgmma(ref, k_s.at[slot], q_s.at[q_slot].transpose((1, 0)))
                    return ref[...]

                s = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((tokens, plan.terms * heads), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                if plan.fp8:
                    factor = plgpu.load(unit_s.at[q_slot], layout=WGMMA.reduce(0)) * (scale[0] * to_log2)
                    s = (s[:, :heads] + s[:, heads:]) * lax.broadcast_in_dim(factor, (tokens, heads), (1,))
                else:
                    s = s * to_log2
                token = plgpu.broadcasted_iota(jnp.int32, (tokens, heads), 0, layout=WGMMA)
                seen = token < left
                if lowest is not None:
                    seen &= token >= lowest - i * tokens
                s = jnp.where(seen, s, -jnp.inf)
                new_top = jnp.maximum(top, s.max(axis=0))  # finite: a step has a token at least
                keep = jnp.exp2(top - new_top)
                p = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, (1,)))
                total = total * lax.broadcast_in_dim(keep, total.shape, (1,)) + p
                p_s.transpose((1, 0))[...] = p.astype(plan.dtype)
                plgpu.barrier_wait(values_full.at[v_slot])

                for j in range(0 if plan.fp8 else plan.step_pages):
                    # Slots past the length may hold anything, even NaN: a zero weight alone would not keep it out.
                    pl.when(left < (j + 1) * PAGE_SIZE)(
                        partial(clear_tail, v_s.at[slot, pl.ds(j * PAGE_SIZE, PAGE_SIZE)], left - j * PAGE_SIZE)
                    )
                plgpu.commit_smem()

                def values(ref: Any) -> jax.Array:
                    plgpu.wgmma(ref, values_s.at[v_slot].transpose((1, 0)), p_s.transpose((1, 0)))
                    return ref[...]

                update = pl.run_scoped(values, plgpu.WGMMAAccumulatorRef((d, heads), jnp.float32))
                acc = acc * lax.broadcast_in_dim(keep, acc.shape, (1,)) + update
                plgpu.barrier_arrive(values_free.at[v_slot])
                return acc, new_top, total

            start = (
                plgpu.layout_cast(jnp.zeros((d, heads), jnp.float32), WGMMA),
                plgpu.layout_cast(jnp.full((heads,), -jnp.inf, jnp.float32), WGMMA.reduce(0)),
                plgpu.layout_cast(jnp.zeros((tokens, heads), jnp.float32), WGMMA),
            )
            steps = ceil_div(count, plan.step_pages)
            acc, top, total = lax.fori_loop(0, steps, step, start)

            # With splits, the combine ignores the ones beyond a row's length; without, an empty row is answered here.
            @pl.when((count > 0) | (plan.splits == 1))
            def _() -> None:
                weight = total.sum(axis=0)
                some = jnp.where(weight == 0.0, 1.0, weight)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last item's result has left out_s and lse_s
                result = acc / lax.broadcast_in_dim(some / scale[1] if plan.fp8 else some, acc.shape, (1,))
                if plan.splits > 1:
                    out_s[...] = result
                elif plan.whole:
                    out_s.transpose((1, 0))[...] = result.astype(jnp.bfloat16)
                else:
                    store_heads(out_s, result)
                lse_s[...] = jnp.where(weight == 0.0, -jnp.inf, top * (1.0 / LOG2_E) + jnp.log(some))
                plgpu.commit_smem()
                if plan.splits > 1:
                    plgpu.copy_smem_to_gmem(out_s, out.at[item])
                elif plan.whole:
                    plgpu.copy_smem_to_gmem(out_s, out.at[pl.ds(item * heads, heads)])
                else:
                    copy_rows(out_s, plan.offset(item), out, item * plan.repeats, plan.repeats, interpreted)
                plgpu.copy_smem_to_gmem(lse_s, lse.at[item])

            @pl.when(count > 0)
            def _() -> None:
                plgpu.barrier_arrive(queries_free.at[q_slot])

            return steps_done + steps, items_done + (count > 0).astype(jnp.int32), asked

        role = lax.axis_index("role")

        @pl.when(role == 0)
        def _() -> None:
            lax.fori_loop(0, turns, compute, (jnp.int32(0), jnp.int32(0), ask(jnp.int32(0))))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(role == 1)
        def _() -> None:
            steps_done, items_done = lax.fori_loop(0, turns, load, (jnp.int32(0), jnp.int32(0)))
            drain(steps_done, stages, k_free, v_free)
            drain(items_done, Q_SLOTS, q_free)

        if plan.fp8:

            @pl.when(role == 2)
            def _() -> None:
                steps_done, items_done = lax.fori_loop(0, turns, upcast, (jnp.int32(0), jnp.int32(0)))
                drain(steps_done, UPCAST_SLOTS, wide_free)
                drain(items_done, Q_SLOTS, terms_free)

    return body
