"""KV append for Hopper with Mosaic GPU: TMA reads rows in blocks and stores each where its token belongs.

A copy with a scatter at its end, so bytes are all it has: a persistent grid walks over blocks of neighbouring tokens;
a block comes in with one bulk load, and each token of it leaves with one store of a [Hkv, d] box, whose rows lie a page
apart. One warpgroup copies K, the other V. The next blocks are on their way while one is stored.

A token whose page is N or more is never stored: the store stands under a condition, because the interpreter knows no
predicated copies. The last block is moved back to end at the last row, and skips the tokens that an earlier one has.

The pages are refs of JAX (`jax.new_ref`), which the kernel writes in place; donated, they are never copied.

Rotary embedding stays outside. Fusing it here would save K's way through memory (written once, read once): of what
RoPE and append move in a 70B rank (8 query heads, 1 KV head) that is 2 of 22 rows of d per token, and as many launches
remain, because the query heads need the same rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.checks import check_dtypes, check_sm_budget
from kernels_pallas.expected import expected_us, scheduled_as
from kernels_pallas.tuning import AppendTuning

MAX_BLOCK = 16  # tokens of one block: its stores are unrolled
TMA_ALIGNMENT = 128  # bytes: of a token's row in shared memory
TMA_BOX = 256  # elements of one dimension


@dataclass(frozen=True)
class Plan:
    """Everything static about one call."""

    rows: int
    pages: int
    block: int  # tokens
    stages: int  # blocks in flight, of K and of V
    programs: int

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block)


def _body(plan: Plan) -> Callable[..., None]:
    def body(
        k: Any,  # [n, Hkv, d], global memory
        v: Any,
        pages: Any,  # [n] int32
        slots: Any,  # [n] int32
        first_page: Any,  # [1] int32, added to each of pages
        k_pages: Any,  # [N, Hkv, page_size, d], written
        v_pages: Any,
        k_s: Any,  # [stages, block, Hkv, d], shared memory
        v_s: Any,
        k_full: Any,  # barriers: [stages]
        v_full: Any,
    ) -> None:
        program = lax.axis_index("program")
        turns = lax.div(plan.blocks - program + (plan.programs - 1), jnp.int32(plan.programs))
        base = first_page[0]

        def copy(rows: Any, pool: Any, block_s: Any, full: Any) -> None:
            def place(turn: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
                """First token the block stores, first token it loads, its slot in shared memory."""
                first = (program + turn * plan.programs) * plan.block
                return first, jnp.minimum(first, plan.rows - plan.block), lax.rem(turn, jnp.int32(plan.stages))

            def load(turn: jax.Array) -> None:
                _, start, slot = place(turn)
                plgpu.copy_gmem_to_smem(rows.at[pl.ds(start, plan.block)], block_s.at[slot], full.at[slot])

            ahead = plan.stages - 1
            pl.loop(jnp.int32(0), jnp.minimum(turns, ahead))(load)

            @pl.loop(jnp.int32(0), turns)
            def _(turn: jax.Array) -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last turn's slot is free
                pl.when(turn + ahead < turns)(lambda: load(turn + ahead))
                first, start, slot = place(turn)
                # All indices at once, while the rows arrive: one by one, each would wait for memory.
                places = [(start + i, pages[start + i] + base, slots[start + i]) for i in range(plan.block)]
                plgpu.barrier_wait(full.at[slot])
                for i, (token, page, page_slot) in enumerate(places):

                    @pl.when((page >= 0) & (page < plan.pages) & (token >= first))
                    def _(i: int = i, page: jax.Array = page, page_slot: jax.Array = page_slot) -> None:
                        plgpu.copy_smem_to_gmem(block_s.at[slot, i], pool.at[page, :, page_slot], commit_group=False)

                plgpu.commit_smem_to_gmem_group()

            plgpu.wait_smem_to_gmem(0)

        role = lax.axis_index("role")
        pl.when(role == 0)(lambda: copy(k, k_pages, k_s, k_full))
        pl.when(role == 1)(lambda: copy(v, v_pages, v_s, v_full))

    return body


def append_kv_mosaic(
    k_pages: jax.Array, v_pages: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, slots: jax.Array,
    first_page: jax.Array, *, tuning: AppendTuning, sm_budget: int | None = None, interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """As `kernels_pallas.append_kv`, which describes the arguments, has checked their shapes and gives k and v in the
    pages' dtype."""
    count, heads, _, d = k_pages.shape
    token_bytes = heads * d * k_pages.dtype.itemsize
    check_mosaic(k_pages, pages, slots, sm_budget, token_bytes, tuning)
    if 0 in k.shape or count == 0:
        return k_pages, v_pages
    sms = tuning.sms if sm_budget is None else min(sm_budget, tuning.sms)
    block = min(MAX_BLOCK, max(1, tuning.block_bytes // token_bytes), -(-k.shape[0] // sms))
    plan = Plan(
        rows=k.shape[0], pages=count, block=block, stages=tuning.stages, programs=min(sms, -(-k.shape[0] // block))
    )
    blocks = plgpu.SMEM((plan.stages, block, heads, d), k_pages.dtype)
    kernel = plgpu.kernel(
        _body(plan),
        out_type=(),
        scratch_types=[blocks, blocks, *(plgpu.Barrier(num_barriers=plan.stages) for _ in range(2))],
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=2,
        thread_name="role",
        interpret=interpret,
        kernel_name="append_kv",
    )
    k_ref, v_ref = jax.new_ref(k_pages), jax.new_ref(v_pages)
    moved = 2 * 2 * k.shape[0] * token_bytes + 8 * k.shape[0]  # K and V, read and written, and where to
    with scheduled_as(expected_us(tuning.expected, moved, plan.programs, tuning.sms)):
        kernel(k, v, pages, slots, first_page[None], k_ref, v_ref)
    return jax.freeze(k_ref), jax.freeze(v_ref)


def check_mosaic(
    k_pages: jax.Array,
    pages: jax.Array,
    slots: jax.Array,
    sm_budget: int | None,
    token_bytes: int,
    tuning: AppendTuning,
) -> None:
    """Raises ValueError, one line that names the argument, for what the kernel does not take."""
    check_dtypes(("pages", pages, (jnp.int32,)), ("slots", slots, (jnp.int32,)))
    _, heads, _, d = k_pages.shape
    if heads > TMA_BOX or d > TMA_BOX:
        raise ValueError(
            f"k_pages, v_pages: {heads} KV heads of {d}; backend 'mosaic' accepts at most {TMA_BOX} of {TMA_BOX}"
        )
    if token_bytes % TMA_ALIGNMENT or d * k_pages.dtype.itemsize % 16:
        raise ValueError(
            f"k_pages, v_pages: a token's {heads} KV heads of {d} {k_pages.dtype} are {token_bytes} bytes; "
            f"backend 'mosaic' accepts multiples of {TMA_ALIGNMENT}, and of 16 per head"
        )
    if token_bytes > tuning.block_bytes:
        raise ValueError(
            f"k_pages, v_pages: a token's {heads} KV heads of {d} {k_pages.dtype} are {token_bytes} bytes; "
            f"backend 'mosaic' accepts the tuning's block_bytes, {tuning.block_bytes}"
        )
    check_sm_budget(sm_budget)
