"""KV append: this step's K (after rotary embedding) and V into their pages, in place when the pages are donated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.checks import FP8, FP8_MAX, check_backend, check_first_page, check_pages, check_vector
from kernels_pallas.tuning import APPEND, DEFAULT_GPU, AppendTuning


def quantise(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x [n, Hkv, d] in units of scale [Hkv] float32, rounded to float8_e4m3fn; what is beyond its range ends at it."""
    units = x.astype(jnp.float32) / scale[None, :, None]
    # Not by the cast: a number beyond the range would become NaN. NaN stays NaN.
    return jnp.clip(units, -FP8_MAX, FP8_MAX).astype(FP8)


def append_kv(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    slots: jax.Array,
    *,
    first_page: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    backend: str = "xla",
    tuning: AppendTuning | None = None,
    sm_budget: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes row i of k and v to page pages[i] + first_page, slot slots[i].

    k_pages  [N, Hkv, page_size, d], v_pages alike
    k, v     [n, Hkv, d]
    pages    [n] int32; a padding row, which is dropped, has N or any greater number
    slots    [n] int32 in [0, page_size)
    first_page  [] int32: added to every page, where one pool holds the pages of many layers; 0 by default
    k_scale  [Hkv] float32, with pages of float8_e4m3fn alone: the pages hold k / k_scale; v_scale alike
    backend  "xla" everywhere; "mosaic" on Hopper: a token's row, Hkv * d, of a multiple of 128 bytes

    Of backend "mosaic" alone:
    tuning     one of `kernels_pallas.tuning.APPEND`; the H200's by default
    sm_budget  how many SMs it may use, to leave the others to a GEMM
    interpret  `pallas_call`'s interpreter, for tests without a GPU

    Returns the updated pages. No two rows may name the same place. Raises ValueError naming the argument that does
    not fit.
    """
    check_backend("append_kv", backend, interpret, tuning=tuning, sm_budget=sm_budget)
    check_pages(k_pages, v_pages, k_scale, v_scale)
    if k.shape != v.shape or k.shape[1:] != (k_pages.shape[1], k_pages.shape[3]):
        raise ValueError(f"k, v: shapes {k.shape}, {v.shape} must both be [n, {k_pages.shape[1]}, {k_pages.shape[3]}]")
    check_vector("pages", pages, k.shape[0])
    check_vector("slots", slots, k.shape[0])
    first_page = check_first_page(first_page)

    if k_scale is not None and v_scale is not None:
        k, v = quantise(k, k_scale), quantise(v, v_scale)
    else:
        k, v = k.astype(k_pages.dtype), v.astype(v_pages.dtype)
    if backend == "mosaic":
        from kernels_pallas.append_kv_mosaic import append_kv_mosaic

        return append_kv_mosaic(
            k_pages, v_pages, k, v, pages, slots, first_page, tuning=tuning or APPEND[DEFAULT_GPU],
            sm_budget=sm_budget, interpret=interpret,
        )  # fmt: skip

    count, heads, page_size, d = k_pages.shape
    pages = pages + first_page
    # One flat row per token and head: scattered over [N, :, slot], XLA would first transpose, and so copy, the whole
    # pool.
    head = jnp.arange(heads, dtype=jnp.int32)
    row = (pages[:, None] * heads + head[None, :]) * page_size + slots[:, None]
    row = jnp.where(pages[:, None] < count, row, count * heads * page_size).reshape(-1)

    def write(into: jax.Array, rows: jax.Array) -> jax.Array:
        # Not unique_indices: padding rows repeat an index, and the promise would make that undefined.
        flat = into.reshape(count * heads * page_size, d)
        return flat.at[row].set(rows.reshape(-1, d), mode="drop").reshape(into.shape)

    return write(k_pages, k), write(v_pages, v)
