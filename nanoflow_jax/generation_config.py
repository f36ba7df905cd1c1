"""generation_config.json: how a model's makers want it sampled, and which tokens end a generation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoflow_jax.config import ConfigError, ModelConfig, token_id_tuple
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.system.reading import read_json_object
from nanoflow_jax.tokenizer import Tokenizer

logger = logging.getLogger("nanoflow_jax")

FILE = "generation_config.json"

# Fields that change nothing here: ids that the tokenizer and config.json have, provenance, and how transformers runs.
_INERT = {
    "eos_token_id", "bos_token_id", "pad_token_id", "do_sample", "max_length", "transformers_version", "use_cache",
    "cache_implementation", "cache_config", "_from_model_config", "_commit_hash", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "return_dict",
    "trust_remote_code", "chat_format", "max_window_size", "disable_compile", "compile_config", "generation_kwargs",
}  # fmt: skip

# Values at which other fields of transformers' change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "num_return_sequences": (1,), "diversity_penalty": (0,),
    "length_penalty": (1,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "typical_p": (1,),
    "epsilon_cutoff": (0,), "eta_cutoff": (0,), "penalty_alpha": (0,), "encoder_repetition_penalty": (1,),
    "guidance_scale": (1,), "min_length": (0,), "min_new_tokens": (0,), "early_stopping": (False,),
    "remove_invalid_values": (False,), "renormalize_logits": (False,), "top_h": (),
}  # fmt: skip


def generation_defaults(folder: Path) -> dict[str, Any]:
    """Fields of SamplingParams that the model's makers have set; greedy unless they say do_sample. As in vLLM,
    `max_new_tokens` is the `max_tokens` of requests that leave it open. What cannot be applied is told in one warning.
    Raises ConfigError for a value that SamplingParams does not take."""
    fields = dict(_read(folder))
    if "max_new_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_new_tokens")
    known = {name: value for name, value in fields.items() if name in SamplingParams.__dataclass_fields__}
    defaults = {name: value for name, value in known.items() if value is not None}
    if not fields.get("do_sample"):
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise ConfigError(f"{folder / FILE}: {error}") from None
    others = [name for name, value in fields.items() if name not in known and not _changes_nothing(name, value)]
    if others:
        told = ", ".join(f"{name}={fields[name]!r}" for name in sorted(others))
        logger.warning("%s: not applied: %s", folder / FILE, told)
    return defaults


def end_tokens(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end a generation: those of generation_config.json, where it has any, else of config.json; and the
    tokenizer's own end token, because finetunes often change that one alone."""
    ids, source = token_id_tuple("eos_token_id", _read(folder).get("eos_token_id")), FILE
    if not ids:
        ids, source = config.eos_token_ids, "config.json"
    told = [f"{i} {tokenizer.token_bytes(i).decode('utf-8', 'replace')!r} ({source})" for i in ids]
    own = tokenizer.end_token_id
    if own is not None and own not in ids and own < config.vocab_size:
        ids = (*ids, own)
        told.append(f"{own} {tokenizer.token_bytes(own).decode('utf-8', 'replace')!r} (tokenizer)")
    logger.info("end tokens: %s", ", ".join(told) or "none")
    return ids


def _changes_nothing(name: str, value: Any) -> bool:
    if value is None or name in _INERT or name.startswith("_") or value in ([], {}, False):
        return True
    return any(value == neutral for neutral in _NEUTRAL.get(name, ()))


def _read(folder: Path) -> Mapping[str, Any]:
    path = folder / FILE
    return read_json_object(path) if path.is_file() else {}
