"""Grouped GEMMs of experts: rows sorted by expert, each times the weight of its own; and what brings rows into that
order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.checks import check_backend
from kernels_pallas.gate import Gate
from kernels_pallas.group_tiles import most_tiles
from kernels_pallas.tuning import DEFAULT_GPU, GROUPED, GroupedTuning


def grouped_gemm(
    x: jax.Array,
    weight: jax.Array,
    sizes: jax.Array,
    *,
    bias: jax.Array | None = None,
    gate: Gate | None = None,
    backend: str = "xla",
    tiles: jax.Array | None = None,
    tuning: GroupedTuning | None = None,
    expected_rows: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Rows of group e, which come after those of e - 1, times weight[e].

    x       [R, K]; rows behind the last group may hold anything
    weight  [E, N, K], or with a gate [E, 2, N, K]: of the gate and of what it multiplies
    sizes   [E] int32, rows of each group, together at most R
    bias    [E, N], or [E, 2, N] with a gate; None: none
    gate    what is made of the two products of a weight; None: there is one
    backend "xla" everywhere: on a CPU, and on GPUs but for what XLA finds, it multiplies every row with every weight;
            "mosaic" on Hopper: bfloat16, K and N multiples of 64, R of 8, as are sizes. Its time is that of the rows in
            groups

    Of backend "mosaic" alone:
    tiles   `group_tiles.list_tiles` of R and sizes, where several calls share it; None: it is made here
    tuning  one of `kernels_pallas.tuning.GROUPED`; the H200's by default
    expected_rows
            rows in groups, for the time that XLA's scheduler is told; R by default
    interpret
            `pallas_call`'s interpreter, for tests without a GPU

    Returns [R, N] in x's dtype; rows behind the last group hold anything. Raises ValueError naming the argument that
    does not fit.
    """
    check_backend("grouped_gemm", backend, interpret, tiles=tiles, tuning=tuning, expected_rows=expected_rows)
    parts = () if gate is None else (2,)
    count, *middle, columns, inputs = weight.shape
    if tuple(middle) != parts or x.ndim != 2 or inputs != x.shape[1] or weight.dtype != x.dtype:
        wanted = f"{x.dtype.name} [E, {'2, ' if parts else ''}N, {x.shape[-1]}]"
        raise ValueError(f"weight: {weight.dtype.name} {list(weight.shape)} must be {wanted}")
    if sizes.shape != (count,) or sizes.dtype != jnp.int32:
        raise ValueError(f"sizes: {sizes.dtype} {list(sizes.shape)} must be int32 [{count}]")
    if bias is not None and bias.shape != (count, *parts, columns):
        raise ValueError(f"bias: {list(bias.shape)} must be {[count, *parts, columns]}")
    if backend == "mosaic":
        wanted = [most_tiles(x.shape[0], count) + 1, 3]
        if tiles is not None and (list(tiles.shape) != wanted or tiles.dtype != jnp.int32):
            raise ValueError(f"tiles: {tiles.dtype} {list(tiles.shape)} must be int32 {wanted}")
        from kernels_pallas.grouped_gemm_mosaic import grouped_gemm_mosaic

        return grouped_gemm_mosaic(
            x, weight, sizes, bias=bias, gate=gate, tiles=tiles, tuning=tuning or GROUPED[DEFAULT_GPU],
            expected_rows=expected_rows, interpret=interpret,
        )  # fmt: skip
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    merged = weight.reshape(count, -1, inputs).transpose(0, 2, 1)
    out = lax.ragged_dot(x, merged, sizes, precision=precision, preferred_element_type=x.dtype)
    if bias is not None:
        expert = jnp.sum(jnp.arange(x.shape[0])[:, None] >= jnp.cumsum(sizes)[None, :], axis=1)
        out = out + bias.reshape(count, -1)[jnp.minimum(expert, count - 1)]
    if gate is None:
        return out
    return gate(out[:, :columns].astype(jnp.float32), out[:, columns:].astype(jnp.float32)).astype(x.dtype)


def gather_rows(
    x: jax.Array,
    rows: jax.Array,
    used: jax.Array,
    *,
    backend: str = "xla",
    tuning: GroupedTuning | None = None,
    expected_rows: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """x [n, H], rows [R] int32 in [0, n) -> [R, H]: x[rows], of which the first `used` [] int32 are needed.

    backend "mosaic" on Hopper: bfloat16, H a multiple of 64, R and used of 8; its time is that of the rows that are
    used. The other arguments are those of `grouped_gemm`.
    """
    check_backend("gather_rows", backend, interpret, tuning=tuning, expected_rows=expected_rows)
    if x.ndim != 2 or rows.ndim != 1 or rows.dtype != jnp.int32 or used.shape != () or used.dtype != jnp.int32:
        raise ValueError(f"rows, used: {rows.dtype} {list(rows.shape)} and {used.dtype} must be int32 [R] and int32 []")
    if backend == "mosaic":
        from kernels_pallas.gather_rows_mosaic import gather_rows_mosaic

        tuning = tuning or GROUPED[DEFAULT_GPU]
        return gather_rows_mosaic(x, rows, used, tuning=tuning, expected_rows=expected_rows, interpret=interpret)
    return x[rows]
