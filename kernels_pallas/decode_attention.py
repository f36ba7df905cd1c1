"""Decode attention (the paper's GEMV): one query token per row over its request's paged context."""

from __future__ import annotations

import jax

from kernels_pallas.checks import check_backend, check_paged, check_vector, default_scale
from kernels_pallas.paged_xla import attend_paged


def decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float | None = None,
    backend: str = "xla",
) -> tuple[jax.Array, jax.Array]:
    """Attention of one new token per row, whose K and V are already in the pages.

    q           [R, Hq, d]
    k_pages     [N, Hkv, page_size, d], v_pages alike
    page_table  [R, M] int32, entries in [0, N)
    lengths     [R] int32: tokens of context, the new one included; 0 marks an empty row
    scale       multiplies the scores; 1 / sqrt(d) by default

    Returns out [R, Hq, d] in q's dtype and the log-sum-exp [R, Hq] in float32. Empty rows give 0 and -inf.
    Raises ValueError naming the argument that does not fit.
    """
    check_backend(backend)
    check_paged(q, k_pages, v_pages, page_table)
    check_vector("lengths", lengths, q.shape[0])
    if page_table.shape[0] != q.shape[0]:
        raise ValueError(f"page_table: {page_table.shape[0]} rows must equal q's {q.shape[0]}")
    scale = default_scale(q.shape[2]) if scale is None else scale
    out, lse = attend_paged(q[:, None], k_pages, v_pages, page_table, lengths[:, None], scale)
    return out[:, 0], lse[:, 0]
