"""The core of the XLA path: online softmax over blocks of pages, for tiles of query rows.

Runs on every device. Memory is bounded by one block of context, whatever the lengths; the loop ends at the longest
length present. A block past a row's length changes nothing, bit for bit, so a row's answer does not depend on its
neighbours' lengths. With a window, a tile's blocks begin with the first one that one of its rows sees: the loop is as
long as the window, however long the contexts. What lies below the window in that block is masked.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

BLOCK_TOKENS = 512


def attend_paged(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    visible: jax.Array,
    first_page: jax.Array,
    scale: float,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Tiles of rows that share a page table.

    q [T, n, Hq, d], page_table [T, M], to which first_page [] is added, visible [T, n] int32: how many tokens of the
    context a row sees (0: none);
    k_scale, v_scale [Hkv] float32 with pages of fp8, which are upcast to q's dtype;
    window: the last tokens of those that a row sees; the rows of a tile are then neighbours in their context.
    Returns out [T, n, Hq, d] in q's dtype and the log-sum-exp [T, n, Hq] in float32 (-inf where nothing is visible).
    """
    tiles, n, q_heads, d = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    repeats = q_heads // kv_heads
    pages = page_table.shape[1]
    if window is not None:  # no larger than the windows of n neighbours
        pages = min(pages, (window + n - 3) // page_size + 2)
    block_pages = max(1, min(BLOCK_TOKENS // page_size, pages))
    if window is not None:
        page_table, visible = _from_window(page_table, visible, window, page_size, block_pages)
    blocks = -(-page_table.shape[1] // block_pages)
    table = jnp.pad(page_table, ((0, 0), (0, blocks * block_pages - page_table.shape[1])))
    block = block_pages * page_size
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    q_tgmd = q.reshape(tiles, n, kv_heads, repeats, d).transpose(0, 2, 1, 3, 4).reshape(tiles, kv_heads, n * repeats, d)
    seen = jnp.repeat(visible, repeats, axis=1)[:, None, :, None]  # [T, 1, n * repeats, 1]

    def gather(pages: jax.Array, i: jax.Array) -> jax.Array:
        ids = lax.dynamic_slice_in_dim(table, i * block_pages, block_pages, axis=1)  # [T, block_pages]
        picked = pages[
            ids + first_page
        ]  # [T, block_pages, Hkv, page_size, d]; entries past the length may be anything in range
        picked = picked.transpose(0, 2, 1, 3, 4).reshape(tiles, kv_heads, block, d)
        return picked if k_scale is None else picked.astype(q.dtype)

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, acc = carry
        k, v = gather(k_pages, i), gather(v_pages, i)
        scores = (
            jnp.einsum("tgmd,tgkd->tgmk", q_tgmd, k, precision=precision, preferred_element_type=jnp.float32) * scale
        )
        if k_scale is not None:
            scores = scores * k_scale[None, :, None, None]
        token = (i * block + jnp.arange(block, dtype=jnp.int32))[None, None, None, :]
        inside = token < seen
        if window is not None:
            inside &= token >= seen - window
        scores = jnp.where(inside, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
        safe_top = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights = jnp.exp(scores - safe_top)
        keep = jnp.exp(top - safe_top)
        # A page that is not this row's may hold anything, even NaN: a zero weight alone would not keep it out.
        v = jnp.where(inside.any(axis=2)[..., None], v, jnp.zeros((), v.dtype))
        update = jnp.einsum(
            "tgmk,tgkd->tgmd", weights.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32
        )
        return new_top, total * keep + weights.sum(axis=-1, keepdims=True), acc * keep + update

    rows = (tiles, kv_heads, n * repeats)
    start = (jnp.full((*rows, 1), -jnp.inf), jnp.zeros((*rows, 1), jnp.float32), jnp.zeros((*rows, d), jnp.float32))
    needed = (visible.max() + (block - 1)) // block
    top, total, acc = lax.fori_loop(0, needed, body, start)
    out = acc / jnp.where(total == 0, 1.0, total)
    if v_scale is not None:
        out = out * v_scale[None, :, None, None]
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(jnp.where(total == 0, 1.0, total)))

    def unfold(x: jax.Array) -> jax.Array:
        return x.reshape(tiles, kv_heads, n, repeats, -1).transpose(0, 2, 1, 3, 4).reshape(tiles, n, q_heads, -1)

    return unfold(out).astype(q.dtype), unfold(lse)[..., 0]


def _from_window(
    page_table: jax.Array, visible: jax.Array, window: int, page_size: int, block_pages: int
) -> tuple[jax.Array, jax.Array]:
    """`attend_paged`'s page_table and visible, both from the first block on that a row of the tile sees. Blocks stay
    where they are in the context: a row's answer does not depend on where its tile begins."""
    pages, block = page_table.shape[1], block_pages * page_size
    lowest = jnp.where(visible > 0, jnp.maximum(visible - window, 0), pages * page_size).min(axis=1)
    begin = jnp.minimum(lowest // block, (pages - 1) // block_pages) * block_pages
    # As many blocks as the windows of n neighbours may touch, whatever token of a block the first begins with.
    most = (window + visible.shape[1] - 3) // block + 2
    width = min(most, -(-pages // block_pages)) * block_pages
    page = jnp.minimum(begin[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :], pages - 1)
    visible = jnp.maximum(visible - (begin * page_size)[:, None], 0)
    return jnp.take_along_axis(page_table, page, axis=1), visible


def with_sinks(out: jax.Array, lse: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Attention out [..., Hq, d] whose softmax had sinks [Hq] beside the scores, of the log-sum-exp [..., Hq]
    without."""
    if sinks is None:
        return out
    return (
        out.astype(jnp.float32) * jax.nn.sigmoid(lse - sinks.reshape((1,) * (lse.ndim - 1) + (-1,)))[..., None]
    ).astype(out.dtype)
