"""The maths of a layer of experts: routing, rows sorted by expert, grouped GEMMs, and the weighted sum.

n rows, k experts of each; E experts on this device, the first of them `first`. A row has a place for each of its
experts here; places are sorted by expert, and an expert's begin at a multiple of `align`. There are R of them, enough
for any routing: what is computed in those that are empty is never read.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from kernels_pallas import combine_rows, gather_rows, grouped_gemm
from kernels_pallas.gate import Gate
from kernels_pallas.group_tiles import GROUP_ROWS
from nanoflow_jax.config import Mlp
from nanoflow_jax.models.layout import ExpertParams
from nanoflow_jax.models.parts import contract, linear

# Traced and lowered once per shape, as the kernels of `step.trace`.
_STATIC = ("backend", "tuning", "expected_rows")
_grouped_gemm = jax.jit(grouped_gemm, static_argnames=("gate", *_STATIC), inline=True)
_gather_rows = jax.jit(gather_rows, static_argnames=_STATIC, inline=True)
_combine_rows = jax.jit(combine_rows, static_argnames=_STATIC, inline=True)


@struct.dataclass
class Routing:
    """weights [n, k] float32 of the experts chosen [n, k] int32; shared [n] float32, of the shared expert, or None."""

    weights: jax.Array
    chosen: jax.Array
    shared: jax.Array | None


@struct.dataclass
class Places:
    """rows [R] int32: the row that a place holds, some row where it is empty; sizes [E] int32: places of each expert,
    with the empty ones at its end, and used [] of all; place [n, k] int32: where a row's choice is, -1: on another
    device; tiles: of the grouped GEMMs' kernel, which UG and D share, or None."""

    rows: jax.Array
    sizes: jax.Array
    used: jax.Array
    place: jax.Array
    tiles: jax.Array | None = None


def route(x: jax.Array, layer: ExpertParams, mlp: Mlp) -> Routing:
    """x [n, H], normed. Logits in x's dtype and the softmax in float32, as `transformers` has it; of equal ones the
    first."""
    assert mlp.experts is not None
    scores = jax.nn.softmax(linear(x, layer.router, layer.router_bias).astype(jnp.float32), axis=-1)
    weights, chosen = lax.top_k(scores, mlp.experts.per_token)
    if mlp.experts.normalized:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    shared = None
    if layer.shared_gate is not None:
        shared = jax.nn.sigmoid(contract(x, layer.shared_gate, 1).astype(jnp.float32))[:, 0]
    return Routing(weights, chosen, shared)


def most_places(rows: int, per_token: int, count: int, align: int = GROUP_ROWS) -> int:
    """R: of so many rows, whose choices are spread over `count` experts in any way."""
    return -(-(rows * min(per_token, count) + (align - 1) * min(count, rows * per_token)) // align) * align


def places(chosen: jax.Array, first: jax.Array | int, count: int, align: int = GROUP_ROWS) -> Places:
    """Of the experts [first, first + count)."""
    n, k = chosen.shape
    local = chosen.reshape(-1) - first
    here = (local >= 0) & (local < count)
    is_of = local[:, None] == jnp.arange(count)[None, :]  # [n k, E]
    ranks = jnp.cumsum(is_of, axis=0, dtype=jnp.int32)
    sizes = -(-ranks[-1] // align) * align
    starts = jnp.cumsum(sizes) - sizes
    place = jnp.sum(jnp.where(is_of, ranks - 1 + starts[None, :], 0), axis=1)
    total = most_places(n, k, count, align)
    rows = jnp.zeros((total,), jnp.int32)
    rows = rows.at[jnp.where(here, place, total)].set(jnp.arange(n * k, dtype=jnp.int32) // k, mode="drop")
    return Places(rows, sizes, starts[-1] + sizes[-1], jnp.where(here, place, -1).reshape(n, k))


def by_expert(x: jax.Array, at: Places, **kernel: Any) -> jax.Array:
    """[n, H] -> [R, H]; kernel: of `gather_rows`."""
    return _gather_rows(x, at.rows, at.used, **kernel)


def gate_of(mlp: Mlp) -> Gate:
    return Gate(mlp.alpha, mlp.limit, 1.0) if mlp.activation == "clamped_silu" else Gate()


def experts_up(x: jax.Array, at: Places, layer: ExpertParams, mlp: Mlp, **kernel: Any) -> jax.Array:
    """UG: x [R, H] by places -> activation(gate) * up, [R, f] of this device's f columns; kernel: of `grouped_gemm`."""
    return _grouped_gemm(x, layer.ug, at.sizes, bias=layer.ug_bias, gate=gate_of(mlp), tiles=at.tiles, **kernel)


def experts_down(
    x: jax.Array, at: Places, layer: ExpertParams, *, bias_here: jax.Array | bool = True, **kernel: Any
) -> jax.Array:
    """D: [R, f] -> partial sums [R, H]. bias_here: of the devices that an expert is split over, one adds its bias."""
    bias = layer.down_bias
    if bias is not None and bias_here is not True:
        bias = jnp.where(bias_here, bias, jnp.zeros((), bias.dtype))
    return _grouped_gemm(x, layer.down, at.sizes, bias=bias, tiles=at.tiles, **kernel)


def combine(out: jax.Array, at: Places, routing: Routing, shared: jax.Array | None, **kernel: Any) -> jax.Array:
    """[R, H] by places -> [n, H]: the weighted sum of each row's experts on this device, and of the shared one
    [n, H]; kernel: of `combine_rows`."""
    weight = None if shared is None else routing.shared
    return _combine_rows(out, at.place, routing.weights, shared=shared, shared_weight=weight, **kernel)
