"""LLaMA 2 / 3 / 3.1 / 3.2 / 3.3, and what is the same by another name."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nanoflow_jax.config import Attention, Layer, Mlp, ModelConfig
from nanoflow_jax.models.fields import Fields, full_attention_only, read_decoder
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
from nanoflow_jax.models.rope import read_rope


def read_config(read: Fields) -> ModelConfig:
    full_attention_only(read)
    bias = read.take("attention_bias", bool, False)
    attention = Attention(read_rope(read), qkv_bias=bias, o_bias=bias)
    return read_decoder(read, "llama", (Layer(attention, Mlp(read.take("mlp_bias", bool, False))),))


def forward(config: ModelConfig, params: ModelParams, tokens: jax.Array) -> jax.Array:
    """tokens [n] of one sequence -> logits [n, vocabulary] float32. Whole weights, with O in either layout."""
    x, eps = params.embedding[tokens], config.rms_norm_eps
    for kind, norms, layer in zip(config.layers, params.norms, params.layers, strict=True):
        attention = self_attention(*kqv_projection(rms_norm(x, norms[0], eps), layer), kind.attention)
        x = x + o_projection(attention, layer)
        x = x + linear(gated_mlp_up(rms_norm(x, norms[1], eps), layer), layer.down, layer.down_bias)
    head = params.embedding if params.head is None else params.head
    return contract(rms_norm(x, params.final_norm, eps), head, 1, out_dtype=jnp.float32)[:, : config.vocab_size]
