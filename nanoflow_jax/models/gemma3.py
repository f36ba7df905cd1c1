"""Gemma 3, its text model: norms ahead of blocks and after them, and of each head of q and k, all with 1 + w; GELU;
a sliding window in five of six layers, with a rotary embedding of its own; an embedding that is scaled."""

from __future__ import annotations

from nanoflow_jax.config import Attention, ConfigError, Layer, Mlp, ModelConfig
from nanoflow_jax.models.fields import FULL, SLIDING, Fields, read_decoder, read_kinds, read_window
from nanoflow_jax.models.rope import read_ropes

GELU = "gelu_pytorch_tanh"


def read_config(read: Fields) -> ModelConfig:
    """Published files rely on the defaults."""
    read = read.with_defaults(
        vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, max_position_embeddings=131072, sliding_window=4096, bos_token_id=2,
        eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    activation = read.take("hidden_activation", str, GELU)
    if activation != GELU:
        raise ConfigError(f"hidden_activation: {activation!r} is not supported; accepted: {GELU!r}")
    bias, window = read.take("attention_bias", bool, False), read_window(read)
    scale = read.number("query_pre_attn_scalar", 256) ** -0.5
    ropes = read_ropes(read, 1e6, 1e4, "rope_local_base_freq")
    every = read.positive("sliding_window_pattern", 6)

    def layer(kind: str, window: int | None) -> Layer:
        attention = Attention(ropes[kind], bias, bias, scale=scale, window=window, qk_norm="head")
        return Layer(attention, Mlp(activation="gelu_tanh"))

    pattern = read_kinds(read, lambda i: SLIDING if (i + 1) % every else FULL, window, layer)
    return read_decoder(read, "gemma3_text", pattern, embedding_multiplier="sqrt", norms="both", norm_offset=1.0)
