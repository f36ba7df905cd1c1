"""Ministral 3: Mistral whose queries grow with their position, beyond the positions that yarn stretches."""

from __future__ import annotations

from nanoflow_jax.config import Attention, ConfigError, Layer, Mlp, ModelConfig
from nanoflow_jax.models.fields import FULL, SLIDING, Fields, only, read_decoder, read_window
from nanoflow_jax.models.rope import read_rope

BETA = "llama_4_scaling_beta"  # as Llama 4 has it
ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, BETA: 0.1,
}  # fmt: skip


def read_config(read: Fields) -> ModelConfig:
    """The window is of every layer, or null and of none."""
    read = read.with_defaults(
        num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=262144, rope_parameters=ROPE
    )
    window = read_window(read)
    only(read, FULL if window is None else SLIDING)
    growth = read.take("rope_parameters", dict, {}).get(BETA)
    if not isinstance(growth, int | float) or isinstance(growth, bool) or not 0 <= growth <= 1e3:
        raise ConfigError(f"rope_parameters.{BETA}: {growth!r} must be a number from 0 to 1000")
    rope = read_rope(read, beside=(BETA, "max_position_embeddings"))
    attention = Attention(rope, window=window, query_growth=float(growth))
    return read_decoder(read, "ministral3", (Layer(attention, Mlp()),))
