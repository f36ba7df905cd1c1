"""Hugging Face `config.json`, read strictly: a field is used, known to change nothing, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nanoflow_jax.config import ConfigError, Layer, ModelConfig, token_id_tuple
from nanoflow_jax.models.fp8_formats import read_fp8_checkpoint

FULL, SLIDING = "full_attention", "sliding_attention"  # layer_types

# Fields that change nothing about inference.
_INERT = {
    # provenance, and which code of other libraries runs the model
    "_name_or_path", "_commit_hash", "transformers_version", "unsloth_fixed", "unsloth_version", "is_llama_config",
    "transformers.js_config", "auto_map", "attribute_map", "use_cache", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "_flash_attn_2_enabled", "use_flash_attention", "use_flash_attn", "pretraining_tp",
    "torchscript", "tf_legacy_loss", "use_bfloat16", "output_hidden_states", "output_attentions", "output_scores",
    "return_dict", "return_dict_in_generate", "chunk_size_feed_forward", "vision_config",
    # training
    "attention_dropout", "residual_dropout",
    "hidden_dropout_prob", "hidden_dropout", "attention_probs_dropout_prob", "classifier_dropout",
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
    "finetuned",  # in a yarn block: that the model was trained with it
    "_sliding_window_pattern", "cache_implementation",  # layer_types says it; transformers' own
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
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False,),
}


# Far above any model's: what is larger is a mistake, and must be told before memory is taken for it.
_LARGEST = {
    "num_hidden_layers": 2**12, "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "head_dim": 2**16,
    "num_local_experts": 2**12, "num_experts": 2**12, "moe_intermediate_size": 2**24,
    "shared_expert_intermediate_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**24, "vocab_size": 2**24,
}  # fmt: skip


class Fields:
    """A dict of fields that remembers which were read, so that the rest can be reported."""

    def __init__(self, fields: dict[str, Any]):
        self.fields, self.seen = fields, set[str]()

    def with_defaults(self, **defaults: Any) -> Fields:
        """What a family puts for fields that are absent. One that is null stays null: it is another value."""
        read = Fields({**defaults, **self.fields})
        read.seen = self.seen | (defaults.keys() - self.fields.keys())
        return read

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


def read_decoder(read: Fields, family: str, pattern: tuple[Layer, ...], **more: Any) -> ModelConfig:
    """What all families say alike: sizes, tokens, dtype. Ends the reading: a field that nobody has read is refused.
    `more`: what else ModelConfig has."""
    heads = read.positive("num_attention_heads")
    quantised = read.take("quantization_config", dict, None)
    fp8 = None if quantised is None else read_fp8_checkpoint(quantised)
    config = ModelConfig(
        family=family,
        vocab_size=read.positive("vocab_size"),
        hidden_size=read.positive("hidden_size"),
        intermediate_size=read.positive("intermediate_size"),
        num_layers=read.positive("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=read.positive("num_key_value_heads", heads),
        head_dim=read_head_dim(read),
        max_position_embeddings=max_positions(read),
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        pattern=pattern,
        tie_word_embeddings=read.take("tie_word_embeddings", bool, False),
        bos_token_id=read.take("bos_token_id", int, None),
        eos_token_ids=token_id_tuple("eos_token_id", read.take("eos_token_id", (int, list), None)),
        dtype=_read_dtype(read),
        quantization="fp8" if fp8 is not None and fp8.block is None else None,
        fp8_checkpoint=fp8,
        **more,
    )
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(f"num_key_value_heads: {config.num_kv_heads} must divide num_attention_heads = {heads}")
    if config.head_dim % 2:
        raise ConfigError(f"head_dim: {config.head_dim} must be even (rotary embedding turns pairs)")
    read.finish()
    return config.for_length(config.max_length)


def only(read: Fields, kind: str = FULL) -> None:
    """Raises ConfigError where `layer_types` names a kind of attention that is not this one."""
    if other := sorted({str(other) for other in read.take("layer_types", list, [])} - {kind}):
        raise ConfigError(f"layer_types: {other[0]!r} is not supported; accepted: {kind!r} in every layer")


def read_layer_types(read: Fields, usual: Callable[[int], str], window: int | None) -> tuple[str, ...]:
    """FULL or SLIDING, of each layer; by its index where the file does not say."""
    layers = read.positive("num_hidden_layers")
    kinds = read.take("layer_types", list, [usual(i) for i in range(layers)])
    known = (FULL,) if window is None else (FULL, SLIDING)
    if len(kinds) != layers or not all(kind in known for kind in kinds):
        accepted = " or ".join(map(repr, known))
        raise ConfigError(f"layer_types: must be {accepted} for each of {layers} layers, not {kinds!r:.200}")
    return tuple(kinds)


def read_kinds(
    read: Fields, usual: Callable[[int], str], window: int | None, layer: Callable[[str, int | None], Layer]
) -> tuple[Layer, ...]:
    """A period of the layers, of their kind and its window."""
    kinds = read_layer_types(read, usual, window)
    return period([layer(kind, window if kind == SLIDING else None) for kind in kinds])


def period[T](layers: Sequence[T]) -> tuple[T, ...]:
    """The shortest that gives all of them when it is repeated."""
    size = next(n for n in range(1, len(layers) + 1) if all(layers[i] == layers[i % n] for i in range(len(layers))))
    return tuple(layers[:size])


def read_experts(read: Fields, name: str) -> tuple[int, int]:
    """How many experts a layer has, by the family's name for it, and how many of them a token takes."""
    read.take("router_aux_loss_coef", (int, float), None)  # training's, as are these
    read.take("router_jitter_noise", (int, float), None)
    read.take("output_router_logits", bool, None)
    count, per_token = read.positive(name), read.positive("num_experts_per_tok")
    if per_token > count:
        raise ConfigError(f"num_experts_per_tok: {per_token} must be at most {name} = {count}")
    return count, per_token


def read_window(read: Fields) -> int | None:
    """Keys that a query of a sliding layer sees; None where the field is null."""
    return None if read.take("sliding_window", int, None) is None else read.positive("sliding_window")


def max_positions(read: Fields) -> int:
    return read.positive("max_position_embeddings", 2048)


def read_head_dim(read: Fields) -> int:
    return read.positive("head_dim", read.positive("hidden_size") // read.positive("num_attention_heads"))


def _read_dtype(read: Fields) -> str:
    """`dtype` (transformers 5) or `torch_dtype` (older files); float16 checkpoints run in bfloat16."""
    old, new = read.take("torch_dtype", str, None), read.take("dtype", str, None)
    if old and new and old != new:
        raise ConfigError(f"dtype: {new!r} contradicts torch_dtype = {old!r}")
    dtype = new or old or "bfloat16"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype: {dtype!r} is not supported; accepted: 'float32', 'bfloat16', 'float16'")
    return dtype
