"""LLaMA 2 / 3 / 3.1 / 3.2 / 3.3, and what is the same by another name."""

from __future__ import annotations

from nanoflow_jax.config import Attention, Layer, Mlp, ModelConfig
from nanoflow_jax.models.fields import Fields, only, read_decoder
from nanoflow_jax.models.rope import read_rope


def read_config(read: Fields) -> ModelConfig:
    only(read)
    bias = read.take("attention_bias", bool, False)
    attention = Attention(read_rope(read), qkv_bias=bias, o_bias=bias)
    return read_decoder(read, "llama", (Layer(attention, Mlp(read.take("mlp_bias", bool, False))),))
