"""Every collective of the compiled step, in one place.

Each runs inside `shard_map` over axis "tp" and under the caller's named scope (the paper's op name), so that the
compiled instruction can be traced back to its op and nano-batch. Gathers run along the leading axis: gathering along
another axis makes XLA transpose before the collective, and whoever consumes the result reads the leading layout for
free (a fusion) or contracts it.

Inside `rank_slice(p)` one device runs the program of the first of p: the collectives become local copies of equal
size, so that everything between them has its true shape. The numbers are then those of no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax import lax

from nanoflow_jax.parallel.mesh import AXIS

# Read while a step is traced, never while one runs.
_slice_of: ContextVar[int | None] = ContextVar("rank_slice_of", default=None)


@contextmanager
def rank_slice(devices: int | None) -> Iterator[None]:
    """What is traced inside is the first rank's part of a program for so many devices; None changes nothing."""
    token = _slice_of.set(devices)
    try:
        yield
    finally:
        _slice_of.reset(token)


def all_gather(x: jax.Array) -> jax.Array:
    """[n, ...] on each of p devices -> [p, n, ...] on all."""
    if devices := _slice_of.get():
        return _copies(x, devices)
    return lax.all_gather(x, AXIS, axis=0, tiled=False)


def all_gather_rows(x: jax.Array) -> jax.Array:
    """[n, ...] on each of p devices -> [p * n, ...] on all."""
    if devices := _slice_of.get():
        return _copies(x, devices).reshape(devices * x.shape[0], *x.shape[1:])
    return lax.all_gather(x, AXIS, axis=0, tiled=True)


def all_reduce(x: jax.Array) -> jax.Array:
    """Sum over devices, the result on all."""
    if _slice_of.get():
        return _moved(x)
    return lax.psum(x, AXIS)


def all_reduce_in_order(x: jax.Array) -> jax.Array:
    """Sum over p devices, the result on all, added in the order of the devices whatever the place in x.

    A ring adds different parts of x in different orders, so that a row's sum would depend on where it stands. Each
    device adds its share of the elements here, [p, n/p] after an all-to-all; the gather then makes the bytes those of
    an all-reduce.
    """
    p = device_count()
    if p == 1:
        return x
    flat = x.reshape(-1)
    padded = jnp.pad(flat, (0, -flat.size % p)).reshape(p, -1)
    parts = _all_to_all(padded)
    total = parts[0]
    for i in range(1, p):
        total = total + parts[i]
    return all_gather_rows(total)[: flat.size].reshape(x.shape)


def _all_to_all(x: jax.Array) -> jax.Array:
    """[p, n] on each of p devices: row i goes to device i; the rows that came, in the order of the devices."""
    if _slice_of.get():
        return _moved(x)
    return lax.all_to_all(x, AXIS, split_axis=0, concat_axis=0, tiled=True)


def reduce_scatter_rows(x: jax.Array) -> jax.Array:
    """Sum over p devices of [p * n, ...]; device i keeps rows [i * n, (i + 1) * n)."""
    if devices := _slice_of.get():
        parts = lax.optimization_barrier(x).reshape(devices, -1, *x.shape[1:])
        return lax.optimization_barrier(parts.sum(axis=0, dtype=x.dtype))
    return lax.psum_scatter(x, AXIS, scatter_dimension=0, tiled=True)


def all_reduce_max(x: jax.Array) -> jax.Array:
    """Largest over devices, the result on all. A few numbers per row: a rank slice keeps its own."""
    if _slice_of.get():
        return x
    return lax.pmax(x, AXIS)


def device_index() -> jax.Array:
    """This device's place on the axis, int32."""
    if _slice_of.get():
        return jnp.zeros((), jnp.int32)
    return lax.axis_index(AXIS)


def device_count() -> int:
    return _slice_of.get() or lax.axis_size(AXIS)


def _copies(x: jax.Array, count: int) -> jax.Array:
    """[n, ...] -> [count, n, ...], written out: the barriers keep XLA from fusing the copies into their reader."""
    return lax.optimization_barrier(jnp.broadcast_to(lax.optimization_barrier(x)[None], (count, *x.shape)))


def _moved(x: jax.Array) -> jax.Array:
    """x read and written once, its rows in reverse: a plain copy would be optimized away."""
    return lax.optimization_barrier(lax.rev(lax.optimization_barrier(x), (0,)))
