"""Mistral 7B, NeMo, Small and Large: LLaMA without biases, and in the first of them with a sliding window."""

from __future__ import annotations

from nanoflow_jax.config import Attention, Layer, Mlp, ModelConfig
from nanoflow_jax.models.fields import FULL, SLIDING, Fields, only, read_decoder, read_window
from nanoflow_jax.models.rope import read_rope


def read_config(read: Fields) -> ModelConfig:
    """The window is of every layer, or null and of none. Absent, it is 4096."""
    read = read.with_defaults(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
    window = read_window(read)
    only(read, FULL if window is None else SLIDING)
    return read_decoder(read, "mistral", (Layer(Attention(read_rope(read), window=window), Mlp()),))
