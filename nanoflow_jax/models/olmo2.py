"""OLMo 2: LLaMA with norms of what blocks add in place of what they read, and of q's and k's whole projections."""

from __future__ import annotations

from nanoflow_jax.config import Attention, Layer, Mlp, ModelConfig
from nanoflow_jax.models.fields import Fields, only, read_decoder
from nanoflow_jax.models.rope import read_rope


def read_config(read: Fields) -> ModelConfig:
    read = read.with_defaults(rms_norm_eps=1e-5)
    only(read)
    bias = read.take("attention_bias", bool, False)
    attention = Attention(read_rope(read), qkv_bias=bias, o_bias=bias, qk_norm="projection")
    return read_decoder(read, "olmo2", (Layer(attention, Mlp()),), norms="after")
