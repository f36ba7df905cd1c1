"""The language model's head on vocabulary shards."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nanoflow_jax.config import ModelConfig
from nanoflow_jax.models import parts
from nanoflow_jax.models.layout import ModelParams
from nanoflow_jax.parallel import collectives


def head_logits(config: ModelConfig, params: ModelParams, hidden: jax.Array) -> jax.Array:
    """hidden [n, H] -> this device's logits [n, V/p] float32, padding -inf."""
    head = params.embedding if params.head is None else params.head
    normed = parts.rms_norm(hidden, params.final_norm, config.rms_norm_eps)
    local = parts.scaled(parts.contract(normed, head, 1, out_dtype=jnp.float32), 1 / config.logits_divisor)
    first = first_token(local)
    return jnp.where((first + jnp.arange(head.shape[0])) < config.vocab_size, local, -jnp.inf)


def first_token(logits: jax.Array) -> jax.Array:
    """Vocabulary index, int32, of the first column of this device's logits [n, V/p]."""
    return collectives.device_index() * logits.shape[1]
