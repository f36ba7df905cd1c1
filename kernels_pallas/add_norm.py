"""Residual addition and RMS norm: the residual takes an update, and the next GEMM gets its norm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.checks import check_backend, check_vector
from kernels_pallas.rows_fp8 import quantise_rows
from kernels_pallas.tuning import ADD_NORM, DEFAULT_GPU, AddNormTuning


def add_rms_norm(
    x: jax.Array,
    update: jax.Array,
    weight: jax.Array,
    *,
    bias: jax.Array | None = None,
    scales: tuple[jax.Array, jax.Array] | None = None,
    weight_row: int = 0,
    eps: float,
    quantise: bool = False,
    bound: float | None = None,
    backend: str = "xla",
    tuning: AddNormTuning | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, Any]:
    """total = x + update (+ bias), each sum rounded to x's dtype, and normed = the RMS norm of total times weight.

    x           [n, H]
    update      [n, H], or gathered columns [p, n, H/p]: device i has columns i*H/p to (i+1)*H/p of every row
    weight      [H], or [R, H] of which row `weight_row` counts: the kernel reads it in place, so that no slice of
                a stack of norms is copied
    bias        [H], of the projection that the update comes from
    scales      of the rows [n] and the columns [H] of an update [n, H], float32: what an fp8 GEMM gave is multiplied
                by them first, and rounded to x's dtype
    eps         added to the mean of the squares
    quantise    give normed in fp8, for a GEMM that multiplies it so
    bound       of it: magnitudes beyond are cut off first
    backend     "xla" or "mosaic" (Hopper: bfloat16, H a multiple of 128 up to 16384, p a divisor of 8 and of
                H / 128; with scales H up to 8192)
    tuning      "mosaic" alone; by default that of an H200
    interpret   `pallas_call`'s interpreter, for tests without a GPU

    Returns total and normed, both [n, H]; with `quantise` normed is a pair, float8_e4m3fn values [n, H] and a scale [n]
    float32 per row, as `rows_fp8.quantise_rows` makes them of the rounded norm ("mosaic" divides to 2 units in the
    last place of float32). The statistics are those of the rounded total, in float32, and normed is rounded before it
    is multiplied with the weight (with "xla" as far as the compiler does round what it fuses). With "mosaic", a row's
    result depends neither on n, nor on its place, nor on which form the update has. Raises ValueError naming the
    argument that does not fit.
    """
    check_backend("add_rms_norm", backend, interpret, tuning=tuning)
    if x.ndim != 2:
        raise ValueError(f"x: shape {x.shape} must be [n, H]")
    n, row_size = x.shape
    gathered = update.ndim == 3 and update.shape[1] == n and update.shape[0] * update.shape[2] == row_size
    if update.shape != x.shape and not gathered:
        raise ValueError(f"update: shape {update.shape} must be [{n}, {row_size}] or [p, {n}, {row_size} / p]")
    if weight.ndim not in (1, 2) or weight.shape[-1] != row_size:
        raise ValueError(f"weight: shape {weight.shape} must be [{row_size}] or [R, {row_size}]")
    weight = weight.reshape(-1, row_size)
    if bound is not None and not (quantise and bound > 0):
        raise ValueError(f"bound: {bound} is not accepted; accepted: None, or with quantise=True a number above 0")
    if not 0 <= weight_row < weight.shape[0]:
        raise ValueError(f"weight_row: {weight_row} must be in [0, {weight.shape[0]})")
    if bias is not None:
        check_vector("bias", bias, row_size)
    if scales is not None and (
        gathered or [(s.shape, s.dtype) for s in scales] != [((n,), jnp.float32), ((row_size,), jnp.float32)]
    ):
        raise ValueError(
            f"scales: {[f'{s.dtype}{list(s.shape)}' for s in scales]} must be float32[{n}] of the rows and "
            f"float32[{row_size}] of the columns of an update [{n}, {row_size}]"
        )

    if backend == "mosaic":
        from kernels_pallas.add_norm_mosaic import add_rms_norm_mosaic

        return add_rms_norm_mosaic(
            x, update, weight, bias, scales, weight_row=weight_row, eps=eps, quantise=quantise, bound=bound,
            tuning=tuning or ADD_NORM[DEFAULT_GPU], interpret=interpret,
        )  # fmt: skip

    if gathered:
        update = update.transpose(1, 0, 2).reshape(x.shape)
    if scales is not None:
        update = (update.astype(jnp.float32) * scales[0][:, None] * scales[1][None, :]).astype(x.dtype)
    total = x + update if bias is None else x + update + bias[None, :]
    wide = total.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    normed = normed.astype(x.dtype) * lax.slice_in_dim(weight, weight_row, weight_row + 1)
    return total, quantise_rows(normed, 1, bound) if quantise else normed
