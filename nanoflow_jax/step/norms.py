"""Norms of a step beyond those ahead of a block: of queries and keys, and of what a block adds to the residual."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from nanoflow_jax.config import ModelConfig
from nanoflow_jax.models.layout import kv_groups
from nanoflow_jax.models.parts import rms_norm


def norm_queries_and_keys(
    q: jax.Array,
    k: jax.Array,
    weights: jax.Array,
    config: ModelConfig,
    devices: int,
    all_reduce: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """q [n, g, r, d] and k [n, g, d] of this device, normed as `config.qk_norm` says; `weights` are the layer's.

    A norm of whole projections needs the sums of squares of all devices: [n, 2] float32 in one all-reduce.
    """
    eps = config.rms_norm_eps
    if config.qk_norm == "head":
        return rms_norm(q, weights[0], eps), rms_norm(k, weights[1], eps)
    q32, k32 = q.astype(jnp.float32), k.astype(jnp.float32)
    copies = kv_groups(config, devices) // config.num_kv_heads  # of a KV head, each of which is summed
    squares = jnp.stack([jnp.sum(q32 * q32, axis=(1, 2, 3)), jnp.sum(k32 * k32, axis=(1, 2)) / copies], axis=1)
    sizes = jnp.array([[config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim]], jnp.float32)
    factors = lax.rsqrt(all_reduce(squares) / sizes + eps)
    q = (q32 * factors[:, 0, None, None, None]).astype(q.dtype) * weights[None, :, :-1]
    return q, (k32 * factors[:, 1, None, None]).astype(k.dtype) * weights[None, :, -1]


def add_normed(x: jax.Array, update: jax.Array, bias: jax.Array | None, *, weight: jax.Array, eps: float) -> jax.Array:
    """Residual [n, H] + the norm of: update [n, H], or gathered columns [p, n, H/p], + bias [H]."""
    update = whole_rows(update)
    return x + rms_norm(update if bias is None else update + bias[None, :], weight, eps)


def whole_rows(update: jax.Array) -> jax.Array:
    """[n, H] as it is; gathered columns [p, n, H/p] -> [n, H]."""
    return update if update.ndim == 2 else update.transpose(1, 0, 2).reshape(update.shape[1], -1)
