"""Qwen 3, dense: LLaMA with queries and keys normed, each head by itself, ahead of the rotary embedding."""

from __future__ import annotations

from nanoflow_jax.config import Attention, Layer, Mlp, ModelConfig
from nanoflow_jax.models.fields import Fields, read_decoder
from nanoflow_jax.models.qwen2 import read_windows
from nanoflow_jax.models.rope import read_rope


def read_config(read: Fields) -> ModelConfig:
    read = read.with_defaults(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768, sliding_window=4096)
    rope, bias = read_rope(read), read.take("attention_bias", bool, False)
    layers = (Layer(Attention(rope, bias, bias, window=at, qk_norm="head"), Mlp()) for at in read_windows(read))
    return read_decoder(read, "qwen3", tuple(layers))
