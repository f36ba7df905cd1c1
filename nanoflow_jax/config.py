"""What a model is, in frozen dataclasses that know no family (`models.registry` reads them), and where configs are."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ml_dtypes

from nanoflow_jax.system.reading import ConfigError

__all__ = [
    "EMBEDDED", "Attention", "ConfigError", "Experts", "Layer", "Layouts", "Mlp", "ModelConfig", "RopeConfig",
    "config_path", "configs_root", "token_id_tuple",
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
    """Rotary embedding; `models.rope` has the formulas.

    kind              default, linear, llama3 (Llama 3.1's), yarn, dynamic (NTK) or longrope (Phi 3's)
    original_max_position_embeddings
                      positions before any scaling; of dynamic, those up to which it is the default
    attention_factor  cos and sin are multiplied by it (yarn, longrope)
    beta_fast, beta_slow, truncate
                      yarn's: turns over the original positions between which frequencies are blended, and whether
                      the ends are whole indices
    short_factor, long_factor
                      longrope's divisors [head_dim / 2], up to the original positions and beyond
    length            tokens of the longest sequence, by which dynamic and longrope choose frequencies; 0 elsewhere
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    length: int = 0

    def for_length(self, length: int) -> RopeConfig:
        """Of sequences of up to so many tokens, whatever the length of each: answers then depend on no neighbour, and
        keys in the pages fit every query. As vLLM chooses."""
        return replace(self, length=length) if self.kind in ("dynamic", "longrope") else self

    def max_length(self, positions: int) -> int:
        """Tokens of a sequence, of a model whose `max_position_embeddings` is `positions`. llama3's and longrope's is
        the scaled length itself (as transformers and vLLM take it)."""
        if self.kind in ("linear", "dynamic"):
            return round(positions * self.factor)
        return round(self.original_max_position_embeddings * self.factor) if self.kind == "yarn" else positions


@dataclass(frozen=True)
class Attention:
    """scale    multiplies the scores; None: head_dim ** -0.5
    window   keys that a query sees, its own included; None: all
    qk_norm  queries and keys are normed ahead of the rotary embedding: "head", each head by itself and with one weight
             for all, or "projection", all heads together; None: not
    query_growth
             queries are multiplied by 1 + query_growth * ln(1 + floor(position / the rotary embedding's original
             positions))
    sinks    each query head has a logit beside those of the keys, which takes its share of the softmax and gives
             nothing (gpt-oss)
    """

    rope: RopeConfig
    qkv_bias: bool = False
    o_bias: bool = False
    scale: float | None = None
    window: int | None = None
    qk_norm: Literal["head", "projection"] | None = None
    query_growth: float = 0.0
    sinks: bool = False


@dataclass(frozen=True)
class Experts:
    """The MLPs of a layer that a router chooses from for each token.

    count, per_token
              how many there are, and are chosen
    size      of each, as `intermediate_size` of an MLP
    normalized
              the weights of the chosen add up to 1; else they are their shares in the softmax over all
    shared    size of the MLP that every token goes through besides, times the sigmoid of a gate; 0: none
    bias      the router has one
    """

    count: int
    per_token: int
    size: int
    normalized: bool = True
    shared: int = 0
    bias: bool = False


@dataclass(frozen=True)
class Mlp:
    """Gated: activation(gate) * up. gelu_tanh: GELU by its approximation with tanh; clamped_silu (gpt-oss):
    gate * sigmoid(alpha * gate) * (up + 1), of a gate that is at most `limit`, and up within -limit and limit.

    experts  None: one MLP for all tokens; else every number here is that of each expert
    """

    bias: bool = False
    activation: Literal["silu", "gelu_tanh", "clamped_silu"] = "silu"
    alpha: float = 1.0
    limit: float = math.inf
    experts: Experts | None = None


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer; sizes do not."""

    attention: Attention
    mlp: Mlp


@dataclass(frozen=True)
class Fp8Checkpoint:
    """A checkpoint whose layers come in fp8 (`models.fp8_formats`).

    format  its `quant_method`
    block   rows and columns of a weight that share a scale; None: whole rows, or the whole weight
    activation_bound
            magnitudes of activations beyond it are cut off ahead of their rounding (fbgemm_fp8's `activation_scale_ub`)
    """

    format: str
    block: tuple[int, int] | None = None
    activation_bound: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder. Sizes are global (before any sharding).

    family   its name in `models.registry`
    pattern  the kinds of layers, repeated over `num_layers`
    dtype    of activations, and of weights but for those of the layers where `quantization` is "fp8"
    quantization, fp8_checkpoint
             how the layers run, and how their weights come; None: both in `dtype`. `read_config` gives the former as
             the checkpoint is, but None for scales of blocks, which no fp8 GEMM here has
    embedding_multiplier, residual_multiplier, logits_divisor
             of the embedding's rows ("sqrt": the root of hidden_size, rounded to dtype), of what a block adds to the
             residual, and of the logits
    norms    what blocks read is normed ("before"), what they add to the residual ("after"), or both
    norm_offset
             is added to the weights of all norms
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
    fp8_checkpoint: Fp8Checkpoint | None = None
    embedding_multiplier: float | Literal["sqrt"] = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    norms: Literal["before", "after", "both"] = "before"
    norm_offset: float = 0.0

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Of each layer, its kind."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    @property
    def max_length(self) -> int:
        """Tokens of a sequence that the rotary scaling makes of `max_position_embeddings`; the least of all kinds of
        layers."""
        return min(*(at.attention.rope.max_length(self.max_position_embeddings) for at in self.pattern), 2**31 - 1)

    def for_length(self, length: int) -> ModelConfig:
        """The same for sequences of up to so many tokens (`RopeConfig.for_length`)."""
        return replace(
            self,
            pattern=tuple(
                replace(layer, attention=replace(layer.attention, rope=layer.attention.rope.for_length(length)))
                for layer in self.pattern
            ),
        )

    @property
    def embedding_factor(self) -> float:
        """What rows of the embedding are multiplied by."""
        if self.embedding_multiplier != "sqrt":
            return self.embedding_multiplier
        root = math.sqrt(self.hidden_size)
        return float(ml_dtypes.bfloat16(root)) if self.dtype == "bfloat16" else root

    @property
    def qk_norm(self) -> Literal["head", "projection"] | None:
        """The one of all layers: their weights are one array."""
        return self.pattern[0].attention.qk_norm

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def experts(self) -> Experts | None:
        """The one of all layers that have some."""
        return next((layer.mlp.experts for layer in self.pattern if layer.mlp.experts is not None), None)

    def dense_size(self, mlp: Mlp) -> int:
        """Of the MLP that every token goes through; 0: there is none."""
        return self.intermediate_size if mlp.experts is None else mlp.experts.shared

    @property
    def num_params(self) -> int:
        """Number of weights, as published (tied embeddings counted once)."""
        return self._params(lambda experts: experts.count)

    @property
    def active_params(self) -> int:
        """Of those, how many a token is multiplied with: of the experts, those that it is sent to."""
        return self._params(lambda experts: experts.per_token)

    def _params(self, used: Callable[[Experts], int]) -> int:
        hidden, (qd, kvd) = self.hidden_size, self._attention_widths()
        norms = 4 if self.norms == "both" else 2
        layers = self.num_layers * (hidden * (qd + 2 * kvd) + qd * hidden + norms * hidden)
        for layer in self.layers:
            layers += (qd + 2 * kvd) * layer.attention.qkv_bias + hidden * layer.attention.o_bias
            layers += self.num_heads * layer.attention.sinks
            layers += {None: 0, "head": 2 * self.head_dim, "projection": qd + kvd}[layer.attention.qk_norm]
            mlp, experts = layer.mlp, layer.mlp.experts
            layers += self._mlp_params(self.dense_size(mlp), mlp.bias and experts is None)
            if experts is not None:
                layers += experts.count * (hidden + experts.bias) + hidden * (experts.shared > 0)
                layers += used(experts) * self._mlp_params(experts.size, mlp.bias)
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return layers + embeddings + hidden

    def _mlp_params(self, size: int, bias: bool) -> int:
        return 3 * self.hidden_size * size + (2 * size + self.hidden_size * (size > 0)) * bias

    def _attention_widths(self) -> tuple[int, int]:
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class Layouts:
    """Which weights a plan needs: O split over its outputs, over its inputs, or both; experts whole, each on one
    device, or each split over all."""

    o_by_output: bool = True
    o_by_input: bool = True
    expert_parallel: bool = False


EMBEDDED = {"tiny": Path(__file__).parent / "assets" / "tiny_llama"}  # models that come with the package


def token_id_tuple(name: str, value: Any) -> tuple[int, ...]:
    """Normalises Hugging Face's `eos_token_id` (absent, one id, or a list) to a tuple of ids."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**31 for v in values):
        raise ConfigError(f"{name}: {value!r} must be a token id or a list of token ids")
    return tuple(values)
