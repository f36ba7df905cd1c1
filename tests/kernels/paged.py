"""Paged contexts for the kernel tests: random pages in random order, NaN wherever a request owns nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass
class Paged:
    """Contexts of R requests, contiguous and in pages of NaN but for the tokens written."""

    k: list[np.ndarray]  # R arrays [length, Hkv, d] float32
    v: list[np.ndarray]
    k_pages: jax.Array  # [N, Hkv, page_size, d]
    v_pages: jax.Array
    page_table: np.ndarray  # [R, M] int32; entries past the length name pages of NaN, or of other requests
    lengths: np.ndarray  # [R] int32

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[2]


def make_paged(
    rng: np.random.Generator,
    lengths: Sequence[int],
    *,
    kv_heads: int,
    page_size: int,
    head_dim: int = 8,
    dtype: str = "float32",
    width: int | None = None,
) -> Paged:
    """Requests of these lengths, values exact in `dtype`; `width`: pages per table row (the longest needs)."""
    needed = [-(-n // page_size) for n in lengths]
    width = max(1, *needed) if width is None else width
    num_pages = sum(needed) + 3
    order = rng.permutation(num_pages)
    table = rng.integers(0, num_pages, (len(lengths), width)).astype(np.int32)
    pages = np.full((2, num_pages, kv_heads, page_size, head_dim), np.nan, np.float32)
    contexts = []
    for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        table[row, :count], order = order[:count], order[count:]
        values = rng.standard_normal((2, length, kv_heads, head_dim)).astype(np.float32)
        values = np.asarray(jnp.asarray(values, dtype).astype(jnp.float32))
        for t in range(length):
            pages[:, table[row, t // page_size], :, t % page_size] = values[:, t]
        contexts.append(values)
    k_pages, v_pages = (jnp.asarray(p, dtype) for p in pages)
    return Paged(
        [c[0] for c in contexts], [c[1] for c in contexts], k_pages, v_pages, table, np.array(lengths, np.int32)
    )


def random_queries(
    rng: np.random.Generator, rows: int, heads: int, head_dim: int = 8, dtype: str = "float32"
) -> jax.Array:
    return jnp.asarray(rng.standard_normal((rows, heads, head_dim)).astype(np.float32), dtype)


def dense_attention(q: Any, k: np.ndarray, v: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Attention of q [Hq, d] over contiguous k, v [length, Hkv, d] in float64: out [Hq, d], log-sum-exp [Hq]."""
    q = np.asarray(q).astype(np.float64)
    repeats = q.shape[0] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), repeats, axis=1) for x in (k, v))
    scores = np.einsum("hd,thd->ht", q, k) * scale
    lse = np.logaddexp.reduce(scores, axis=1)
    return np.einsum("ht,thd->hd", np.exp(scores - lse[:, None]), v), lse


def slide(paged: Paged, lows: Sequence[int]) -> Paged:
    """The same contexts after the pages that end at or below token lows[r] of request r were freed: they hold NaN, and
    the entries that named them name NaN too, or what other requests own."""
    table, (num_pages, *_) = paged.page_table.copy(), paged.k_pages.shape
    freed = [paged.page_table[row, : low // paged.page_size] for row, low in enumerate(lows)]
    for row, pages in enumerate(freed):
        table[row, : len(pages)] = np.random.default_rng(row).integers(0, num_pages, len(pages))
        table[row, : len(pages) : 2] = pages[::2]
    gone = np.concatenate(freed)
    k_pages, v_pages = (x.at[gone].set(jnp.nan) for x in (paged.k_pages, paged.v_pages))
    return replace(paged, k_pages=k_pages, v_pages=v_pages, page_table=table)


def dense_decode(q: Any, paged: Paged, scale: float, window: int = 10**9) -> tuple[np.ndarray, np.ndarray]:
    """`dense_attention` of every row over the end of its own context; zeros and -inf where there is none."""
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for row, length in enumerate(paged.lengths):
        if length:
            out[row], lse[row] = dense_attention(q[row], paged.k[row][-window:], paged.v[row][-window:], scale)
    return out, lse


def dense_prefill(q: Any, paged: Paged, row_starts: Sequence[int], scale: float, window: int = 10**9) -> np.ndarray:
    """Every row of segment s over its own context up to itself, `window` tokens; zeros for padding rows."""
    out = np.zeros(q.shape)
    for s, length in enumerate(paged.lengths):
        for row in range(row_starts[s], row_starts[s + 1]):
            seen = int(length) - (row_starts[s + 1] - row) + 1
            own = slice(max(0, seen - window), seen)
            out[row], _ = dense_attention(q[row], paged.k[s][own], paged.v[s][own], scale)
    return out
