"""What a model is, in frozen dataclasses that know no family (`models.registry` reads them), and where configs are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow_jax.system.reading import ConfigError

__all__ = [
    "EMBEDDED", "Attention", "ConfigError", "Layer", "Mlp", "ModelConfig", "RopeConfig", "config_path", "configs_root",
    "token_id_tuple",
]  # fmt: skip


def configs_root() -> Path:
    """The folder `configs/`: beside the package in a checkout, inside it when installed from a wheel."""
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"configs: folder not found beside or inside {package}")


def config_path(kind: str, name: str) -> Path:
    """Path of a named configuration: `kind` is a folder of `configs/`, `name` a file stem there or a path of the
    user's."""
    if os.sep in name or name.endswith((".toml", ".json")):
        if os.path.isfile(name):
            return Path(name)
        raise ConfigError(f"{kind}: no file {name!r}")
    folder = configs_root() / kind
    for suffix in (".toml", ".json"):
        if os.path.isfile(folder / (name + suffix)):
            return folder / (name + suffix)
    known = ", ".join(sorted(p.stem for p in folder.iterdir() if p.suffix in (".toml", ".json")))
    raise ConfigError(f"{kind}: unknown name {name!r}; accepted: {known}, or a path to a file", most=4000)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `kind` is default, linear or llama3 (Llama 3.1's frequency-dependent scaling)."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Attention:
    rope: RopeConfig
    qkv_bias: bool = False
    o_bias: bool = False


@dataclass(frozen=True)
class Mlp:
    """Gated: SiLU(gate) * up."""

    bias: bool = False


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer; sizes do not."""

    attention: Attention
    mlp: Mlp


@dataclass(frozen=True)
class ModelConfig:
    """A decoder. Sizes are global (before any sharding).

    family   its name in `models.registry`
    pattern  the kinds of layers, repeated over `num_layers`
    dtype    of activations, and of weights but for those of the layers where `quantization` is "fp8"
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    pattern: tuple[Layer, ...]
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    quantization: str | None = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Of each layer, its kind."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    @property
    def max_length(self) -> int:
        """Tokens of a sequence: linear scaling squeezes `factor` times as many into the positions that the model was
        trained on. llama3's `max_position_embeddings` is the scaled length itself (as transformers and vLLM take it).
        """
        ropes = [layer.attention.rope for layer in self.pattern]
        scale = min(rope.factor if rope.kind == "linear" else 1.0 for rope in ropes)
        return int(self.max_position_embeddings * scale)

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def num_params(self) -> int:
        """Number of weights, as published (tied embeddings counted once)."""
        hidden, ffn, qd, kvd = self.hidden_size, self.intermediate_size, *self._attention_widths()
        layers = self.num_layers * (hidden * (qd + 2 * kvd) + qd * hidden + 3 * hidden * ffn + 2 * hidden)
        for layer in self.layers:
            layers += (qd + 2 * kvd) * layer.attention.qkv_bias + hidden * layer.attention.o_bias
            layers += (2 * ffn + hidden) * layer.mlp.bias
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return layers + embeddings + hidden

    def _attention_widths(self) -> tuple[int, int]:
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim


EMBEDDED = {"tiny": Path(__file__).parent / "assets" / "tiny_llama"}  # models that come with the package


def token_id_tuple(name: str, value: Any) -> tuple[int, ...]:
    """Normalises Hugging Face's `eos_token_id` (absent, one id, or a list) to a tuple of ids."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**31 for v in values):
        raise ConfigError(f"{name}: {value!r} must be a token id or a list of token ids")
    return tuple(values)
