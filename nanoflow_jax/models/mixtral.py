"""Mixtral 8x7B and 8x22B: Mistral with eight experts in the place of each MLP, of which a token takes two."""

from __future__ import annotations

from nanoflow_jax.config import Attention, Experts, Layer, Mlp, ModelConfig
from nanoflow_jax.models.fields import FULL, SLIDING, Fields, only, read_decoder, read_experts, read_window
from nanoflow_jax.models.rope import read_rope


def read_config(read: Fields) -> ModelConfig:
    """`intermediate_size` is that of an expert."""
    read = read.with_defaults(
        num_key_value_heads=8, max_position_embeddings=131072, num_local_experts=8, num_experts_per_tok=2,
        rope_theta=1e6,
    )  # fmt: skip
    window = read_window(read)
    only(read, FULL if window is None else SLIDING)
    count, per_token = read_experts(read, "num_local_experts")
    mlp = Mlp(experts=Experts(count, per_token, read.positive("intermediate_size")))
    return read_decoder(read, "mixtral", (Layer(Attention(read_rope(read), window=window), mlp),))
