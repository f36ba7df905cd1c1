"""Decode attention for Hopper (sm_90a) with Mosaic GPU: wgmma tiles over pages that TMA streams in.

One program per SM, two warpgroups: one issues the copies, one computes, so copies run ahead across rows. A program
walks, with a stride, over work items (row, KV head, split): a contiguous range of the row's pages and the query heads
of one KV head.

GQA has too few query heads for wgmma's M of 64, so the 64 tokens of a page are M and the heads are N (8 or 16, padded):
S^T[tokens, heads] = K Q^T, then O^T[d, heads] = V^T P^T. The softmax runs down the columns, online, in float32. A step
takes one page or two: most of a step is latency (two wgmma, a maximum across warps), nearly the same for either.

There is one computing warpgroup because Mosaic's reductions across warps share one scratch buffer between warpgroups.

Pages of float8_e4m3fn: wgmma multiplies fp8 by fp8 alone, and transposes operands of 16 bits alone.
- K stays as it is, and a query is the sum of two fp8 terms (`decode_plan.two_terms`), as good as bfloat16. Both are
  columns of one product. Upcasting K in registers would cost more instructions, and the interpreter cannot run it.
- V is upcast by a third warpgroup, through registers into float16 tiles that wgmma reads transposed, which costs no
  accuracy. V transposed in the pages would spare the tiles, but every append would write single bytes a page apart.
- The weights are float16, and the scales are factors per query head that come with the queries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.decode_plan import (
    LOG2_E,
    MAX_REPEATS,
    PAGE_SIZE,
    UPCAST_SLOTS,
    Plan,
    ceil_div,
    check_mosaic,
    combine,
    expected_us,
    make_factors,
    make_plan,
    two_terms,
)
from kernels_pallas.expected import scheduled_as
from kernels_pallas.tuning import DecodeTuning

Q_SLOTS = 2
WGMMA = plgpu.Layout.WGMMA


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory as wgmma reads it: tiles of 8 rows by 128 bytes (64 where a row is no longer), swizzled."""
    size = jnp.dtype(dtype).itemsize
    width = min(128, shape[-1] * size)
    transforms = (
        plgpu.TilingTransform((8, width // size)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(width),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _clear_tail(v: Any, left: jax.Array) -> None:
    """Zeroes the rows of v [64, d], in shared memory, from row `left` on."""
    row = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=WGMMA)
    v[...] = jnp.where(row < left, plgpu.layout_cast(v[...], WGMMA), jnp.bfloat16(0))


def _upcast(from_s: Any, into_s: Any, left: Any) -> None:
    """fp8 [64, d] to float16; rows from `left` on, where it is given, become zeros."""
    x = plgpu.load(from_s, layout=plgpu.Layout.WGMMA_UPCAST_2X).astype(jnp.float16)
    x = plgpu.layout_cast(x, WGMMA)
    if left is not None:
        row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=WGMMA)
        x = jnp.where(row < left, x, jnp.float16(0))
    into_s[...] = x


def _body(plan: Plan) -> Callable[..., None]:
    heads, d, tokens, stages = plan.heads, plan.head_dim, plan.tokens, plan.stages
    to_log2 = plan.scale * LOG2_E

    def body(
        q: Any,  # [rows * kv_heads, heads, d] bf16, global memory; with fp8 pages [rows * kv_heads, 2 * heads, d] fp8
        k_pages: Any,  # [pages * kv_heads, 64, d] bf16 or fp8
        v_pages: Any,  # [pages * kv_heads, 64, d]
        table: Any,  # [rows, M] int32
        lengths: Any,  # [rows] int32
        first_page: Any,  # [1] int32, added to the table's entries
        *rest: Any,  # with fp8 pages factors [rows * kv_heads, 2, 16] float32, of the scores and of the values;
        #              out [items, heads, d] bf16, with splits [items, d, heads] float32; lse [items, heads] float32
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
        factors_s: Any = None,  # with fp8 pages: [Q_SLOTS, 2, 16] float32
        wide_s: Any = None,  # [UPCAST_SLOTS, tokens, d] f16, what v_s becomes
        wide_full: Any = None,  # barriers: [UPCAST_SLOTS]
        wide_free: Any = None,
    ) -> None:
        *factors, out, lse = rest
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
            base = first_page[0]

            @pl.when(count > 0)
            def _() -> None:
                slot = lax.rem(items_done, jnp.int32(Q_SLOTS))
                pl.when(items_done >= Q_SLOTS)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                plgpu.copy_gmem_to_smem(q.at[q_row], q_s.at[slot], q_full.at[slot])
                for factor in factors:
                    plgpu.copy_gmem_to_smem(factor.at[q_row], factors_s.at[slot], q_full.at[slot])

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

        def upcast(turn: jax.Array, steps_done: jax.Array) -> jax.Array:
            row, _, split = item_of(turn)[1:]
            first, count = page_range(lengths[row], split)
            visible = lengths[row] - first * PAGE_SIZE

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
            return steps_done + steps

        # What the computing warpgroup multiplies with the weights: V as it came, or upcast.
        values_s, values_full, values_free, values_slots = (
            (wide_s, wide_full, wide_free, UPCAST_SLOTS) if plan.fp8 else (v_s, v_full, v_free, stages)
        )

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
                    factor = plgpu.load(factors_s.at[q_slot, 0, pl.ds(0, heads)], layout=WGMMA.reduce(0))
                    s = (s[:, :heads] + s[:, heads:]) * lax.broadcast_in_dim(factor, (tokens, heads), (1,))
                else:
                    s = s * to_log2
                token = plgpu.broadcasted_iota(jnp.int32, (tokens, heads), 0, layout=WGMMA)
                s = jnp.where(token < left, s, -jnp.inf)
                new_top = jnp.maximum(top, s.max(axis=0))  # finite: a step has a token at least
                keep = jnp.exp2(top - new_top)
                p = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, (1,)))
                total = total * lax.broadcast_in_dim(keep, total.shape, (1,)) + p
                p_s.transpose((1, 0))[...] = p.astype(plan.dtype)
                plgpu.barrier_wait(values_full.at[v_slot])

                for j in range(0 if plan.fp8 else plan.step_pages):
                    # Slots past the length may hold anything, even NaN: a zero weight alone would not keep it out.
                    pl.when(left < (j + 1) * PAGE_SIZE)(
                        partial(_clear_tail, v_s.at[slot, pl.ds(j * PAGE_SIZE, PAGE_SIZE)], left - j * PAGE_SIZE)
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

            def finish(factor_s: Any) -> None:
                weight = total.sum(axis=0)
                some = jnp.where(weight == 0.0, 1.0, weight)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last item's result has left out_s and lse_s
                divisor = some if factor_s is None else some / plgpu.load(factor_s, layout=WGMMA.reduce(0))
                result = acc / lax.broadcast_in_dim(divisor, acc.shape, (1,))
                if plan.splits == 1:
                    out_s.transpose((1, 0))[...] = result.astype(jnp.bfloat16)
                else:
                    out_s[...] = result
                lse_s[...] = jnp.where(weight == 0.0, -jnp.inf, top * (1.0 / LOG2_E) + jnp.log(some))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s, out.at[item])
                plgpu.copy_smem_to_gmem(lse_s, lse.at[item])

            # With splits, the combine ignores the ones beyond a row's length; without, an empty row is answered here.
            if plan.fp8:
                pl.when(count > 0)(partial(finish, factors_s.at[q_slot, 1, pl.ds(0, heads)]))
                pl.when((count == 0) & (plan.splits == 1))(partial(finish, None))
            else:
                pl.when((count > 0) | (plan.splits == 1))(partial(finish, None))

            @pl.when(count > 0)
            def _() -> None:
                plgpu.barrier_arrive(q_free.at[q_slot])

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

        if plan.fp8:

            @pl.when(role == 2)
            def _() -> None:
                steps_done = lax.fori_loop(0, turns, upcast, jnp.int32(0))

                @pl.loop(jnp.maximum(steps_done - UPCAST_SLOTS, 0), steps_done)
                def _(number: jax.Array) -> None:
                    plgpu.barrier_wait(wide_free.at[lax.rem(number, jnp.int32(UPCAST_SLOTS))])

    return body


def _call(plan: Plan, dtype: Any, interpret: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`dtype`: of the pages."""
    heads, d, tokens, stages = plan.heads, plan.head_dim, plan.tokens, plan.stages
    tile = plan.tile
    scratch = {
        "k_s": _tiled((stages, tokens, d), dtype),
        "v_s": _tiled((stages, tokens, d), dtype),
        "q_s": _tiled((Q_SLOTS, plan.terms * heads, d), dtype),
        "p_s": _tiled((heads, tokens), plan.dtype),
        "out_s": _tiled(tile.shape, tile.dtype) if plan.splits == 1 else plgpu.SMEM(tile.shape, tile.dtype),
        "lse_s": plgpu.SMEM((heads,), jnp.float32),
        **{name: plgpu.Barrier(num_barriers=stages, num_arrivals=plan.step_pages) for name in ("k_full", "v_full")},
        **{name: plgpu.Barrier(num_barriers=stages) for name in ("k_free", "v_free")},
        "q_full": plgpu.Barrier(num_barriers=Q_SLOTS, num_arrivals=plan.terms),
        "q_free": plgpu.Barrier(num_barriers=Q_SLOTS),
    }
    if plan.fp8:
        scratch |= {
            "factors_s": plgpu.SMEM((Q_SLOTS, 2, MAX_REPEATS), jnp.float32),
            "wide_s": _tiled((UPCAST_SLOTS, tokens, d), plan.dtype),
            **{name: plgpu.Barrier(num_barriers=UPCAST_SLOTS) for name in ("wide_full", "wide_free")},
        }
    return plgpu.kernel(
        _body(plan),
        out_type=(
            jax.ShapeDtypeStruct((plan.items, *tile.shape), tile.dtype),
            jax.ShapeDtypeStruct((plan.items, heads), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=3 if plan.fp8 else 2,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="decode_attention",
    )


def decode_attention_mosaic(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    first_page: jax.Array,
    scale: float,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    tuning: DecodeTuning,
    sm_budget: int | None = None,
    expected_context: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels_pallas.decode_attention`, which describes the arguments and has checked their shapes.

    sm_budget         SMs to use at most; the tuning's by default
    expected_context  tokens of a row, for the time that the scheduler is told; the table's width by default
    interpret         as `pallas_call`'s, for tests without a GPU
    """
    check_mosaic(q, k_pages, v_pages, page_table, lengths, sm_budget)
    rows, q_heads, d = q.shape
    kv_heads = k_pages.shape[1]
    repeats = q_heads // kv_heads
    plan = make_plan(q, k_pages, page_table, scale, tuning, sm_budget)
    heads, splits = plan.heads, plan.splits
    q = q.reshape(rows * kv_heads, repeats, d)
    if heads != repeats:
        # Not `jnp.pad`, a function of its own: on a stream of its own, XLA finds no stream for a call within a call.
        q = lax.pad(q, jnp.zeros((), q.dtype), ((0, 0, 0), (0, heads - repeats, 0), (0, 0, 0)))
    factors = ()
    if k_scale is not None and v_scale is not None:
        terms, unit = two_terms(q)
        q = terms.reshape(-1, 2 * heads, d)
        factors = (make_factors(plan, unit, k_scale, v_scale),)
    # One index for page and head: with the tiling, a TMA descriptor has no dimension left for two.
    k_pages, v_pages = (x.reshape(-1, PAGE_SIZE, d) for x in (k_pages, v_pages))
    call = _call(plan, k_pages.dtype, interpret)
    context = plan.row_pages * PAGE_SIZE if expected_context is None else expected_context
    with scheduled_as(expected_us(plan, context, tuning)):
        out, lse = call(q, k_pages, v_pages, page_table, lengths, first_page[None], *factors)
    if splits > 1:
        shape = (rows, kv_heads, splits, heads)
        out, lse = combine(plan, out.reshape(*shape[:3], d, heads), lse.reshape(shape), lengths)
    out, lse = out.reshape(rows, kv_heads, heads, d), lse.reshape(rows, kv_heads, heads)
    return out[:, :, :repeats].reshape(rows, q_heads, d), lse[:, :, :repeats].reshape(rows, q_heads)
