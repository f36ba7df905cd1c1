"""What several Mosaic kernels have alike: shared memory as wgmma reads it, rows of it that leave one by one, and
the end of a program."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2_E = math.log2(math.e)
WGMMA = plgpu.Layout.WGMMA


def tiled(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory as wgmma reads it: tiles of 8 rows by 128 bytes (64 where a row is no longer), swizzled."""
    size = jnp.dtype(dtype).itemsize
    width = min(128, shape[-1] * size)
    transforms = (
        plgpu.TilingTransform((8, width // size)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(width),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def clear_tail(v: Any, left: jax.Array) -> None:
    """Zeroes the rows of v [64, d], in shared memory, from row `left` on."""
    row = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=WGMMA)
    v[...] = jnp.where(row < left, plgpu.layout_cast(v[...], WGMMA), jnp.bfloat16(0))


def drain(done: jax.Array, slots: int, *free: Any) -> None:
    """Waits for the slots that are still in use, by their barriers: a program ends with every barrier observed. done:
    how many turns have taken one."""

    @pl.loop(jnp.maximum(done - slots, 0), done)
    def _(number: jax.Array) -> None:
        for barriers in free:
            plgpu.barrier_wait(barriers.at[lax.rem(number, jnp.int32(slots))])


def plain_row(ref: Any, row: jax.Array, interpreted: bool) -> Any:
    """Row of ref [n, width] in shared memory, where tiles of 8 would be cut. By way of one dimension, else Mosaic would
    tile that memory; the interpreter does not, and does not reshape."""
    n, width = ref.shape
    return ref.at[row] if interpreted else ref.reshape((n * width,)).at[pl.ds(row * width, width)]


def copy_rows(ref: Any, first: jax.Array, into: Any, at: jax.Array, count: int, interpreted: bool) -> None:
    """Rows [first, first + count) of ref [n, width] to into [m, width], in global memory, from row `at` on."""
    for i in range(count):
        plgpu.copy_smem_to_gmem(plain_row(ref, first + i, interpreted), into.at[at + i])


def store_heads(into: Any, result: jax.Array) -> None:
    """result [d, heads] float32, as wgmma leaves it, to into [heads, d] bf16 in shared memory that is not tiled."""
    result = plgpu.layout_cast(result.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
    into.transpose((1, 0))[...] = result
