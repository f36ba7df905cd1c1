"""gpt-oss 20b and 120b: experts in every layer, biases everywhere, a window in every second layer, and a sink beside
the keys of each head."""

from __future__ import annotations

import logging

from nanoflow_jax.config import Attention, ConfigError, Experts, Layer, Mlp, ModelConfig
from nanoflow_jax.models.fields import FULL, SLIDING, Fields, read_decoder, read_experts, read_kinds, read_window
from nanoflow_jax.models.rope import read_rope

logger = logging.getLogger("nanoflow_jax")
YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096, "rope_theta": 150000.0,
}  # fmt: skip


def read_config(read: Fields) -> ModelConfig:
    """`intermediate_size` is that of an expert. Weights in MXFP4 are run in bfloat16."""
    read = read.with_defaults(
        num_hidden_layers=36, vocab_size=201088, hidden_size=2880, intermediate_size=2880, head_dim=64,
        num_attention_heads=64, num_key_value_heads=8, sliding_window=128, max_position_embeddings=131072,
        rms_norm_eps=1e-5, num_local_experts=128, num_experts_per_tok=4, attention_bias=True,
    )  # fmt: skip
    if "rope_scaling" not in read.fields and "rope_parameters" not in read.fields:
        read = read.with_defaults(rope_parameters=YARN)
    read = _without_mxfp4(read.with_defaults(rope_theta=150000.0))
    count, per_token = read_experts(read, "num_local_experts")
    if (said := read.take("experts_per_token", int, per_token)) != per_token:  # the original's name for it
        raise ConfigError(f"experts_per_token: {said} contradicts num_experts_per_tok = {per_token}")
    read.take("initial_context_length", int, 4096)  # the original's name for the rope's
    mlp = Mlp(
        bias=True, activation="clamped_silu", alpha=read.number("swiglu_alpha", 1.702),
        limit=read.number("swiglu_limit", 7.0), experts=Experts(count, per_token, read.positive("intermediate_size"),
        bias=True),
    )  # fmt: skip
    window, bias, rope = read_window(read), read.take("attention_bias", bool, True), read_rope(read)

    def layer(_: str, window: int | None) -> Layer:
        return Layer(Attention(rope, bias, bias, window=window, sinks=True), mlp)

    return read_decoder(read, "gpt_oss", read_kinds(read, lambda i: FULL if i % 2 else SLIDING, window, layer))


def _without_mxfp4(read: Fields) -> Fields:
    quantised = read.take("quantization_config", dict, None)
    if quantised is None:
        return read
    if quantised.get("quant_method") != "mxfp4":
        raise ConfigError(
            f"quantization_config.quant_method: {quantised.get('quant_method')!r} is not supported; accepted: 'mxfp4'"
        )
    logger.info("experts' weights come in MXFP4, and are loaded in bfloat16: four times the bytes, the same values")
    rest = Fields({key: value for key, value in read.fields.items() if key != "quantization_config"})
    rest.seen = read.seen
    return rest
