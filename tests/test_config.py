"""config.json files: every published dialect is read; what would have to be ignored is an error naming the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanoflow_jax.config import Attention, ConfigError, Layer, Mlp, ModelConfig, RopeConfig, config_path, configs_root
from nanoflow_jax.models.registry import parse_config, read_config

SIZES: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
LLAMA3_ROPE: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def parse(**fields: Any) -> ModelConfig:
    return parse_config({**SIZES, **fields})


def rope_of(config: ModelConfig) -> RopeConfig:
    """The one kind of all its layers."""
    (layer,) = config.pattern
    return layer.attention.rope


# The fields of the published files, as their config.json spells them.
LLAMA_2_7B: dict[str, Any] = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_3_1_8B = {
    **LLAMA_3_8B,
    "mlp_bias": False,
    "max_position_embeddings": 131072,
    "rope_scaling": LLAMA3_ROPE,
    "eos_token_id": [128001, 128008, 128009],
}
LLAMA_3_2_1B = {
    **LLAMA_3_1_8B,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0},
    "tie_word_embeddings": True,
}
LLAMA_3_3_70B = {
    **LLAMA_3_1_8B,
    "head_dim": 128,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}


@pytest.mark.parametrize(
    ("fields", "billions", "rope", "dtype"),
    [
        (LLAMA_2_7B, 6.738, RopeConfig(), "float16"),
        (LLAMA_3_8B, 8.030, RopeConfig(theta=500000.0), "bfloat16"),
        (LLAMA_3_1_8B, 8.030, RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 8192), "bfloat16"),
        (LLAMA_3_2_1B, 1.236, RopeConfig("llama3", 500000.0, 32.0, 1.0, 4.0, 8192), "bfloat16"),
        (LLAMA_3_3_70B, 70.554, RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 8192), "bfloat16"),
    ],
)
def test_published_files(fields: dict[str, Any], billions: float, rope: RopeConfig, dtype: str) -> None:
    """Llama 2, 3, 3.1, 3.2 and 3.3 parse, and have the published number of weights."""
    config = parse_config(fields)
    assert config.num_params / 1e9 == pytest.approx(billions, abs=0.0006)
    assert rope_of(config) == rope
    assert config.dtype == dtype
    assert config.head_dim == (64 if fields is LLAMA_3_2_1B else 128)
    assert config.tie_word_embeddings is (fields is LLAMA_3_2_1B)
    assert config.rms_norm_eps == 1e-5


@pytest.mark.parametrize(
    ("name", "billions", "kv_heads"),
    [
        ("llama_2_70b", 68.98, 8),
        ("llama_3_1_8b", 8.03, 8),
        ("llama_3_1_70b", 70.55, 8),
        ("qwen2_5_32b", 32.76, 8),
        ("qwen2_5_72b", 72.71, 8),
        ("qwen3_32b", 32.76, 8),
        ("mistral_large_2411", 122.61, 8),
        ("olmo_3_32b", 32.23, 8),
        ("gemma_3_27b", 27.01, 16),  # the text model
    ],
)
def test_configs_of_the_repository(name: str, billions: float, kv_heads: int) -> None:
    """configs/models/*.json parse and have the published number of weights."""
    config = read_config(config_path("models", name))
    assert config.num_params / 1e9 == pytest.approx(billions, abs=0.006)
    assert config.num_kv_heads == kv_heads


def test_defaults() -> None:
    """A file with the sizes only: Hugging Face's defaults."""
    assert parse() == ModelConfig(
        family="llama",
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=8,
        num_kv_heads=8,
        head_dim=8,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        pattern=(Layer(Attention(RopeConfig("default", 10000.0)), Mlp()),),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_ids=(),
        dtype="bfloat16",
    )
    assert parse(head_dim=None, rope_scaling=None, dtype=None, eos_token_id=None) == parse()  # null is absent


def test_fields_that_count() -> None:
    """Each field that changes the answer reaches the config."""
    assert parse(eos_token_id=2).eos_token_ids == (2,)
    assert parse(eos_token_id=[2, 3]).eos_token_ids == (2, 3)
    assert parse(bos_token_id=1).bos_token_id == 1
    assert parse(num_key_value_heads=2).heads_per_kv_head == 4
    assert parse(head_dim=16).head_dim == 16
    assert parse(rms_norm_eps=0.05).rms_norm_eps == 0.05
    assert parse(torch_dtype="float32").dtype == parse(dtype="float32").dtype == "float32"
    assert parse(torch_dtype="float16", dtype="float16").dtype == "float16"
    base = parse().num_params
    assert base == 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 2 * 96 * 64 + 64
    assert parse(tie_word_embeddings=True).num_params == base - 96 * 64
    assert parse(attention_bias=True).num_params == base + 2 * 4 * 64
    assert parse(mlp_bias=True).num_params == base + 2 * (2 * 128 + 64)
    assert parse(num_key_value_heads=2).num_params == base - 2 * 2 * 64 * 48
    assert parse(head_dim=16).num_params == base + 2 * 4 * 64 * 64


@pytest.mark.parametrize(
    ("old", "new", "want"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}, RopeConfig()),
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_theta": 500000}, {"rope_theta": 500000, "rope_type": "default"}, RopeConfig(theta=5e5)),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 1e4},
            {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            RopeConfig("linear", 1e4, 4.0),
        ),
        (
            {"rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5},
            {**LLAMA3_ROPE, "rope_theta": 5e5},
            RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 8192),
        ),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3_ROPE}, "rope_theta": 5e5},
            {**LLAMA3_ROPE, "type": "llama3", "rope_theta": 5e5},
            RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_rope_dialects(old: dict[str, Any], new: dict[str, Any], want: RopeConfig) -> None:
    """rope_scaling + rope_theta of older files, and rope_parameters of transformers 5, say the same."""
    assert rope_of(parse(**old)) == want
    assert rope_of(parse(rope_parameters=new)) == want


def test_llama3_rope_falls_back_to_max_position_embeddings() -> None:
    scaling = {k: v for k, v in LLAMA3_ROPE.items() if k != "original_max_position_embeddings"}
    assert rope_of(parse(rope_scaling=scaling, max_position_embeddings=512)).original_max_position_embeddings == 512


def llama3_rope(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**LLAMA3_ROPE, **changes}.items() if v is not ...}


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        # architecture
        (
            {"architectures": ["GemmaForCausalLM"]},
            "architectures",
            "accepted: ['Gemma3ForCausalLM', 'Gemma3ForCond",
        ),
        ({"architectures": ["LlamaForCausalLM", "X"]}, "architectures", "accepted: ['Gemma3ForCausalLM', 'Gemma3"),
        ({"architectures": "LlamaForCausalLM"}, "architectures", "must be list"),
        ({"model_type": "mistral"}, "model_type", "accepted: 'llama'"),
        # unknown fields, and known ones at values that would change the answer
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping", "is not supported; accepted: None"),
        ({"num_experts": 8}, "num_experts", "unknown field"),
        ({"hidden_act": "gelu"}, "hidden_act", "accepted: 'silu'"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config.quant_method",
            "accepted: 'compressed-",
        ),
        ({"quantization_config": "fp8"}, "quantization_config", "must be dict, not str"),
        ({"sliding_window": 4096}, "sliding_window", "accepted: None"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder", "accepted: False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "accepted: 1"),
        ({"rope_interleaved": True}, "rope_interleaved", "accepted: False"),
        # missing, wrong type, out of range
        ({"vocab_size": None}, "vocab_size", "missing"),
        ({"hidden_size": None}, "hidden_size", "missing"),
        ({"intermediate_size": None}, "intermediate_size", "missing"),
        ({"num_hidden_layers": None}, "num_hidden_layers", "missing"),
        ({"num_attention_heads": None}, "num_attention_heads", "missing"),
        ({"hidden_size": "64"}, "hidden_size", "must be int, not str"),
        ({"hidden_size": 64.0}, "hidden_size", "must be int, not float"),
        ({"num_hidden_layers": True}, "num_hidden_layers", "must be int, not bool"),
        ({"num_hidden_layers": 0}, "num_hidden_layers", "positive integer"),
        ({"vocab_size": -96}, "vocab_size", "positive integer"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps", "must be int or float"),
        ({"rms_norm_eps": 0}, "rms_norm_eps", "positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps", "positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings", "must be bool"),
        ({"attention_bias": "no"}, "attention_bias", "must be bool"),
        ({"eos_token_id": "</s>"}, "eos_token_id", "must be int or list"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id", "token id"),
        ({"eos_token_id": -1}, "eos_token_id", "token id"),
        ({"bos_token_id": [1]}, "bos_token_id", "must be int"),
        # sizes that do not fit each other
        ({"num_key_value_heads": 3}, "num_key_value_heads", "must divide num_attention_heads = 8"),
        ({"num_key_value_heads": 16}, "num_key_value_heads", "must divide num_attention_heads = 8"),
        ({"head_dim": 7}, "head_dim", "must be even"),
        # dtype
        ({"dtype": "int8"}, "dtype", "accepted: 'float32', 'bfloat16', 'float16'"),
        ({"torch_dtype": "float64"}, "dtype", "accepted: 'float32', 'bfloat16', 'float16'"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "dtype", "contradicts torch_dtype = 'bfloat16'"),
        # rope, in both dialects
        ({"rope_theta": -1.0}, "rope_theta", "positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling", "must be dict"),
        ({"rope_parameters": [1]}, "rope_parameters", "must be dict"),
        (
            {"rope_scaling": {"type": "ntk", "factor": 2.0}},
            "rope_scaling.rope_type",
            "'ntk' is not supported; accepted: ",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor", "positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor", "positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "rope_scaling.beta", "unknown field"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_parameters.rope_theta", "must be int or float"),
        ({"rope_scaling": llama3_rope(factor=...)}, "rope_scaling.factor", "positive number"),
        ({"rope_scaling": llama3_rope(low_freq_factor=...)}, "rope_scaling.low_freq_factor", "positive number"),
        ({"rope_parameters": llama3_rope(high_freq_factor=...)}, "rope_parameters.high_freq_factor", "positive number"),
        ({"rope_parameters": llama3_rope(high_freq_factor=1.0)}, "rope_parameters.high_freq_factor", "must be above"),
        (
            {"rope_parameters": llama3_rope(original_max_position_embeddings=8192.5)},
            "rope_parameters.original_max_position_embeddings",
            "must be int",
        ),
        (
            {"rope_scaling": LLAMA3_ROPE, "rope_parameters": {"rope_type": "default"}},
            "rope_parameters",
            "given together with a different rope_scaling",
        ),
    ],
)
def test_errors_name_the_field(fields: dict[str, Any], field: str, says: str, tmp_path: Path) -> None:
    """One line: the file, the field, and what would be accepted."""
    with pytest.raises(ConfigError) as caught:
        parse(**fields)
    message = str(caught.value)
    assert message.startswith(field + ":")
    assert says in message
    assert "\n" not in message
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**SIZES, **fields}))
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: {field}:")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"vocab_size": 96,', "not valid JSON"),
        (b"\xff\xfe", "not UTF-8 text (byte 0)"),
        (b"[1]", "must hold a JSON object, not list"),
    ],
)
def test_damaged_file(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: {says}")
    assert "\n" not in str(caught.value)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "config.json")
    assert str(caught.value) == f"{tmp_path / 'config.json'}: no such file; a model folder needs a config.json"


def test_config_path(tmp_path: Path) -> None:
    """A name is looked up in configs/, anything like a path is the user's; errors list what there is."""
    assert config_path("plans", "two_all_reduce") == configs_root() / "plans" / "two_all_reduce.toml"
    mine = tmp_path / "mine.toml"
    mine.touch()
    assert config_path("plans", str(mine)) == mine
    with pytest.raises(
        ConfigError, match=r"^plans: unknown name 'fastest'; accepted: .*two_all_reduce.*or a path to a file$"
    ):
        config_path("plans", "fastest")
    with pytest.raises(ConfigError, match=r"^plans: no file '.*absent.toml'$"):
        config_path("plans", str(tmp_path / "absent.toml"))
