"""The program of the Hopper prefill attention kernel, one per SM: two warpgroups compute, one copies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.checks import PAGE_SIZE
from kernels_pallas.mosaic_parts import LOG2_E, WGMMA, clear_tail, drain, plain_row
from kernels_pallas.prefill_tiles import (
    BEGIN,
    END,
    FIRST,
    GROUPS,
    KEYS,
    LENGTH,
    PAGE,
    ROWS,
    SEGMENT,
    SHIFT,
    STEP,
    UNIT,
    UNITS,
    Plan,
)

Q_SLOTS = 2
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40  # per thread; 2 x 232 + 40 is what three warpgroups have


def _div(x: jax.Array, by: int) -> jax.Array:
    return lax.div(x, jnp.int32(by))  # of non-negative numbers: floor_divide would test the signs


def _rem(x: jax.Array, by: int) -> jax.Array:
    return lax.rem(x, jnp.int32(by))


def _per_row(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, (0,))


def prefill_body(plan: Plan, interpreted: bool) -> Callable[..., None]:
    """The body that `plgpu.kernel` runs; `interpreted`: in a form that Pallas' interpreter can run."""
    d, stages = plan.head_dim, plan.stages
    to_log2 = plan.scale * LOG2_E
    scores, values = (ROWS, STEP), (ROWS, d)

    def unit(ref: Any, token: jax.Array, head: jax.Array) -> Any:
        """[8, d] of q or out: the heads from `head` on of a token, or the tokens from `token` on of a head."""
        if plan.packed:
            return ref.at[token, _div(head, UNIT)]
        return ref.at[_div(token, UNIT), :, head]

    def body(
        q: Any,  # [tokens, heads / 8, 8, d] bf16, or [tokens / 8, 8, heads, d], global memory
        k_pages: Any,  # [pages * kv_heads, 64, d] bf16
        v_pages: Any,  # [pages * kv_heads, 64, d] bf16
        table: Any,  # [segments, M] int32
        tiles: Any,  # [tiles, plan.columns] int32
        first_page: Any,  # [1] int32, added to the table's entries
        sinks: Any,  # [heads] float32, or None
        out: Any,  # as q
        k_s: Any,  # [stages, STEP, d] bf16, shared memory
        v_s: Any,  # [stages, STEP, d] bf16
        q_s: Any,  # [Q_SLOTS, GROUPS, ROWS, d] bf16
        p_s: Any,  # [GROUPS, ROWS, STEP] bf16, for the interpreter alone
        results: Any,  # [GROUPS] pairs that share memory: [ROWS, d] bf16, tiled and plain
        k_full: Any,  # barriers: [stages]
        v_full: Any,
        k_free: Any,
        v_free: Any,
        q_full: Any,  # barriers: [Q_SLOTS]
        q_free: Any,
        cleared: Any,  # barriers: [stages]
        turn: Any,  # barriers: [GROUPS]
    ) -> None:
        program, role = lax.axis_index("program"), lax.axis_index("role")
        turns = -(-plan.items // plan.programs)

        def item_of(turn: jax.Array) -> tuple[list[jax.Array], jax.Array, jax.Array]:
            """Columns of the tile, first head, steps: 0 of them past the last item."""
            place = jnp.where(_rem(turn, 2) == 0, program, plan.programs - 1 - program)
            item = turn * plan.programs + place
            tile = _div(jnp.minimum(item, plan.items - 1), plan.head_groups)
            columns = [tiles[tile, c] for c in range(plan.columns)]
            inside = item < plan.items
            columns[END] = jnp.where(inside, columns[END], columns[BEGIN])
            steps = jnp.where(inside, _div(columns[KEYS] + (STEP - 1), STEP), 0)
            return columns, _rem(item, plan.head_groups) * plan.group_heads, steps

        def share(group: Any, first: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
            """First token and first head of a computing warpgroup."""
            if plan.group_heads == 2:
                return first, head + group
            return first + group * plan.group_tokens, head

        def load(turn: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            steps_done, items_done = carry
            columns, head, steps = item_of(turn)
            segment, count = columns[SEGMENT], _div(columns[KEYS] + (PAGE_SIZE - 1), PAGE_SIZE)
            kv_head, base = _div(head, plan.repeats), first_page[0]

            def in_table(page: jax.Array) -> jax.Array:
                """Where a page of the tile's steps is in its segment's table. Instead of one below the window, which
                may hold anything, the one after it: the softmax masks it."""
                if plan.window is None:
                    return page
                return jnp.maximum((columns[PAGE] & ~1) + page, columns[PAGE])

            @pl.when(steps > 0)
            def _() -> None:
                slot = _rem(items_done, Q_SLOTS)
                pl.when(items_done >= Q_SLOTS)(lambda: plgpu.barrier_wait(q_free.at[slot]))

                # A loop: unrolled, it would not fit the registers of this warpgroup.
                @pl.loop(0, UNITS)
                def _(u: jax.Array) -> None:
                    for group in range(GROUPS):
                        token, group_head = share(group, columns[FIRST], head)
                        # Past the last token, the last ones again: nobody reads the answer.
                        at = jnp.minimum(token + u * (plan.group_tokens // UNITS), plan.tokens - plan.align)
                        into = q_s.at[slot, group, pl.ds(u * UNIT, UNIT)]
                        plgpu.copy_gmem_to_smem(unit(q, at, group_head), into, q_full.at[slot])

            def step(i: jax.Array, _: None) -> None:
                number = steps_done + i
                slot, first = _rem(number, stages), 2 * (steps - 1 - i)
                # A step short of a page takes the one before again, out of L2: the softmax masks it.
                numbers = [table[segment, in_table(jnp.minimum(first + j, count - 1))] + base for j in range(2)]
                places = [number * plan.kv_heads + kv_head for number in numbers]
                for pages, into, full, free in ((k_pages, k_s, k_full, k_free), (v_pages, v_s, v_full, v_free)):
                    pl.when(number >= stages)(partial(plgpu.barrier_wait, free.at[slot]))
                    for j, place in enumerate(places):
                        part = into.at[slot, pl.ds(j * PAGE_SIZE, PAGE_SIZE)]
                        plgpu.copy_gmem_to_smem(pages.at[place], part, full.at[slot])

            lax.fori_loop(0, steps, step, None)
            return steps_done + steps, items_done + (steps > 0).astype(jnp.int32)

        def take_turn(issue: Callable[[], None]) -> None:
            """Issues the tensor cores' work in turn with the other warpgroup."""
            if plan.ping_pong:
                plgpu.barrier_wait(turn.at[role])
            issue()
            if plan.ping_pong:
                plgpu.barrier_arrive(turn.at[1 - role])

        # The interpreter has neither accumulators that start with a value nor products of registers: there, P goes
        # through shared memory, and the sum is made after the product.

        def start_values(ref: Any, acc: jax.Array, p: jax.Array, v: Any) -> None:
            if interpreted:
                p_s.at[role][...] = p
                plgpu.commit_smem()
                plgpu.wgmma(ref, p_s.at[role], v)
            else:
                ref[...] = acc
                plgpu.wgmma(ref, p, v)

        def finish_values(ref: Any, acc: jax.Array) -> jax.Array:
            product = lax.optimization_barrier(ref[...])
            return acc + product if interpreted else product

        def softmax(s: jax.Array, top: jax.Array, mask: Callable[[jax.Array], jax.Array] | None) -> tuple[Any, ...]:
            """Weights of a step's scores, the new maximum (of scores in units of log 2), what becomes of the old."""
            if mask is None:
                new_top = safe_top = jnp.maximum(top, s.max(axis=1) * to_log2)
            else:
                s = mask(s)
                new_top = jnp.maximum(top, s.max(axis=1) * to_log2)
                safe_top = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # a row that sees nothing of this step
            p = jnp.exp2(s * to_log2 - _per_row(safe_top, scores))
            return p, new_top, jnp.exp2(top - safe_top)

        def sinks_of(head: jax.Array) -> jax.Array:
            """Of each row [ROWS], in units of log 2: its head's."""
            shape, layout = (ROWS,), WGMMA.reduce(1)
            found = plgpu.layout_cast(lax.broadcast(sinks[head], shape), layout)
            if plan.packed:
                row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
                for other in range(1, UNIT):
                    found = jnp.where(_rem(row, UNIT) == other, sinks[head + other], found)
            return found * LOG2_E

        def attend(
            columns: list[jax.Array],
            token: jax.Array,
            head: jax.Array,
            steps: jax.Array,
            steps_done: jax.Array,
            q_slot: jax.Array,
        ) -> jax.Array:
            """[ROWS, d] float32 of one warpgroup; rows that see nothing give 0."""
            queries = q_s.at[q_slot, role]

            def mask_of(step: jax.Array) -> Callable[[jax.Array], jax.Array]:
                row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=WGMMA.reduce(1))
                position = _div(row, ROWS // plan.group_tokens) + (token + columns[SHIFT])
                last = _per_row(position - (steps - 1 - step) * STEP, scores)
                # Bits 1 and 2 of a column's number are the thread's, the others the register's. Told apart, columns are
                # compared as constants; whole numbers would stay in 32 registers through everything.
                key = plgpu.broadcasted_iota(jnp.int32, scores, 1, layout=WGMMA)

                def mask(s: jax.Array) -> jax.Array:
                    seen = (key & ~6) <= last - (key & 6)
                    if plan.window is not None:
                        seen &= (key & ~6) > last - plan.window - (key & 6)
                    return jnp.where(seen, s, -jnp.inf)

                return mask

            def first_scores(ref: Any) -> jax.Array:
                take_turn(lambda: plgpu.wgmma(ref, queries, k_s.at[slot].transpose((1, 0))))
                return lax.optimization_barrier(ref[...])

            slot = _rem(steps_done, stages)
            plgpu.barrier_wait(q_full.at[q_slot])
            plgpu.barrier_wait(k_full.at[slot])
            s = pl.run_scoped(first_scores, plgpu.WGMMAAccumulatorRef(scores, jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])
            none = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), WGMMA.reduce(1))
            p, top, _ = softmax(s, none, mask_of(jnp.int32(0)))
            plgpu.barrier_wait(v_full.at[slot])
            left = columns[LENGTH] - (steps - 1) * STEP

            # Slots past the length may hold anything, even NaN: a zero weight alone would not keep it out.
            @pl.when(left < STEP)
            def _() -> None:
                page_left = left - role * PAGE_SIZE
                if plan.window is not None:  # the last page may stand where one below the window does
                    page_left = jnp.where((role + _rem(columns[PAGE] + 1, 2) == 0) & (steps == 1), 0, page_left)
                page = v_s.at[slot, pl.ds(role * PAGE_SIZE, PAGE_SIZE)]
                pl.when(page_left < PAGE_SIZE)(lambda: clear_tail(page, page_left))
                plgpu.commit_smem()
                plgpu.barrier_arrive(cleared.at[slot])
                plgpu.barrier_wait(cleared.at[slot])

            def step(i: jax.Array, state: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
                acc, top, total, p16 = state
                number = steps_done + i
                slot, before = _rem(number, stages), _rem(number - 1, stages)
                plgpu.barrier_wait(k_full.at[slot])

                def overlapped(s_ref: Any, o_ref: Any) -> tuple[jax.Array, ...]:
                    def issue() -> None:
                        plgpu.wgmma(s_ref, queries, k_s.at[slot].transpose((1, 0)))
                        start_values(o_ref, acc, p16, v_s.at[before])

                    take_turn(issue)
                    s = lax.optimization_barrier(plgpu.wgmma_accumulator_load(s_ref, wait_n=1))
                    plgpu.barrier_arrive(k_free.at[slot])
                    p, new_top, keep = softmax(s, top, mask_of(i) if masked else None)
                    state = new_top, total * keep + p.sum(axis=1), keep, p
                    new_top, new_total, keep, p = lax.optimization_barrier(state)
                    # Here, so that a loop stands between the softmax and the wait for the values: ptxas would wait
                    # first.
                    plgpu.barrier_wait(v_full.at[slot])
                    new_acc = finish_values(o_ref, acc)
                    plgpu.barrier_arrive(v_free.at[before])
                    return new_acc * _per_row(keep, values), new_top, new_total, p.astype(jnp.bfloat16)

                return pl.run_scoped(
                    overlapped,
                    plgpu.WGMMAAccumulatorRef(scores, jnp.float32),
                    plgpu.WGMMAAccumulatorRef(values, jnp.float32),
                )

            acc = plgpu.layout_cast(jnp.zeros(values, jnp.float32), WGMMA)
            state = acc, top, p.sum(axis=1), p.astype(jnp.bfloat16)
            # Steps that every token of the tile sees whole need no mask; they are the last ones, but for those at the
            # lower edge of a window.
            whole = _div(jnp.maximum(columns[BEGIN] + columns[SHIFT] + 1, 0), STEP)
            unmasked, edge = jnp.clip(steps - whole, 1, steps), steps
            if plan.window is not None:
                cut = _div(jnp.maximum(columns[END] + columns[SHIFT] - plan.window, 0) + (STEP - 1), STEP)
                edge = jnp.maximum(steps - cut, unmasked)
            state = lax.fori_loop(1, unmasked, lambda i, state: step(i, state, True), state)
            state = lax.fori_loop(unmasked, edge, lambda i, state: step(i, state, False), state)
            if plan.window is not None:
                state = lax.fori_loop(edge, steps, lambda i, state: step(i, state, True), state)
            acc, top, total, p16 = state
            plgpu.barrier_arrive(q_free.at[q_slot])
            last = _rem(steps_done + steps - 1, stages)

            def last_values(o_ref: Any) -> jax.Array:
                start_values(o_ref, acc, p16, v_s.at[last])
                return finish_values(o_ref, acc)

            out = pl.run_scoped(last_values, plgpu.WGMMAAccumulatorRef(values, jnp.float32))
            plgpu.barrier_arrive(v_free.at[last])
            if plan.sinks:
                total += jnp.exp2(sinks_of(head) - top)
            return out * _per_row(jnp.where(total == 0.0, 0.0, 1.0 / total), values)

        def store(pair: Any, result: jax.Array, columns: list[jax.Array], token: jax.Array, head: jax.Array) -> None:
            """The rows of result [ROWS, d] whose tokens the tile answers for, through a pair of `results`."""
            begin, end, (result_s, plain_s) = columns[BEGIN], columns[END], pair
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last item's result has left
            result = result.astype(jnp.bfloat16)

            def units() -> None:
                result_s[...] = result
                plgpu.commit_smem()
                for u in range(UNITS):
                    at = token + u * (plan.group_tokens // UNITS)
                    copy = partial(plgpu.copy_smem_to_gmem, result_s.at[pl.ds(u * UNIT, UNIT)], unit(out, at, head))
                    pl.when(at < end)(copy) if plan.packed else copy()

            if plan.packed:
                units()
                return
            inside = (begin <= token) & (token + ROWS <= end)
            pl.when(inside)(units)

            # Units shared with another segment: token by token, from memory that is not tiled.
            @pl.when(jnp.logical_not(inside))
            def _() -> None:
                plain_s[...] = result
                plgpu.commit_smem()

                @pl.loop(jnp.maximum(begin, token), jnp.minimum(end, token + ROWS))
                def _(at: jax.Array) -> None:
                    row = out.at[_div(at, UNIT), _rem(at, UNIT), head]
                    plgpu.copy_smem_to_gmem(plain_row(plain_s, at - token, interpreted), row)

        def compute(turn: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            steps_done, items_done = carry
            columns, head, steps = item_of(turn)
            token, head = share(role, columns[FIRST], head)

            @pl.when(steps > 0)
            def _() -> None:
                result = attend(columns, token, head, steps, steps_done, _rem(items_done, Q_SLOTS))
                for group, pair in enumerate(results):
                    pl.when(role == group)(partial(store, pair, result, columns, token, head))

            @pl.when((steps == 0) & (columns[BEGIN] < columns[END]))
            def _() -> None:
                nothing = plgpu.layout_cast(jnp.zeros(values, jnp.float32), WGMMA)
                for group, pair in enumerate(results):
                    pl.when(role == group)(partial(store, pair, nothing, columns, token, head))

            return steps_done + steps, items_done + (steps > 0).astype(jnp.int32)

        start = (jnp.int32(0), jnp.int32(0))

        @pl.when(role < GROUPS)
        def _() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            if plan.ping_pong:
                pl.when(role == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
            lax.fori_loop(0, turns, compute, start)
            if plan.ping_pong:
                # A program ends with every barrier observed: here group 0's. A condition would tell the compiler which
                # it is, and it would keep that address all along.
                pl.loop(role, 1)(lambda group: plgpu.barrier_wait(turn.at[group]))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(role == GROUPS)
        def _() -> None:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            steps_done, items_done = lax.fori_loop(0, turns, load, start)
            drain(steps_done, stages, k_free, v_free)
            drain(items_done, Q_SLOTS, q_free)

    whole: Any = body
    return body if plan.sinks else lambda *refs: whole(*refs[:6], None, *refs[6:])
