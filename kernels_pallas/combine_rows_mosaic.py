"""Weighted sums of rows for Hopper with Mosaic GPU: of each token's choices only those rows are read that are here.

A program of one warpgroup has some columns of one token: it reads them straight from global memory, row by row in the
order of the choices, and keeps the sum in registers. Programs are many and short, so that many reads are under way at
once. A last piece that would be narrower than the others begins further left, and stores its own part alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.checks import check_dtypes
from kernels_pallas.expected import expected_us, scheduled_as
from kernels_pallas.tuning import GroupedTuning

LINE = 64  # elements: rows and pieces begin at multiples
THREADS = 128  # a piece has as many elements, or a multiple
WIDEST = 1024  # elements of a piece
BOX = 256  # elements of a bulk copy at most


def piece_width(hidden: int) -> int:
    """Elements of a program's piece of a row."""
    pieces = -(-hidden // WIDEST)
    even = -(-hidden // (pieces * THREADS)) * THREADS
    return min(even, hidden // THREADS * THREADS)


def _body(hidden: int, choices: int, shared: bool) -> Callable[..., None]:
    width = piece_width(hidden)
    last = -(-hidden // width) - 1
    twice = (last + 1) * width - hidden  # columns of the last piece that the one before has, too
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=min(4, width // THREADS))

    def body(rows: Any, place: Any, weights: Any, *rest: Any) -> None:
        """rows [R, H] bf16, place [n, k], weights [n, k], shared [n, H] bf16, its weight [n], out [n, H] bf16; and
        where pieces overlap, [width] bf16 of shared memory."""
        out, *out_s = rest[2:] if shared else rest
        token, number = lax.axis_index("token"), lax.axis_index("piece")
        at = pl.multiple_of(jnp.minimum(number * width, hidden - width), LINE)
        piece = pl.ds(at, width)

        def read(source: Any, row: jax.Array) -> jax.Array:
            return plgpu.load(source.at[row, piece], layout=layout, optimized=False).astype(jnp.float32)

        total = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
        for choice in range(choices):
            row, weight = place[token, choice], weights[token, choice]

            def add(_: Any, total: jax.Array, row: jax.Array = row, weight: jax.Array = weight) -> jax.Array:
                return total + weight * read(rows, row)

            total = lax.fori_loop(0, (row >= 0).astype(jnp.int32), add, total)
        if shared:
            total = total + rest[1][token] * read(rest[0], token)
        if not out_s:
            out[token, piece] = total.astype(jnp.bfloat16)
            return
        out_s[0][...] = total.astype(jnp.bfloat16)
        plgpu.commit_smem()

        def store(first: int) -> None:
            for start in range(first, width, BOX):
                some = pl.ds(start, min(BOX, width - start))
                to = out.at[token, pl.ds(pl.multiple_of(at + start, LINE), min(BOX, width - start))]
                plgpu.copy_smem_to_gmem(out_s[0].at[some], to)

        pl.when(number < last)(lambda: store(0))
        pl.when(number == last)(lambda: store(twice))
        plgpu.wait_smem_to_gmem(0)

    return body


def combine_rows_mosaic(
    rows: jax.Array, place: jax.Array, weights: jax.Array, *, shared: jax.Array | None,
    shared_weight: jax.Array | None, tuning: GroupedTuning, expected_rows: int | None, interpret: Any,
) -> jax.Array:  # fmt: skip
    """As `kernels_pallas.combine_rows`, which describes the arguments and has checked their shapes."""
    check_mosaic(rows, place)
    hidden, (tokens, choices) = rows.shape[1], place.shape
    width = piece_width(hidden)
    kernel = plgpu.kernel(
        _body(hidden, choices, shared is not None),
        out_type=jax.ShapeDtypeStruct((tokens, hidden), rows.dtype),
        scratch_types=[plgpu.SMEM((width,), rows.dtype)] if hidden % width else [],
        grid=(tokens, -(-hidden // width)),
        grid_names=("token", "piece"),
        compiler_params=plgpu.CompilerParams(),
        interpret=interpret,
        kernel_name="combine_rows",
    )
    read = tokens * choices if expected_rows is None else expected_rows
    moved = (read + tokens * (1 if shared is None else 2)) * hidden * 2
    more = () if shared is None else (shared, shared_weight)
    with scheduled_as(expected_us(tuning.expected, moved, tuning.sms, tuning.sms)):
        return kernel(rows, place, weights, *more)


def check_mosaic(rows: jax.Array, place: jax.Array) -> None:
    """Raises ValueError, one line that names the argument, for what the kernel does not take."""
    check_dtypes(("rows", rows, (jnp.bfloat16,)))
    if rows.shape[1] % LINE or rows.shape[1] < THREADS:
        raise ValueError(
            f"rows: {rows.shape[1]} elements; backend 'mosaic' accepts multiples of {LINE} from {THREADS} on"
        )
    if not all(place.shape):
        raise ValueError(f"place: {list(place.shape)}; backend 'mosaic' accepts at least one token and one choice")
