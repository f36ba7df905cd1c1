"""Qwen 3, dense: LLaMA with queries and keys normed, each head by itself, ahead of the rotary embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nanoflow_jax.config import Attention, Layer, Mlp, ModelConfig
from nanoflow_jax.models.fields import Fields, read_decoder
from nanoflow_jax.models.layout import ModelParams
from nanoflow_jax.models.parts import (
    contract,
    gated_mlp_up,
    kqv_projection,
    linear,
    o_projection,
    rms_norm,
    self_attention,
)
from nanoflow_jax.models.qwen2 import read_windows
from nanoflow_jax.models.rope import read_rope


def read_config(read: Fields) -> ModelConfig:
    read = read.with_defaults(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768, sliding_window=4096)
    rope, bias = read_rope(read), read.take("attention_bias", bool, False)
    return read_decoder(
        read,
        "qwen3",
        tuple(
            Layer(Attention(rope, qkv_bias=bias, o_bias=bias, window=window, qk_norm="head"), Mlp())
            for window in read_windows(read)
        ),
    )


def forward(config: ModelConfig, params: ModelParams, tokens: jax.Array) -> jax.Array:
    """tokens [n] of one sequence -> logits [n, vocabulary] float32. Whole weights, with O in either layout."""
    x, eps = params.embedding[tokens], config.rms_norm_eps
    for kind, norms, (q_norm, k_norm), layer in zip(
        config.layers, params.norms, params.qk_norms, params.layers, strict=True
    ):
        q, k, v = kqv_projection(rms_norm(x, norms[0], eps), layer)
        attention = self_attention(rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps), v, kind.attention)
        x = x + o_projection(attention, layer)
        x = x + linear(gated_mlp_up(rms_norm(x, norms[1], eps), layer), layer.down, layer.down_bias)
    head = params.embedding if params.head is None else params.head
    return contract(rms_norm(x, params.final_norm, eps), head, 1, out_dtype=jnp.float32)[:, : config.vocab_size]
