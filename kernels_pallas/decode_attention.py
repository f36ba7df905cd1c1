"""Decode attention (the paper's GEMV): one query token per row over its request's paged context."""

from __future__ import annotations

import math
from typing import Any

import jax

from kernels_pallas.checks import check_attention, check_backend, check_first_page, check_vector
from kernels_pallas.paged_xla import attend_paged, with_sinks
from kernels_pallas.tuning import DECODE, DEFAULT_GPU, DecodeTuning


def decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    first_page: jax.Array | None = None,
    scale: float | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    window: int | None = None,
    sinks: jax.Array | None = None,
    backend: str = "xla",
    tuning: DecodeTuning | None = None,
    sm_budget: int | None = None,
    expected_context: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one new token per row, whose K and V are already in the pages.

    q           [R, Hq, d]
    k_pages     [N, Hkv, page_size, d], v_pages alike
    page_table  [R, M] int32; entries, with first_page, in [0, N)
    lengths     [R] int32: tokens of context, the new one included; 0 marks an empty row
    first_page  [] int32: added to every entry of the table, where one pool holds the pages of many layers; 0 by default
    scale       multiplies the scores; 1 / sqrt(d) by default
    k_scale     [Hkv] float32, with pages of float8_e4m3fn alone: K is k_pages times this; v_scale alike
    window      tokens that a row sees, its own included (a sliding window): [lengths[r] - window, lengths[r]); None is
                all. Pages wholly below may hold anything, and their entries may be any in [0, N)
    sinks       [Hq] float32: a logit of each query head beside its scores, which takes its share of the softmax and
                gives nothing (gpt-oss); None: none
    backend     "xla" everywhere; "mosaic" on Hopper: q of bf16, pages of bf16 or fp8, page size 64, head size 64 or
                128, at most 16 query heads per KV head (`kernels_pallas.targets` says which GPU has it)

    Of backend "mosaic" alone:
    tuning      one of `kernels_pallas.tuning.DECODE`; the H200's by default
    sm_budget   how many SMs it may use, to leave the others to a GEMM
    expected_context
                tokens of context of a row, for the time that XLA's scheduler is told; by default the table's width
    interpret   `pallas_call`'s interpreter, for tests without a GPU

    Returns out [R, Hq, d] in q's dtype and the log-sum-exp [R, Hq] of the scores alone in float32. Empty rows give 0
    and -inf. Raises ValueError naming the argument that does not fit.
    """
    more = {"tuning": tuning, "sm_budget": sm_budget, "expected_context": expected_context}
    check_backend("decode_attention", backend, interpret, **more)
    check_attention(q, k_pages, v_pages, page_table, k_scale, v_scale, window, sinks)
    check_vector("lengths", lengths, q.shape[0])
    first_page = check_first_page(first_page)
    if page_table.shape[0] != q.shape[0]:
        raise ValueError(f"page_table: {page_table.shape[0]} rows must equal q's {q.shape[0]}")
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    if backend == "mosaic":
        from kernels_pallas.decode_attention_mosaic import decode_attention_mosaic

        out, lse = decode_attention_mosaic(
            q, k_pages, v_pages, page_table, lengths, first_page=first_page, scale=scale, k_scale=k_scale,
            v_scale=v_scale, window=window, tuning=tuning or DECODE[DEFAULT_GPU], sm_budget=sm_budget,
            expected_context=expected_context, interpret=interpret,
        )  # fmt: skip
        return with_sinks(out, lse, sinks), lse
    visible = lengths[:, None]
    out, lse = attend_paged(
        q[:, None], k_pages, v_pages, page_table, visible, first_page, scale, k_scale, v_scale, window
    )
    return with_sinks(out[:, 0], lse[:, 0], sinks), lse[:, 0]
