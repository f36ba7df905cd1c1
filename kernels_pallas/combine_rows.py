"""Weighted sums of rows that lie elsewhere: what the experts of a token gave, added up."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.checks import check_backend
from kernels_pallas.tuning import DEFAULT_GPU, GROUPED, GroupedTuning


def combine_rows(
    rows: jax.Array,
    place: jax.Array,
    weights: jax.Array,
    *,
    shared: jax.Array | None = None,
    shared_weight: jax.Array | None = None,
    backend: str = "xla",
    tuning: GroupedTuning | None = None,
    expected_rows: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Of each token the sum over its choices, in their order and in float32, of weight * row; rounded once.

    rows     [R, H]; those that no place names may hold anything
    place    [n, k] int32: the row of a choice; negative: there is none here, and it counts as 0
    weights  [n, k] float32
    shared   [n, H] in rows' dtype, times shared_weight [n] float32, is added last; None: there is none
    backend  "xla" everywhere: it reads a row for every choice, those that are not here, too;
             "mosaic" on Hopper: bfloat16, H a multiple of 64 and at least 128; it reads those that are here

    The other arguments are those of `grouped_gemm`; expected_rows: choices that are here, all by default.

    Returns [n, H] in rows' dtype. Raises ValueError naming the argument that does not fit.
    """
    check_backend("combine_rows", backend, interpret, tuning=tuning, expected_rows=expected_rows)
    tokens = place.shape[0]
    if rows.ndim != 2 or place.ndim != 2 or place.dtype != jnp.int32:
        raise ValueError(
            f"rows, place: {list(rows.shape)}, {place.dtype} {list(place.shape)} must be [R, H], int32 [n, k]"
        )
    if weights.shape != place.shape or weights.dtype != jnp.float32:
        raise ValueError(f"weights: {weights.dtype} {list(weights.shape)} must be float32 {list(place.shape)}")
    if (shared is None) != (shared_weight is None):
        raise ValueError("shared, shared_weight: one is given without the other")
    if shared is not None and shared_weight is not None:
        if shared.shape != (tokens, rows.shape[1]) or shared.dtype != rows.dtype:
            wanted = f"{rows.dtype} {[tokens, rows.shape[1]]}"
            raise ValueError(f"shared: {shared.dtype} {list(shared.shape)} must be {wanted}")
        if shared_weight.shape != (tokens,) or shared_weight.dtype != jnp.float32:
            raise ValueError(
                f"shared_weight: {shared_weight.dtype} {list(shared_weight.shape)} must be float32 [{tokens}]"
            )
    if backend == "mosaic":
        from kernels_pallas.combine_rows_mosaic import combine_rows_mosaic

        return combine_rows_mosaic(
            rows, place, weights, shared=shared, shared_weight=shared_weight, tuning=tuning or GROUPED[DEFAULT_GPU],
            expected_rows=expected_rows, interpret=interpret,
        )  # fmt: skip
    total = jnp.zeros((tokens, rows.shape[1]), jnp.float32)
    for choice in range(place.shape[1]):
        here, weight = place[:, choice, None] >= 0, weights[:, choice, None]
        total += jnp.where(here, weight * rows[jnp.maximum(place[:, choice], 0)].astype(jnp.float32), 0)
    if shared is not None and shared_weight is not None:
        total += shared_weight[:, None] * shared.astype(jnp.float32)
    return total.astype(rows.dtype)
