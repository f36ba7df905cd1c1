"""Qwen 2 and 2.5: LLaMA with biases on queries, keys and values."""

from __future__ import annotations

from nanoflow_jax.config import Attention, Layer, Mlp, ModelConfig
from nanoflow_jax.models.fields import FULL, SLIDING, Fields, only, period, read_decoder, read_layer_types, read_window
from nanoflow_jax.models.rope import read_rope


def read_config(read: Fields) -> ModelConfig:
    read = read.with_defaults(num_key_value_heads=32, max_position_embeddings=32768, sliding_window=4096)
    rope = read_rope(read)
    windows = read_windows(read)
    return read_decoder(
        read, "qwen2", tuple(Layer(Attention(rope, qkv_bias=True, window=window), Mlp()) for window in windows)
    )


def read_windows(read: Fields) -> tuple[int | None, ...]:
    """A period of the layers' windows. Published files give a window and say that it is not used."""
    window, first = read_window(read), read.take("max_window_layers", int, 28)
    if not read.take("use_sliding_window", bool, False):
        only(read)
        return (None,)
    kinds = read_layer_types(read, lambda i: FULL if window is None or i < first else SLIDING, window)
    return period([window if kind == SLIDING else None for kind in kinds])
