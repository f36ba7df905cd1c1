"""Rows gathered for Hopper with Mosaic GPU: as many as are used, whatever the size of the result.

A persistent program per SM copies blocks of rows into shared memory, a bulk copy each, and out again in one. Nothing is
computed; one warpgroup keeps as many blocks in flight as fit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.checks import check_dtypes
from kernels_pallas.expected import expected_us, scheduled_as
from kernels_pallas.tuning import GroupedTuning

LINE = 64  # elements: a copy's box has at most 256 of them in each dimension
BLOCK = 4  # rows
IN_FLIGHT = 192 * 1024  # bytes
MOST_STAGES = 16


def gather_rows_mosaic(
    x: jax.Array, rows: jax.Array, used: jax.Array, *, tuning: GroupedTuning, expected_rows: int | None, interpret: Any
) -> jax.Array:
    """As `kernels_pallas.gather_rows`, which describes the arguments and has checked their shapes."""
    check_mosaic(x, rows)
    n, hidden = x.shape
    count = rows.shape[0]
    row = (hidden // LINE, LINE)
    stages = min(MOST_STAGES, IN_FLIGHT // (BLOCK * hidden * 2))
    programs = min(tuning.sms, count // BLOCK)

    def body(x: Any, rows: Any, used: Any, out: Any, block_s: Any, full: Any) -> None:
        program = lax.axis_index("program")
        blocks = lax.div(used[0], jnp.int32(BLOCK))
        turns = lax.div(jnp.maximum(blocks - program, 0) + (programs - 1), jnp.int32(programs))

        def bring(turn: jax.Array) -> None:
            slot, first = lax.rem(turn, jnp.int32(stages)), (program + turn * programs) * BLOCK
            for i in range(BLOCK):
                plgpu.copy_gmem_to_smem(x.at[rows[first + i]], block_s.at[slot, i], full.at[slot])

        ahead = stages - 1
        pl.loop(jnp.int32(0), jnp.minimum(turns, ahead))(bring)

        @pl.loop(jnp.int32(0), turns)
        def _(turn: jax.Array) -> None:
            slot = lax.rem(turn, jnp.int32(stages))
            plgpu.barrier_wait(full.at[slot])
            plgpu.copy_smem_to_gmem(block_s.at[slot], out.at[pl.ds((program + turn * programs) * BLOCK, BLOCK)])

            @pl.when(turn + ahead < turns)
            def _() -> None:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the block before has left its slot
                bring(turn + ahead)

        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((count, *row), x.dtype),
        scratch_types=[
            plgpu.SMEM((stages, BLOCK, *row), x.dtype),
            plgpu.Barrier(num_barriers=stages, num_arrivals=BLOCK),
        ],
        grid=(programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(),
        interpret=interpret,
        kernel_name="gather_rows",
    )
    moved = 2 * (count if expected_rows is None else expected_rows) * hidden * 2
    with scheduled_as(expected_us(tuning.expected, moved, programs, tuning.sms)):
        return kernel(x.reshape(n, *row), rows, used[None]).reshape(count, hidden)


def check_mosaic(x: jax.Array, rows: jax.Array) -> None:
    """Raises ValueError, one line that names the argument, for what the kernel does not take."""
    check_dtypes(("x", x, (jnp.bfloat16,)))
    if x.shape[1] % LINE or not LINE <= x.shape[1] <= 256 * LINE:
        raise ValueError(f"x: rows of {x.shape[1]}; backend 'mosaic' accepts multiples of {LINE} up to {256 * LINE}")
    if rows.shape[0] % BLOCK or rows.shape[0] == 0:
        raise ValueError(f"rows: {rows.shape[0]}; backend 'mosaic' accepts multiples of {BLOCK}")
