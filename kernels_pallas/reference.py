"""Float32 definitions of the kernels: slow, direct, and the judge of every other implementation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _wide(x: Any) -> np.ndarray:
    """float32. These are NumPy's: JAX would compile every operation anew for each shape."""
    return np.asarray(x).astype(np.float32)


def _context(pages: jax.Array, table: np.ndarray, length: int, scale: jax.Array | None) -> np.ndarray:
    """The first `length` tokens of one request, [length, Hkv, d] float32; scale [Hkv] with pages of fp8."""
    size, t = pages.shape[2], np.arange(length)
    context = _wide(np.asarray(pages)[table[t // size], :, t % size])
    return context if scale is None else context * _wide(scale)[None, :, None]


def _attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    seen: int,
    window: int | None,
    sinks: jax.Array | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One query row: q [Hq, d] over the first `seen` of k, v [length, Hkv, d], of those over the last `window`, with
    sinks [Hq] beside -> out [Hq, d], log-sum-exp [Hq] of the scores."""
    # What a window leaves behind may be anything, even NaN.
    inside = slice(0 if window is None else max(0, seen - window), seen)
    repeats = q.shape[0] // k.shape[1]
    k, v = (np.repeat(x[inside], repeats, axis=1) for x in (k, v))
    scores = np.einsum("hd,thd->ht", _wide(q), k) * np.float32(scale)
    top = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True)
    lse = (top + np.log(total))[:, 0]
    if sinks is not None:
        total += np.exp(_wide(sinks)[:, None] - top)
    return np.einsum("ht,thd->hd", weights / total, v), lse


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
) -> tuple[np.ndarray, np.ndarray]:
    """Row r attends to the first lengths[r] tokens of its pages, of those to the last `window`. See
    `kernels_pallas.decode_attention` for the shapes.

    Empty rows (length 0) give zeros and a log-sum-exp of -inf.
    """
    out, lse = np.zeros(q.shape, np.float32), np.full(q.shape[:2], -np.inf, np.float32)
    queries, tables = np.asarray(q), np.asarray(page_table)
    for row, length in enumerate(np.asarray(lengths)):
        if length:
            k = _context(k_pages, tables[row], int(length), k_scale)
            v = _context(v_pages, tables[row], int(length), v_scale)
            out[row], lse[row] = _attend(queries[row], k, v, scale, int(length), window, sinks)
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
) -> np.ndarray:
    """Each row of segment s attends to its pages up to and including itself, to `window` tokens at most. See
    `kernels_pallas.prefill_attention`."""
    out, starts = np.zeros(q.shape, np.float32), np.asarray(row_starts)
    queries, tables = np.asarray(q), np.asarray(page_table)
    for s, length in enumerate(np.asarray(lengths)):
        if starts[s] == starts[s + 1]:
            continue
        k = _context(k_pages, tables[s], int(length), k_scale)
        v = _context(v_pages, tables[s], int(length), v_scale)
        for row in range(starts[s], starts[s + 1]):
            seen = int(length) - (int(starts[s + 1]) - row) + 1
            out[row] = _attend(queries[row], k, v, scale, seen, window, sinks)[0]
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
) -> tuple[np.ndarray, np.ndarray]:
    """total = x [n, H] + update (+ bias [H]), rounded to x's dtype after each sum, and its RMS norm times weight [H],
    float32. update is [n, H], or [p, n, H/p] of columns that stand side by side."""

    def added(a: Any, b: Any) -> np.ndarray:
        return (_wide(a) + _wide(b)).astype(x.dtype)

    total = added(x, np.concatenate(np.asarray(update), axis=1) if update.ndim == 3 else update)
    if bias is not None:
        total = added(total, bias)
    wide = _wide(total)
    return total, wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + np.float32(eps)) * _wide(weight)
