"""Qwen 2 and 2.5: LLaMA with biases on queries, keys and values."""

from __future__ import annotations

from nanoflow_jax.config import Attention, ConfigError, Layer, Mlp, ModelConfig
from nanoflow_jax.models.fields import Fields, full_attention_only, read_decoder, read_window
from nanoflow_jax.models.llama import forward
from nanoflow_jax.models.rope import read_rope

__all__ = ["forward", "read_config", "read_windows"]


def read_config(read: Fields) -> ModelConfig:
    read = read.with_defaults(num_key_value_heads=32, max_position_embeddings=32768, sliding_window=4096)
    rope = read_rope(read)
    windows = read_windows(read)
    return read_decoder(
        read, "qwen2", tuple(Layer(Attention(rope, qkv_bias=True, window=window), Mlp()) for window in windows)
    )


def read_windows(read: Fields) -> tuple[int | None, ...]:
    """Of each layer, or one of all. Published files give a window and say that it is not used."""
    window, first, layers = (
        read_window(read),
        read.take("max_window_layers", int, 28),
        read.positive("num_hidden_layers"),
    )
    if not read.take("use_sliding_window", bool, False):
        full_attention_only(read)
        return (None,)
    usual = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(layers)]
    kinds = read.take("layer_types", list, usual)
    known = ("full_attention",) if window is None else ("full_attention", "sliding_attention")
    if len(kinds) != layers or not all(kind in known for kind in kinds):
        accepted = " or ".join(map(repr, known))
        raise ConfigError(f"layer_types: must be {accepted} for each of {layers} layers, not {kinds!r:.200}")
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if len(set(windows)) > 1 else windows[:1]
