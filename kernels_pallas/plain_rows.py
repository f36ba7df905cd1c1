"""Rows of shared memory that leave one by one, where Mosaic's tiles of 8 would be cut."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def plain_row(ref: Any, row: jax.Array, interpreted: bool) -> Any:
    """Row of ref [n, width] in shared memory. By way of one dimension, else Mosaic would tile that memory; the
    interpreter does not, and does not reshape."""
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
