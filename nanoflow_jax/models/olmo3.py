"""OLMo 3: OLMo 2 with a sliding window in three of four layers, and a rotary embedding for each kind."""

from __future__ import annotations

from nanoflow_jax.config import Attention, Layer, Mlp, ModelConfig
from nanoflow_jax.models.fields import FULL, SLIDING, Fields, read_decoder, read_kinds, read_window
from nanoflow_jax.models.rope import read_ropes

THETA = 500000.0  # of sliding layers, which no field of the older dialect says


def read_config(read: Fields) -> ModelConfig:
    read = read.with_defaults(rms_norm_eps=1e-5, sliding_window=4096)
    bias, window = read.take("attention_bias", bool, False), read_window(read)
    ropes = read_ropes(read, THETA, THETA, None)

    def layer(kind: str, window: int | None) -> Layer:
        return Layer(Attention(ropes[kind], bias, bias, window=window, qk_norm="projection"), Mlp())

    pattern = read_kinds(read, lambda i: SLIDING if (i + 1) % 4 else FULL, window, layer)
    return read_decoder(read, "olmo3", pattern, norms="after")
