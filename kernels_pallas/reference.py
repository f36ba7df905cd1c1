"""Float32 definitions of the kernels: slow, direct, and the judge of every other implementation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _context(pages: jax.Array, table: jax.Array, length: int, scale: jax.Array | None) -> jax.Array:
    """The first `length` tokens of one request, [length, Hkv, d] float32; scale [Hkv] with pages of fp8."""
    size, t = pages.shape[2], np.arange(length)
    context = jnp.asarray(pages[table[t // size], :, t % size]).astype(jnp.float32)
    return context if scale is None else context * scale[None, :, None]


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    seen: int,
    window: int | None,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One query row: q [Hq, d] over the first `seen` of k, v [length, Hkv, d], of those over the last `window`, with
    sinks [Hq] beside -> out [Hq, d], log-sum-exp [Hq] of the scores."""
    token = np.arange(k.shape[0])
    inside = jnp.asarray((token < seen) & (token >= (0 if window is None else seen - window)))
    # What a window leaves behind may be anything, even NaN.
    k, v = (jnp.where(inside[:, None, None], x, 0) for x in (k, v))
    repeats = q.shape[0] // k.shape[1]
    k, v = jnp.repeat(k, repeats, axis=1), jnp.repeat(v, repeats, axis=1)
    scores = jnp.einsum("hd,thd->ht", q.astype(jnp.float32), k, precision="highest") * scale
    scores = jnp.where(inside[None, :], scores, -jnp.inf)
    top = scores.max(axis=1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True)
    lse = (top + jnp.log(total))[:, 0]
    if sinks is not None:
        total += jnp.exp(sinks[:, None] - top)
    return jnp.einsum("ht,thd->hd", weights / total, v, precision="highest"), lse


def decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    window: int | None = None,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Row r attends to the first lengths[r] tokens of its pages, of those to the last `window`. See
    `kernels_pallas.decode_attention` for the shapes.

    Empty rows (length 0) give zeros and a log-sum-exp of -inf.
    """
    out = jnp.zeros(q.shape, jnp.float32)
    lse = jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
    for row, length in enumerate(np.asarray(lengths)):
        if length:
            k = _context(k_pages, page_table[row], int(length), k_scale)
            v = _context(v_pages, page_table[row], int(length), v_scale)
            row_out, row_lse = _attend(q[row], k, v, scale, int(length), window, sinks)
            out, lse = out.at[row].set(row_out), lse.at[row].set(row_lse)
    return out, lse


def prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    row_starts: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    window: int | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Each row of segment s attends to its pages up to and including itself, to `window` tokens at most. See
    `kernels_pallas.prefill_attention`."""
    out = jnp.zeros(q.shape, jnp.float32)
    starts = np.asarray(row_starts)
    for s, length in enumerate(np.asarray(lengths)):
        if starts[s] == starts[s + 1]:
            continue
        k = _context(k_pages, page_table[s], int(length), k_scale)
        v = _context(v_pages, page_table[s], int(length), v_scale)
        for row in range(starts[s], starts[s + 1]):
            seen = int(length) - (int(starts[s + 1]) - row) + 1
            out = out.at[row].set(_attend(q[row], k, v, scale, seen, window, sinks)[0])
    return out


def append_kv(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    slots: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes row i of k, v [n, Hkv, d] into (pages[i], slots[i]); rows whose page is out of range are dropped.

    With scales [Hkv], the rows divided by them and clipped to the range of the pages' dtype.
    """

    def rounded(x: jax.Array, scale: jax.Array | None, dtype: Any) -> jax.Array:
        if scale is None:
            return x.astype(dtype)
        end = float(jnp.finfo(dtype).max)
        return jnp.clip(x.astype(jnp.float32) / scale[:, None], -end, end).astype(dtype)

    for row, (page, slot) in enumerate(zip(np.asarray(pages), np.asarray(slots), strict=True)):
        if 0 <= page < k_pages.shape[0]:
            k_pages = k_pages.at[page, :, slot].set(rounded(k[row], k_scale, k_pages.dtype))
            v_pages = v_pages.at[page, :, slot].set(rounded(v[row], v_scale, v_pages.dtype))
    return k_pages, v_pages


def add_rms_norm(
    x: jax.Array, update: jax.Array, weight: jax.Array, *, bias: jax.Array | None = None, eps: float
) -> tuple[jax.Array, jax.Array]:
    """total = x [n, H] + update (+ bias [H]), rounded to x's dtype after each sum, and its RMS norm times weight [H],
    float32. update is [n, H], or [p, n, H/p] of columns that stand side by side."""

    def added(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a.astype(jnp.float32) + b.astype(jnp.float32)).astype(x.dtype)

    total = added(x, jnp.concatenate(list(update), axis=1) if update.ndim == 3 else update)
    if bias is not None:
        total = added(total, bias[None, :])
    wide = total.astype(jnp.float32)
    return total, wide / jnp.sqrt((wide**2).mean(axis=1, keepdims=True) + eps) * weight.astype(jnp.float32)[None, :]
