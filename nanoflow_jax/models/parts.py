"""The maths of a layer, on whole weights or on a device's shards of them: norm, GEMMs, KQV, gated MLP, rotary
embedding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nanoflow_jax.config import Attention, Mlp, RopeConfig
from nanoflow_jax.models.layout import LayerParams
from nanoflow_jax.models.quantised import Input, Quantised, QuantisedRows, Weight, contract_fp8
from nanoflow_jax.models.rope import rope_frequencies


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., H], weight [H] -> [..., H] in x's dtype; statistics in float32, as Hugging Face does."""
    x32 = x.astype(jnp.float32)
    normed = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return weighted(normed, jnp.expand_dims(weight, tuple(range(x.ndim - 1))), x.dtype)


def weighted(normed: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    """What was normed in float32 times the norm's weight: rounded to `dtype` first, or last where the weight itself is
    of float32."""
    if weight.dtype == jnp.float32:
        return (normed * weight).astype(dtype)
    return normed.astype(dtype) * weight


def contract(x: Input, weight: Weight, axis: int, out_dtype: Any = None) -> jax.Array:
    """GEMM of x [n, K] (axis 1) or [K, n] (axis 0) with weight [..., K] -> [n, N], N all its leading dimensions.
    float32 is computed in full precision everywhere; a quantised weight in fp8, for which x may be quantised already
    (axis 1)."""
    if isinstance(weight, Quantised):
        return contract_fp8(x, weight, axis, out_dtype or x.dtype)
    if isinstance(x, QuantisedRows):
        raise TypeError("x: quantised rows are multiplied with a quantised weight")
    weight = weight.reshape(-1, weight.shape[-1])
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x, weight, (((axis,), (1,)), ((), ())), precision=precision, preferred_element_type=out_dtype or x.dtype
    )


def scaled(x: jax.Array, multiplier: float) -> jax.Array:
    """x times a constant that is not rounded to x's dtype first."""
    return x if multiplier == 1.0 else (x.astype(jnp.float32) * multiplier).astype(x.dtype)


def linear(x: Input, weight: Weight, bias: jax.Array | None) -> jax.Array:
    """x [n, K], weight [..., K], bias [...] or None -> [n, N]."""
    out = contract(x, weight, 1)
    return out if bias is None else out + bias.reshape(1, -1)


def fused_kqv(x: Input, layer: LayerParams) -> jax.Array:
    """x [n, H] -> [n, g, r + 2, d]."""
    return linear(x, layer.kqv, layer.kqv_bias).reshape(-1, *layer.kqv.shape[:-1])


def split_kqv(fused: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return fused[:, :, :-2], fused[:, :, -2], fused[:, :, -1]


def gated_mlp_up(x: Input, layer: LayerParams, mlp: Mlp = Mlp()) -> jax.Array:  # noqa: B008
    """UG: x [n, H] -> activation(gate) * up, [n, f] of this device's f columns; see `Mlp`."""
    f = layer.ug.shape[1]
    both = linear(x, layer.ug, layer.ug_bias)
    return gated(both[:, :f], both[:, f:], mlp)


def gated(gate: jax.Array, up: jax.Array, mlp: Mlp) -> jax.Array:
    """activation(gate) * up, as `Mlp` has it."""
    if mlp.activation == "silu":
        return jax.nn.silu(gate) * up
    if mlp.activation == "gelu_tanh":
        return jax.nn.gelu(gate.astype(jnp.float32), approximate=True).astype(gate.dtype) * up
    gate, up = jnp.minimum(gate, mlp.limit), jnp.clip(up, -mlp.limit, mlp.limit)
    return gate * jax.nn.sigmoid(mlp.alpha * gate) * (up + 1)


def rope_tables(rope: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos, sin [n, head_dim / 2] float32 for positions [n]."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(rope_frequencies(rope, head_dim))[None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if rope.attention_factor == 1.0 else (cos * rope.attention_factor, sin * rope.attention_factor)


def query_tables(
    attention: Attention, cos: jax.Array, sin: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The tables [n, head_dim / 2] that turn queries and make them grow with their position."""
    if not attention.query_growth:
        return cos, sin
    turns = (positions // attention.rope.original_max_position_embeddings).astype(jnp.float32)
    growth = 1 + attention.query_growth * jnp.log1p(turns)[:, None]
    return cos * growth, sin * growth


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns pairs (i, i + d/2) of x [n, ..., d] by tables [n, d/2]; computed in float32, returned in x's dtype."""
    half = x.shape[-1] // 2
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (half,)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
