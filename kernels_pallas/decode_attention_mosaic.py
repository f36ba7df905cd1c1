"""Decode attention for Hopper (sm_90a) with Mosaic GPU: wgmma tiles over pages that TMA streams in.

One program per SM, two warpgroups: one issues the copies, one computes, so copies run ahead across rows. A program
walks, with a stride, over work items (row, KV head, split): a contiguous range of the row's pages and the query heads
of one KV head. With a window, a row's pages are those that the window touches: no others are read, and splits are cut
over these. The first of them may begin before the window, which costs a second comparison in the mask.

GQA has too few query heads for wgmma's M of 64, so the 64 tokens of a page are M and the heads are N (8 or 16, padded):
S^T[tokens, heads] = K Q^T, then O^T[d, heads] = V^T P^T. The softmax runs down the columns, online, in float32. A step
takes one page or two: most of a step is latency (two wgmma, a maximum across warps), nearly the same for either.

There is one computing warpgroup because Mosaic's reductions across warps share one scratch buffer between warpgroups.

Pages of float8_e4m3fn: wgmma multiplies fp8 by fp8 alone, and transposes operands of 16 bits alone.
- K stays as it is, and a query is the sum of two fp8 terms (`decode_plan.two_terms`), as good as bfloat16. Both are
  columns of one product. Upcasting K in registers would cost more instructions, and the interpreter cannot run it.
- A third warpgroup makes the terms, and upcasts V, through registers into float16 tiles that wgmma reads transposed,
  which costs no accuracy. V transposed in the pages would spare the tiles, but every append would write single bytes a
  page apart.
- The weights are float16, and the scales are factors of an item's scores and of its result.

Query heads that divide 8 or 16 are read as the caller has them, an item's with its neighbours', which become columns
that are not written. So no kernel pads or cuts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.checks import PAGE_SIZE
from kernels_pallas.decode_body_mosaic import decode_body
from kernels_pallas.decode_combine_mosaic import combine
from kernels_pallas.decode_plan import Q_SLOTS, UPCAST_SLOTS, Plan, check_mosaic, cut_blocks, expected_us, make_plan
from kernels_pallas.expected import scheduled_as
from kernels_pallas.mosaic_parts import tiled
from kernels_pallas.tuning import DecodeTuning


def _call(plan: Plan, dtype: Any, interpret: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`dtype`: of the pages."""
    heads, d, tokens, stages = plan.heads, plan.head_dim, plan.tokens, plan.stages
    tile = plan.tile
    scratch = {
        "k_s": tiled((stages, tokens, d), dtype),
        "v_s": tiled((stages, tokens, d), dtype),
        "q_s": tiled((Q_SLOTS, plan.terms * heads, d), dtype),
        "p_s": tiled((heads, tokens), plan.dtype),
        # Tiled where tiles leave whole; else the heads of an item are cut out.
        "out_s": (tiled if plan.splits == 1 and plan.whole else plgpu.SMEM)(tile.shape, tile.dtype),
        "lse_s": plgpu.SMEM((heads,), jnp.float32),
        **{name: plgpu.Barrier(num_barriers=stages, num_arrivals=plan.step_pages) for name in ("k_full", "v_full")},
        **{name: plgpu.Barrier(num_barriers=stages) for name in ("k_free", "v_free")},
        **{name: plgpu.Barrier(num_barriers=Q_SLOTS) for name in ("q_full", "q_free")},
    }
    if plan.fp8:
        scratch |= {
            "raw_s": plgpu.SMEM((Q_SLOTS, heads, d), jnp.bfloat16),
            "unit_s": plgpu.SMEM((Q_SLOTS, heads), jnp.float32),
            **{name: plgpu.Barrier(num_barriers=Q_SLOTS) for name in ("terms_full", "terms_free")},
            "wide_s": tiled((UPCAST_SLOTS, tokens, d), plan.dtype),
            **{name: plgpu.Barrier(num_barriers=UPCAST_SLOTS) for name in ("wide_full", "wide_free")},
        }
    return plgpu.kernel(
        decode_body(plan, interpret is not None),
        out_type=(
            jax.ShapeDtypeStruct(
                (plan.rows * plan.kv_heads * plan.repeats, d) if plan.splits == 1 else (plan.items, *tile.shape),
                tile.dtype,
            ),
            jax.ShapeDtypeStruct((plan.items, heads), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=3 if plan.fp8 else 2,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="decode_attention",
    )


def decode_attention_mosaic(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array, lengths: jax.Array, *,
    first_page: jax.Array, scale: float, k_scale: jax.Array | None, v_scale: jax.Array | None,
    window: int | None = None, tuning: DecodeTuning, sm_budget: int | None = None,
    expected_context: int | None = None, interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """As `kernels_pallas.decode_attention`, which describes the arguments and has checked their shapes."""
    check_mosaic(q, k_pages, v_pages, page_table, lengths, sm_budget)
    rows, q_heads, d = q.shape
    plan = make_plan(q, k_pages, page_table, scale, tuning, sm_budget, window)
    repeats, q = q_heads // plan.kv_heads, cut_blocks(plan, q)
    # Together, by a kernel of XLA's: a part of an array of the caller's need not be aligned as Mosaic's calls ask for.
    scales = () if k_scale is None or v_scale is None else (jnp.stack((k_scale, v_scale)),)
    # One index for page and head: with the tiling, a TMA descriptor has no dimension left for two.
    k_pages, v_pages = (x.reshape(-1, PAGE_SIZE, d) for x in (k_pages, v_pages))
    call = _call(plan, k_pages.dtype, interpret)
    context = plan.row_pages * PAGE_SIZE if expected_context is None else expected_context
    with scheduled_as(expected_us(plan, context, tuning)):
        out, lse = call(q, k_pages, v_pages, page_table, lengths, first_page[None], *scales)
    if plan.splits > 1:
        out, lse = combine(plan, out, lse, lengths, tuning=tuning, interpret=interpret)
    out, lse = out.reshape(rows, plan.kv_heads, -1, d), plan.lse_of_heads(lse).reshape(rows, plan.kv_heads, -1)
    return out[:, :, :repeats].reshape(rows, q_heads, d), lse[:, :, :repeats].reshape(rows, q_heads)
