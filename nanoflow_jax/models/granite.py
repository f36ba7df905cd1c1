"""Granite 3, dense: LLaMA with constants that multiply embedding, scores and what blocks add, and divide the logits."""

from __future__ import annotations

from nanoflow_jax.config import Attention, Layer, Mlp, ModelConfig
from nanoflow_jax.models.fields import Fields, only, read_decoder
from nanoflow_jax.models.rope import read_rope


def read_config(read: Fields) -> ModelConfig:
    """Each multiplier that is absent is 1; attention_multiplier, too, which stands in place of head_dim ** -0.5."""
    only(read)
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
