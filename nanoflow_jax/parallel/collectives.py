"""Every collective of the compiled step, in one place.

Each runs inside `shard_map` over axis "tp" and under the caller's named scope (the paper's op name), so that the
compiled instruction can be traced back to its op and nano-batch. Gathers run along the leading axis: gathering along
another axis makes XLA transpose before the collective, and whoever consumes the result reads the leading layout for
free (a fusion) or contracts it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from nanoflow_jax.parallel.mesh import AXIS


def all_gather(x: jax.Array) -> jax.Array:
    """[n, ...] on each of p devices -> [p, n, ...] on all."""
    return lax.all_gather(x, AXIS, axis=0, tiled=False)


def all_gather_rows(x: jax.Array) -> jax.Array:
    """[n, ...] on each of p devices -> [p * n, ...] on all."""
    return lax.all_gather(x, AXIS, axis=0, tiled=True)


def all_reduce(x: jax.Array) -> jax.Array:
    """Sum over devices, the result on all."""
    return lax.psum(x, AXIS)


def all_reduce_in_order(x: jax.Array) -> jax.Array:
    """Sum over p devices, the result on all, added in the order of the devices whatever the place in x.

    A ring adds different parts of x in different orders, so that a row's sum would depend on where it stands. Each
    device adds its share of the elements here, [p, n/p] after an all-to-all; the gather then makes the bytes those of
    an all-reduce.
    """
    p = lax.axis_size(AXIS)
    if p == 1:
        return x
    flat = x.reshape(-1)
    padded = jnp.pad(flat, (0, -flat.size % p)).reshape(p, -1)
    parts = lax.all_to_all(padded, AXIS, split_axis=0, concat_axis=0, tiled=True)
    total = parts[0]
    for i in range(1, p):
        total = total + parts[i]
    return lax.all_gather(total, AXIS, axis=0, tiled=True)[: flat.size].reshape(x.shape)


def reduce_scatter_rows(x: jax.Array) -> jax.Array:
    """Sum over p devices of [p * n, ...]; device i keeps rows [i * n, (i + 1) * n)."""
    return lax.psum_scatter(x, AXIS, scatter_dimension=0, tiled=True)


def all_reduce_max(x: jax.Array) -> jax.Array:
    """Largest over devices, the result on all."""
    return lax.pmax(x, AXIS)


def device_index() -> jax.Array:
    """This device's place on the axis, int32."""
    return lax.axis_index(AXIS)


def device_count() -> int:
    return lax.axis_size(AXIS)
