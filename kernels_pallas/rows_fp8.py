"""Rows in fp8: float8_e4m3fn values over a scale per row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.checks import FP8, FP8_MAX

LEAST = 2.0**-40  # a scale; rows of zeros have it


def quantise_rows(
    x: jax.Array, axis: int, bound: float | None = None, power_of_two: bool = False
) -> tuple[jax.Array, jax.Array]:
    """x over the largest magnitude along `axis`, and that as scale, or the next power of two: (float8_e4m3fn of x's
    shape, float32 without `axis`). Magnitudes beyond `bound` are cut off first."""
    x32 = x.astype(jnp.float32)
    if bound is not None:
        x32 = jnp.clip(x32, -bound, bound)
    scale = jnp.maximum(jnp.max(jnp.abs(x32), axis=axis) / FP8_MAX, LEAST)
    scale = next_power_of_two(scale) if power_of_two else scale
    return (x32 / jnp.expand_dims(scale, axis)).astype(FP8), scale


def next_power_of_two(x: jax.Array) -> jax.Array:
    """Of positive, normal float32: the least that is not below."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type((bits + 0x7FFFFF) & ~0x7FFFFF, jnp.float32)
