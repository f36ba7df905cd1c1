"""Granite 3, dense: LLaMA with constants that multiply embedding, scores and what blocks add, and divide the logits."""

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
    scaled,
    self_attention,
)
from nanoflow_jax.models.rope import read_rope


def read_config(read: Fields) -> ModelConfig:
    """Each multiplier that is absent is 1; attention_multiplier, too, which stands in place of head_dim ** -0.5."""
    full_attention_only(read)
    bias = read.take("attention_bias", bool, False)
    scale = read.number("attention_multiplier", 1.0)
    attention = Attention(read_rope(read), qkv_bias=bias, o_bias=bias, scale=scale)
    return read_decoder(
        read,
        "granite",
        (Layer(attention, Mlp(read.take("mlp_bias", bool, False))),),
        embedding_multiplier=read.number("embedding_multiplier", 1.0),
        residual_multiplier=read.number("residual_multiplier", 1.0),
        logits_divisor=read.number("logits_scaling", 1.0),
    )


def forward(config: ModelConfig, params: ModelParams, tokens: jax.Array) -> jax.Array:
    """tokens [n] of one sequence -> logits [n, vocabulary] float32. Whole weights, with O in either layout."""
    x = scaled(params.embedding[tokens], config.embedding_factor)
    eps, by = config.rms_norm_eps, config.residual_multiplier
    for kind, norms, layer in zip(config.layers, params.norms, params.layers, strict=True):
        attention = self_attention(*kqv_projection(rms_norm(x, norms[0], eps), layer), kind.attention)
        x = x + scaled(o_projection(attention, layer), by)
        x = x + scaled(linear(gated_mlp_up(rms_norm(x, norms[1], eps), layer), layer.down, layer.down_bias), by)
    head = params.embedding if params.head is None else params.head
    logits = contract(rms_norm(x, params.final_norm, eps), head, 1, out_dtype=jnp.float32)
    return logits[:, : config.vocab_size] / config.logits_divisor
