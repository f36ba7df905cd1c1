"""Configuration: frozen dataclasses parsed once, strictly, from Hugging Face `config.json` files.

Every problem is a `ConfigError` whose one line names the field and what would be accepted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow_jax.system.reading import ConfigError, Malformed, parse_json, read_text

__all__ = [
    "EMBEDDED", "ConfigError", "ModelConfig", "RopeConfig", "config_path", "configs_root", "model_config", "model_file",
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
class ModelConfig:
    """A decoder of the LLaMA family. Sizes are global (before any sharding)."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str

    @property
    def max_length(self) -> int:
        """Tokens of a sequence: linear scaling squeezes `factor` times as many into the positions that the model was
        trained on. llama3's `max_position_embeddings` is the scaled length itself (as transformers and vLLM take it).
        """
        scale = self.rope.factor if self.rope.kind == "linear" else 1.0
        return int(self.max_position_embeddings * scale)

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def num_params(self) -> int:
        """Number of weights, as published (tied embeddings counted once)."""
        hidden, ffn, qd, kvd = self.hidden_size, self.intermediate_size, *self._attention_widths()
        layer = hidden * (qd + 2 * kvd) + qd * hidden + 3 * hidden * ffn + 2 * hidden
        layer += (qd + 2 * kvd + hidden) * self.attention_bias + (2 * ffn + hidden) * self.mlp_bias
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + embeddings + hidden

    def _attention_widths(self) -> tuple[int, int]:
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim

    @staticmethod
    def from_file(path: str | Path) -> ModelConfig:
        """Reads a `config.json`. Raises ConfigError naming the file."""
        path = Path(path)
        if not path.exists():
            raise ConfigError(f"{path}: no such file; a model folder needs a config.json")
        fields = read_json_object(path)
        try:
            return ModelConfig.from_hf(fields)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @staticmethod
    def from_hf(fields: dict[str, Any]) -> ModelConfig:
        """Parses Hugging Face fields: both `rope_scaling` + `rope_theta` and transformers 5's `rope_parameters`.

        Raises ConfigError for an unknown architecture, an unknown field, or a value this library does not run.
        """
        read = _Fields(fields)
        architectures = read.take("architectures", list, [])
        architecture = architectures[0] if architectures else "LlamaForCausalLM"
        if not isinstance(architecture, str) or architecture not in _ARCHITECTURES or len(architectures) > 1:
            raise ConfigError(f"architectures: {architectures} is not supported; accepted: {sorted(_ARCHITECTURES)}")
        if (model_type := read.take("model_type", str, "llama")) != "llama":
            raise ConfigError(f"model_type: {model_type!r} is not supported; accepted: 'llama'")
        heads = read.positive("num_attention_heads")
        hidden = read.positive("hidden_size")
        max_positions = read.positive("max_position_embeddings", 2048)
        config = ModelConfig(
            architecture=architecture,
            vocab_size=read.positive("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.positive("intermediate_size"),
            num_layers=read.positive("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=read.positive("num_key_value_heads", heads),
            head_dim=read.positive("head_dim", hidden // heads),
            max_position_embeddings=max_positions,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            rope=_rope(read, max_positions),
            tie_word_embeddings=read.take("tie_word_embeddings", bool, False),
            attention_bias=read.take("attention_bias", bool, False),
            mlp_bias=read.take("mlp_bias", bool, False),
            bos_token_id=read.take("bos_token_id", int, None),
            eos_token_ids=token_id_tuple("eos_token_id", read.take("eos_token_id", (int, list), None)),
            dtype=_dtype(read),
        )
        if config.num_heads % config.num_kv_heads:
            raise ConfigError(f"num_key_value_heads: {config.num_kv_heads} must divide num_attention_heads = {heads}")
        if config.head_dim % 2:
            raise ConfigError(f"head_dim: {config.head_dim} must be even (rotary embedding turns pairs)")
        layers = read.take("layer_types", list, [])
        if other := sorted({str(kind) for kind in layers} - {"full_attention"}):
            raise ConfigError(f"layer_types: {other[0]!r} is not supported; accepted: 'full_attention' in every layer")
        read.finish()
        return config


EMBEDDED = {"tiny": Path(__file__).parent / "assets" / "tiny_llama"}  # models that come with the package


def model_file(model: str) -> Path:
    """The config.json of a model: "tiny", a name in `configs/models` (dashes and dots allowed), a config.json, or a
    folder with one."""
    if (folder := EMBEDDED.get(model, Path(model))).is_dir():
        return folder / "config.json"
    return config_path(
        "models", model if model.endswith(".json") else model.lower().replace("-", "_").replace(".", "_")
    )


def model_config(model: str) -> tuple[str, ModelConfig]:
    """Name and config of a model that `model_file` finds."""
    path = model_file(model)
    named_by_folder = model in EMBEDDED or Path(model).is_dir()
    return Path(model).name if named_by_folder else path.stem, ModelConfig.from_file(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises ConfigError naming the file."""
    try:
        fields = parse_json(read_text(path))
    except Malformed as error:
        wrong = f"{error.field}: {error}" if error.field else f"not valid JSON ({error})"
        raise ConfigError(f"{path}: {wrong}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: must hold a JSON object, not {type(fields).__name__}")
    return fields


def token_id_tuple(name: str, value: Any) -> tuple[int, ...]:
    """Normalises Hugging Face's `eos_token_id` (absent, one id, or a list) to a tuple of ids."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**31 for v in values):
        raise ConfigError(f"{name}: {value!r} must be a token id or a list of token ids")
    return tuple(values)


_ARCHITECTURES = {"LlamaForCausalLM"}

# Fields that change nothing about inference.
_INERT = {
    # provenance, and which code of other libraries runs the model
    "_name_or_path", "_commit_hash", "transformers_version", "unsloth_fixed", "unsloth_version", "is_llama_config",
    "transformers.js_config", "auto_map", "attribute_map", "use_cache", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "_flash_attn_2_enabled", "use_flash_attention", "use_flash_attn", "pretraining_tp",
    "torchscript", "tf_legacy_loss", "use_bfloat16", "output_hidden_states", "output_attentions", "output_scores",
    "return_dict", "return_dict_in_generate", "chunk_size_feed_forward", "vision_config",
    # training
    "attention_dropout", "hidden_dropout_prob", "hidden_dropout", "attention_probs_dropout_prob", "classifier_dropout",
    "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range", "neftune_noise_alpha",
    "gradient_checkpointing",
    "use_gradient_checkpointing", "finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id",
    # the tokenizer's, and a length that max_position_embeddings and the rotary scaling say
    "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id", "eos_token", "bos_token",
    "pad_token", "tokenizer_class", "prefix", "max_sequence_length", "model_max_length", "is_decoder",
    # sampling, whose place is generation_config.json: transformers before 4.50 wrote its defaults here
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens",
}  # fmt: skip

# Fields accepted only with the values at which they change nothing.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "activation": ("swiglu", "silu"),  # Falcon 3 says it twice
    "is_causal": (True,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "use_mrope": (False,),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "partial_rotary_factor": (1, None),
    "logits_soft_cap": (None,),
    "rope_interleaved": (False,),
}


# Far above any model's: what is larger is a mistake, and must be told before memory is taken for it.
_LARGEST = {
    "num_hidden_layers": 2**12, "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "head_dim": 2**16,
    "hidden_size": 2**20, "intermediate_size": 2**24, "vocab_size": 2**24,
}  # fmt: skip


class _Fields:
    """A dict of fields that remembers which were read, so that the rest can be reported."""

    def __init__(self, fields: dict[str, Any]):
        self.fields, self.seen = fields, set[str]()

    def take(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        self.seen.add(name)
        value = self.fields.get(name)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(k.__name__ for k in kinds)
            raise ConfigError(f"{name}: {value!r} must be {expected}, not {type(value).__name__}")
        return value

    def positive(self, name: str, default: int | None = None) -> int:
        value = self.take(name, int, default)
        if value is None:
            raise ConfigError(f"{name}: missing; a positive integer is needed")
        most = _LARGEST.get(name, 2**31 - 1)
        if not 0 < value <= most:
            raise ConfigError(f"{name}: {value} must be a positive integer, at most {most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.take(name, (int, float), default)
        if value is None or not 0 < value <= 1e30:
            raise ConfigError(f"{name}: {value!r} must be a positive number, at most 1e30")
        return float(value)

    def finish(self) -> None:
        for name, value in self.fields.items():
            if value is None or name in self.seen or name in _INERT:  # null asks for nothing
                continue
            if name not in _REQUIRED_VALUES:
                raise ConfigError(f"{name}: unknown field (value {value!r}); this library would have to ignore it")
            if value not in _REQUIRED_VALUES[name]:
                accepted = " or ".join(repr(v) for v in _REQUIRED_VALUES[name])
                raise ConfigError(f"{name}: {value!r} is not supported; accepted: {accepted}")


def _dtype(read: _Fields) -> str:
    """`dtype` (transformers 5) or `torch_dtype` (older files); float16 checkpoints run in bfloat16."""
    old, new = read.take("torch_dtype", str, None), read.take("dtype", str, None)
    if old and new and old != new:
        raise ConfigError(f"dtype: {new!r} contradicts torch_dtype = {old!r}")
    dtype = new or old or "bfloat16"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype: {dtype!r} is not supported; accepted: 'float32', 'bfloat16', 'float16'")
    return dtype


def _rope(read: _Fields, max_positions: int) -> RopeConfig:
    parameters = read.take("rope_parameters", dict, None)
    scaling = read.take("rope_scaling", dict, None)
    theta = read.number("rope_theta", 10000.0)
    if parameters is not None and scaling not in (None, parameters):
        raise ConfigError("rope_parameters: given together with a different rope_scaling; keep one of them")
    block = "rope_parameters" if parameters is not None else "rope_scaling"
    rope = _Fields(dict(parameters or scaling or {}))
    try:
        kind = rope.take("rope_type", str, None) or rope.take("type", str, "default")
        rope.seen.update({"type", "rope_type"})
        if kind not in ("default", "linear", "llama3"):
            raise ConfigError(f"rope_type: {kind!r} is not supported; accepted: 'default', 'linear', 'llama3'")
        theta = rope.number("rope_theta", theta)
        if kind == "default":
            config = RopeConfig(kind, theta)
        elif kind == "linear":
            config = RopeConfig(kind, theta, rope.number("factor"))
        else:
            config = RopeConfig(
                kind,
                theta,
                rope.number("factor"),
                rope.number("low_freq_factor"),
                rope.number("high_freq_factor"),
                rope.positive("original_max_position_embeddings", max_positions),
            )
            if config.high_freq_factor <= config.low_freq_factor:
                raise ConfigError(
                    f"high_freq_factor: {config.high_freq_factor} must be above "
                    f"low_freq_factor = {config.low_freq_factor}"
                )
        rope.finish()
    except ConfigError as error:
        raise ConfigError(f"{block}.{error}") from None
    return config
