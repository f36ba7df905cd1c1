"""Prefill attention (the paper's PF): causal attention of packed prompt chunks over paged context plus themselves."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.checks import check_attention, check_backend, check_first_page, check_vector
from kernels_pallas.paged_xla import attend_paged, with_sinks
from kernels_pallas.tuning import DEFAULT_GPU, PREFILL, PrefillTuning

# Rows of one request that share a pass over its pages; with 8 query heads per KV head, 128 rows of a GEMM.
TILE_ROWS = 16


def prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    row_starts: jax.Array,
    lengths: jax.Array,
    *,
    first_page: jax.Array | None = None,
    scale: float | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    window: int | None = None,
    sinks: jax.Array | None = None,
    backend: str = "xla",
    tuning: PrefillTuning | None = None,
    sm_budget: int | None = None,
    expected_context: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Causal attention of S segments (chunks of requests) packed one after another, K and V already in the pages.

    q           [P, Hq, d]; segment s owns rows [row_starts[s], row_starts[s + 1]); rows past row_starts[S] are padding
    k_pages     [N, Hkv, page_size, d], v_pages alike
    page_table  [S, M] int32; entries, with first_page, in [0, N)
    row_starts  [S + 1] int32, ascending from 0
    lengths     [S] int32: tokens of context after this chunk; the segment's last row is token lengths[s] - 1
    first_page  [] int32: added to every entry of the table, where one pool holds the pages of many layers; 0 by default
    scale       multiplies the scores; 1 / sqrt(d) by default
    k_scale     [Hkv] float32, with pages of float8_e4m3fn alone: K is k_pages times this; v_scale alike
    window      tokens that a row sees, its own included (a sliding window): up to it from position - window + 1 on;
                None is all. Pages wholly below every row's may hold anything, their entries be any in [0, N)
    sinks       [Hq] float32: a logit of each query head beside its scores, which takes its share of the softmax and
                gives nothing (gpt-oss); None: none
    backend     "xla" everywhere; "mosaic" on Hopper: q and pages of bf16, page size 64, head size 64 or 128
                (`kernels_pallas.targets` says which GPU has it)

    Of backend "mosaic" alone:
    tuning      one of `kernels_pallas.tuning.PREFILL`; the H200's by default
    sm_budget   how many SMs it may use, to leave the others to a GEMM
    expected_context
                tokens of context of a row, for the time that XLA's scheduler is told; by default the table's width
    interpret   `pallas_call`'s interpreter, for tests without a GPU

    Returns out [P, Hq, d] in q's dtype; padding rows give 0. Raises ValueError naming the argument that does not fit.
    """
    more = {"tuning": tuning, "sm_budget": sm_budget, "expected_context": expected_context}
    check_backend("prefill_attention", backend, interpret, **more)
    check_attention(q, k_pages, v_pages, page_table, k_scale, v_scale, window, sinks)
    segments = page_table.shape[0]
    check_vector("row_starts", row_starts, segments + 1)
    check_vector("lengths", lengths, segments)
    first_page = check_first_page(first_page)
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    if backend == "mosaic":
        from kernels_pallas.prefill_attention_mosaic import prefill_attention_mosaic

        return prefill_attention_mosaic(
            q, k_pages, v_pages, page_table, row_starts, lengths, first_page=first_page, scale=scale, window=window,
            sinks=sinks, tuning=tuning or PREFILL[DEFAULT_GPU], sm_budget=sm_budget,
            expected_context=expected_context, interpret=interpret,
        )  # fmt: skip
    rows = q.shape[0]

    # Cut the segments into tiles of TILE_ROWS rows. tile_ends[s]: tiles of segments 0..s; a static number covers any
    # packing.
    tiles = rows // TILE_ROWS + segments
    counts = row_starts[1:] - row_starts[:-1]
    tile_ends = jnp.cumsum((counts + (TILE_ROWS - 1)) // TILE_ROWS)
    tile = jnp.arange(tiles, dtype=jnp.int32)
    segment = jnp.minimum(jnp.searchsorted(tile_ends, tile, side="right"), segments - 1)
    first_tile = jnp.where(segment > 0, tile_ends[segment - 1], 0)
    lane = jnp.arange(TILE_ROWS, dtype=jnp.int32)
    row = (row_starts[segment] + (tile - first_tile) * TILE_ROWS)[:, None] + lane[None, :]
    inside = row < row_starts[segment + 1][:, None]  # tiles past the last one start past their segment's end
    visible = jnp.where(inside, lengths[segment][:, None] - (row_starts[segment + 1][:, None] - row) + 1, 0)
    row = jnp.where(inside, row, rows)

    q_tiles = q.at[row].get(mode="fill", fill_value=0)  # [tiles, TILE_ROWS, Hq, d]
    tables = page_table[segment]
    out, lse = attend_paged(q_tiles, k_pages, v_pages, tables, visible, first_page, scale, k_scale, v_scale, window)
    out = with_sinks(out, lse, sinks)
    return jnp.zeros_like(q).at[row.reshape(-1)].set(out.reshape(-1, *q.shape[1:]), mode="drop")
