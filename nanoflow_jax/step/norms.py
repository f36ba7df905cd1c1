"""Norms of a step beyond those ahead of a block: of queries and keys, and of what a block adds to the residual."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from nanoflow_jax.config import ModelConfig
from nanoflow_jax.models.layout import kv_groups
from nanoflow_jax.models.parts import rms_norm, split_kqv, weighted


def norm_queries_and_keys(
    fused: jax.Array,
    weights: jax.Array,
    config: ModelConfig,
    devices: int,
    all_reduce: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """fused [n, g, r + 2, d] of this device -> q [n, g, r, d] and k [n, g, d], normed as `config.qk_norm` says, and v;
    `weights` are the layer's.

    The squares of all heads are summed at once, in one kernel. A norm of whole projections needs the sums of all
    devices: [n, 2] float32 in one all-reduce, which is part of KQV: no plan places it, and nothing hides it.
    """
    q, k, v = split_kqv(fused)
    wide = fused.astype(jnp.float32)
    squares = jnp.sum(wide * wide, axis=-1)
    if config.qk_norm == "head":
        factors = lax.rsqrt(squares / config.head_dim + config.rms_norm_eps)
        of_q, of_k = factors[:, :, :-2], factors[:, :, -2]
        q_weight, k_weight = weights[0][None, None, None], weights[1][None, None]
    else:
        copies = kv_groups(config, devices) // config.num_kv_heads  # of a KV head, each of which is summed
        both = jnp.stack([squares[:, :, :-2].sum(axis=(1, 2)), squares[:, :, -2].sum(axis=1) / copies], axis=1)
        sizes = config.head_dim * jnp.array([[config.num_heads, config.num_kv_heads]], jnp.float32)
        factors = lax.rsqrt(all_reduce(both) / sizes + config.rms_norm_eps)
        of_q, of_k = factors[:, 0, None, None], factors[:, 1, None]
        q_weight, k_weight = weights[None, :, :-1], weights[None, :, -1]

    def normed(x: jax.Array, factor: jax.Array, weight: jax.Array) -> jax.Array:
        return weighted(x.astype(jnp.float32) * factor[..., None], weight, x.dtype)

    return normed(q, of_q, q_weight), normed(k, of_k, k_weight), v


def add_normed(x: jax.Array, update: jax.Array, bias: jax.Array | None, *, weight: jax.Array, eps: float) -> jax.Array:
    """Residual [n, H] + the norm of: update [n, H], or gathered columns [p, n, H/p], + bias [H]."""
    update = whole_rows(update)
    return x + rms_norm(update if bias is None else update + bias[None, :], weight, eps)


def whole_rows(update: jax.Array) -> jax.Array:
    """[n, H] as it is; gathered columns [p, n, H/p] -> [n, H]."""
    return update if update.ndim == 2 else update.transpose(1, 0, 2).reshape(update.shape[1], -1)
