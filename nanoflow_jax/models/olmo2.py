"""OLMo 2: LLaMA with norms of what blocks add in place of what they read, and of q's and k's whole projections."""

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
    read = read.with_defaults(rms_norm_eps=1e-5)
    full_attention_only(read)
    bias = read.take("attention_bias", bool, False)
    attention = Attention(read_rope(read), qkv_bias=bias, o_bias=bias, qk_norm="projection")
    return read_decoder(read, "olmo2", (Layer(attention, Mlp()),), norms="after")


def forward(config: ModelConfig, params: ModelParams, tokens: jax.Array) -> jax.Array:
    """tokens [n] of one sequence -> logits [n, vocabulary] float32. Whole weights, with O in either layout;
    on one device, so that no KV head is there twice."""
    n, x, eps = tokens.size, params.embedding[tokens], config.rms_norm_eps
    for kind, norms, qk_norm, layer in zip(config.layers, params.norms, params.qk_norms, params.layers, strict=True):
        q, k, v = kqv_projection(x, layer)
        q = rms_norm(q.reshape(n, -1), qk_norm[:, :-1].reshape(-1), eps).reshape(q.shape)
        k = rms_norm(k.reshape(n, -1), qk_norm[:, -1].reshape(-1), eps).reshape(k.shape)
        x = x + rms_norm(o_projection(self_attention(q, k, v, kind.attention), layer), norms[0], eps)
        x = x + rms_norm(linear(gated_mlp_up(x, layer), layer.down, layer.down_bias), norms[1], eps)
    head = params.embedding if params.head is None else params.head
    return contract(rms_norm(x, params.final_norm, eps), head, 1, out_dtype=jnp.float32)[:, : config.vocab_size]
