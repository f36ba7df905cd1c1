"""The maths of a layer of experts: routing, rows sorted by expert, grouped GEMMs, and the weighted sum.

n rows, k experts of each; E experts on this device, the first of them `first`; R = n * min(k, E) places, enough for any
routing. A place holds a row of one of its experts; places are sorted by expert, and those behind the last are empty:
what is computed there is never read.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from nanoflow_jax.config import Mlp
from nanoflow_jax.models.layout import ExpertParams, LayerParams
from nanoflow_jax.models.parts import contract, gated, gated_mlp_up, linear

# ([R, K], [E, K, N], sizes [E] int32) -> [R, N]: rows of expert e, which come after those of e - 1, times its weight.
type GroupedGemm = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@struct.dataclass
class Routing:
    """weights [n, k] float32 of the experts chosen [n, k] int32; shared [n] float32, of the shared expert, or None."""

    weights: jax.Array
    chosen: jax.Array
    shared: jax.Array | None


@struct.dataclass
class Places:
    """rows [R] int32: the row that a place holds; sizes [E] int32: rows of each expert; place [n, k] int32: where a
    row's choice is, and here [n, k]: whether it is on this device."""

    rows: jax.Array
    sizes: jax.Array
    place: jax.Array
    here: jax.Array


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


def places(chosen: jax.Array, first: jax.Array | int, count: int) -> Places:
    """Of the experts [first, first + count)."""
    n, k = chosen.shape
    local = chosen.reshape(-1) - first
    here = (local >= 0) & (local < count)
    group = jnp.where(here, local, count)
    sizes = jnp.sum(group[:, None] == jnp.arange(count)[None, :], axis=0, dtype=jnp.int32)
    choice = jnp.arange(n * k, dtype=jnp.int32)
    _, order = lax.sort((group, choice), num_keys=1, is_stable=True)
    place = jnp.zeros_like(choice).at[order].set(choice, unique_indices=True)
    return Places(order[: n * min(k, count)] // k, sizes, place.reshape(n, k), here.reshape(n, k))


def experts_up(x: jax.Array, at: Places, layer: ExpertParams, mlp: Mlp, grouped: GroupedGemm) -> jax.Array:
    """UG: x [R, H] by places -> activation(gate) * up, [R, f] of this device's f columns."""
    count, hidden, _, f = layer.ug.shape
    both = grouped(x, layer.ug.reshape(count, hidden, 2 * f), at.sizes)
    if layer.ug_bias is not None:
        both = both + _by_place(layer.ug_bias.reshape(count, 2 * f), at)
    return gated(both[:, :f], both[:, f:], mlp)


def experts_down(
    x: jax.Array, at: Places, layer: ExpertParams, grouped: GroupedGemm, *, bias_here: jax.Array | bool = True
) -> jax.Array:
    """D: [R, f] -> partial sums [R, H]. bias_here: of the devices that an expert is split over, one adds its bias."""
    out = grouped(x, layer.down, at.sizes)
    return out if layer.down_bias is None else out + jnp.where(bias_here, _by_place(layer.down_bias, at), 0)


def _by_place(bias: jax.Array, at: Places) -> jax.Array:
    """[E, N] -> [R, N]."""
    ends = jnp.cumsum(at.sizes)
    expert = jnp.sum(jnp.arange(at.rows.shape[0])[:, None] >= ends[None, :], axis=1)
    return bias[jnp.minimum(expert, bias.shape[0] - 1)]


def combine(out: jax.Array, at: Places, routing: Routing, shared: jax.Array | None) -> jax.Array:
    """[R, H] by places -> [n, H]: the weighted sum of each row's experts on this device, and of the shared one
    [n, H]."""
    total = jnp.zeros((at.place.shape[0], out.shape[1]), jnp.float32)
    for choice in range(at.place.shape[1]):
        here, weight = at.here[:, choice, None], routing.weights[:, choice, None]
        rows = out[jnp.where(at.here[:, choice], at.place[:, choice], 0)].astype(jnp.float32)
        total += jnp.where(here, weight * rows, 0)
    if shared is not None and routing.shared is not None:
        total += routing.shared[:, None] * shared.astype(jnp.float32)
    return total.astype(out.dtype)


def ragged_dot(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """XLA's grouped GEMM; on a CPU it multiplies every row with every expert's weight."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.ragged_dot(x, weight, sizes, precision=precision, preferred_element_type=x.dtype)


def plain_experts(x: jax.Array, layer: LayerParams, mlp: Mlp) -> jax.Array:
    """What a layer of experts computes, x [n, H] normed -> [n, H], of whole weights: every expert on every row."""
    experts, routing = layer.experts, route(x, layer.experts, mlp)
    total = jnp.zeros(x.shape, jnp.float32)
    for e in range(experts.router.shape[0]):
        weight = jnp.sum(jnp.where(routing.chosen == e, routing.weights, 0), axis=1)[:, None]
        biases = [None if bias is None else bias[e] for bias in (experts.ug_bias, experts.down_bias)]
        both = linear(x, experts.ug[e].transpose(1, 2, 0), biases[0])
        inner = gated(both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :], mlp)
        total += weight * linear(inner, experts.down[e].T, biases[1]).astype(jnp.float32)
    if routing.shared is not None:
        every = contract(gated_mlp_up(x, layer, mlp.activation), layer.down, 1)
        total += routing.shared[:, None] * every.astype(jnp.float32)
    return total.astype(x.dtype)
