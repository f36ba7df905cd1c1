"""The families of models: how each one's config.json is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow_jax.config import EMBEDDED, ConfigError, ModelConfig, config_path
from nanoflow_jax.models import (
    gemma3,
    gpt_oss,
    granite,
    llama,
    ministral3,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    qwen2,
    qwen3,
    qwen_moe,
    seed_oss,
)
from nanoflow_jax.models.fields import Fields
from nanoflow_jax.system.reading import read_json_object


@dataclass(frozen=True)
class Family:
    """name: config.json's `model_type`, and `ModelConfig.family`; architectures: those of config.json.

    read_config  the fields -> ModelConfig; raises ConfigError for one that it does not know, or cannot run
    """

    name: str
    architectures: tuple[str, ...]
    read_config: Callable[[Fields], ModelConfig]


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", ("LlamaForCausalLM",), llama.read_config),
        Family("mistral", ("MistralForCausalLM",), mistral.read_config),
        Family("qwen2", ("Qwen2ForCausalLM",), qwen2.read_config),
        Family("qwen3", ("Qwen3ForCausalLM",), qwen3.read_config),
        Family("seed_oss", ("SeedOssForCausalLM",), seed_oss.read_config),
        Family("granite", ("GraniteForCausalLM",), granite.read_config),
        Family("olmo2", ("Olmo2ForCausalLM",), olmo2.read_config),
        Family("olmo3", ("Olmo3ForCausalLM",), olmo3.read_config),
        Family("ministral3", ("Ministral3ForCausalLM",), ministral3.read_config),
        Family("mixtral", ("MixtralForCausalLM",), mixtral.read_config),
        Family("qwen2_moe", ("Qwen2MoeForCausalLM",), qwen_moe.read_qwen2),
        Family("qwen3_moe", ("Qwen3MoeForCausalLM",), qwen_moe.read_qwen3),
        Family("gpt_oss", ("GptOssForCausalLM",), gpt_oss.read_config),
        Family("gemma3_text", ("Gemma3ForCausalLM",), gemma3.read_config),
    )
}


# Models with a vision tower, whose text model is one of the families.
WITH_VISION = {"Gemma3ForConditionalGeneration": "gemma3", "Mistral3ForConditionalGeneration": "mistral3"}
_OF_VISION = {
    "vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "image_token_id", "mm_tokens_per_image",
    "multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size", "vision_feature_layer",
}  # fmt: skip


def parse_config(fields: dict[str, Any]) -> ModelConfig:
    """Hugging Face fields -> ModelConfig; of a model with a vision tower, its text model's. Raises ConfigError for an
    unknown family, an unknown field, or a value that this library does not run. Without a name of its family it is
    LLaMA."""
    read = Fields(_text_fields(fields))
    of = {name: family for family in FAMILIES.values() for name in family.architectures}
    architectures = read.take("architectures", list, [])
    if len(architectures) > 1 or not all(isinstance(a, str) and a in of for a in architectures):
        accepted = sorted((*of, *WITH_VISION))
        raise ConfigError(f"architectures: {architectures} is not supported; accepted: {accepted}")
    model_type = read.take("model_type", str, of[architectures[0]].name if architectures else "llama")
    accepted = [of[a].name for a in architectures] or sorted(FAMILIES)
    if model_type not in accepted:
        raise ConfigError(f"model_type: {model_type!r} is not supported; accepted: {', '.join(map(repr, accepted))}")
    return FAMILIES[model_type].read_config(read)


def _text_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of the text model, with those beside it that are its own."""
    architectures, text = fields.get("architectures"), fields.get("text_config")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if not isinstance(name, str) or name not in WITH_VISION:
        return fields
    if not isinstance(text, dict) or fields.get("model_type") != WITH_VISION[name]:
        raise ConfigError(f"text_config: {name} needs one, beside model_type {WITH_VISION[name]!r}")
    beside = {k: v for k, v in fields.items() if k not in _OF_VISION | {"text_config", "architectures", "model_type"}}
    return {**beside, **text}


def read_config(path: str | Path) -> ModelConfig:
    """Reads a `config.json`. Raises ConfigError naming the file."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path}: no such file; a model folder needs a config.json")
    fields = read_json_object(path)
    beside = path.with_name("hf_quant_config.json")  # ModelOpt's, which newer versions repeat in config.json
    if fields.get("quantization_config") is None and beside.is_file():
        fields["quantization_config"] = {"quant_method": "modelopt", **read_json_object(beside)}
    try:
        return parse_config(fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


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
    return Path(model).name if named_by_folder else path.stem, read_config(path)
