"""Qwen 1.5 and 2 MoE, and Qwen 3 MoE: Qwen 2 and 3 with experts in every layer, or in those that config.json names; in
the former every token goes through a shared expert, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nanoflow_jax.config import Attention, ConfigError, Experts, Layer, Mlp, ModelConfig
from nanoflow_jax.models.fields import (
    FULL,
    SLIDING,
    Fields,
    only,
    period,
    read_decoder,
    read_experts,
    read_layer_types,
    read_window,
)
from nanoflow_jax.models.rope import read_rope


def read_qwen2(read: Fields) -> ModelConfig:
    read = read.with_defaults(
        intermediate_size=5632, num_key_value_heads=16, max_position_embeddings=32768, sliding_window=4096,
        num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408, norm_topk_prob=False,
        shared_expert_intermediate_size=5632,
    )  # fmt: skip
    attention = Attention(read_rope(read), qkv_bias=read.take("qkv_bias", bool, True))
    window, last = read_window(read), read.take("max_window_layers", int, 28)
    windows: Sequence[int | None] = [None] * read.positive("num_hidden_layers")
    if read.take("use_sliding_window", bool, False) and window is not None:
        kinds = read_layer_types(read, lambda i: SLIDING if i % 2 == 0 and i < last else FULL, window)
        windows = [window if kind == SLIDING else None for kind in kinds]
    else:
        only(read, FULL)
    experts = _experts(read, shared=read.positive("shared_expert_intermediate_size"))
    mlps = _mlps(read, experts)
    layers = [Layer(replace(attention, window=at), mlp) for at, mlp in zip(windows, mlps, strict=True)]
    return read_decoder(read, "qwen2_moe", period(layers))


def read_qwen3(read: Fields) -> ModelConfig:
    read = read.with_defaults(
        intermediate_size=6144, num_key_value_heads=4, max_position_embeddings=32768, sliding_window=4096,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=False,
    )  # fmt: skip
    window, bias = read_window(read), read.take("attention_bias", bool, False)
    window = window if read.take("use_sliding_window", bool, False) else None
    only(read, FULL if window is None else SLIDING)
    read.take("max_window_layers", int, 28)  # of Qwen 2's: transformers does not look at it here
    attention = Attention(read_rope(read), qkv_bias=bias, o_bias=bias, window=window, qk_norm="head")
    return read_decoder(read, "qwen3_moe", period([Layer(attention, mlp) for mlp in _mlps(read, _experts(read))]))


def _experts(read: Fields, shared: int = 0) -> Experts:
    count, per_token = read_experts(read, "num_experts")
    size, normalized = read.positive("moe_intermediate_size"), read.take("norm_topk_prob", bool, False)
    return Experts(count, per_token, size, normalized, shared)


def _mlps(read: Fields, experts: Experts) -> list[Mlp]:
    """Of each layer: experts in every `decoder_sparse_step`th, but for `mlp_only_layers`."""
    layers, every = read.positive("num_hidden_layers"), read.positive("decoder_sparse_step", 1)
    dense = read.take("mlp_only_layers", list, [])
    if not all(isinstance(i, int) and 0 <= i < layers for i in dense):
        raise ConfigError(f"mlp_only_layers: {dense!r:.200} must be indices of the {layers} layers")
    mlps = [Mlp() if i in dense or (i + 1) % every else Mlp(experts=experts) for i in range(layers)]
    if Mlp(experts=experts) not in mlps:
        raise ConfigError("mlp_only_layers: no layer is left with experts; at least one is needed")
    return mlps
