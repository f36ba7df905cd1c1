"""Seed-OSS: LLaMA with a bias of its own for O."""

from __future__ import annotations

from nanoflow_jax.config import Attention, Layer, Mlp, ModelConfig
from nanoflow_jax.models.fields import Fields, only, read_decoder
from nanoflow_jax.models.rope import read_rope


def read_config(read: Fields) -> ModelConfig:
    """Biases on queries, keys and values unless the file says otherwise."""
    read = read.with_defaults(num_key_value_heads=8, head_dim=128, max_position_embeddings=524288)
    only(read)
    attention = Attention(
        read_rope(read),
        qkv_bias=read.take("attention_bias", bool, True),
        o_bias=read.take("attention_out_bias", bool, False),
    )
    return read_decoder(read, "seed_oss", (Layer(attention, Mlp(read.take("mlp_bias", bool, False))),))
