"""config.json files as they are published, of the LLaMA architecture and of its relatives: each loads as what it is, or
is refused with the reason. The fields are those of the public files; sizes are theirs, too."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow_jax import LLM
from nanoflow_jax.config import ConfigError
from nanoflow_jax.models.registry import parse_config
from tests.scripted import LLAMA2_CONFIG, llama2, write_model

Fields = dict[str, Any]

# What nearly all of them have, as transformers 4.3x to 4.4x writes it.
COMMON: Fields = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "initializer_range": 0.02,
    "pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-05,
}  # fmt: skip
LLAMA3_ROPE = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip


def published(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, length: int, **more: Any
) -> Fields:
    sizes = {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": length,
    }  # fmt: skip
    return {**COMMON, **sizes, **more}


# What transformers before 4.50 wrote of its base class when a config was dumped whole (`to_dict`).
BASE_CLASS: Fields = {
    "add_cross_attention": False, "bad_words_ids": None, "begin_suppress_tokens": None, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None, "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False,
    "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None,
    "finetuning_task": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False, "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20, "min_length": 0,
    "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
    "output_attentions": False, "output_hidden_states": False, "output_scores": False, "prefix": None,
    "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0,
    "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None,
    "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torchscript": False, "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip

QWEN: Fields = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
    "initializer_range": 0.02, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
}  # fmt: skip
QWEN2: Fields = {
    **QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "transformers_version": "4.43.1",
    "max_window_layers": 70, "sliding_window": 131072, "vocab_size": 152064, "max_position_embeddings": 32768,
}  # fmt: skip
QWEN25_32B: Fields = {
    **QWEN2, "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_hidden_layers": 64,
}  # fmt: skip
QWEN3: Fields = {
    **QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "transformers_version": "4.51.0",
    "attention_bias": False, "head_dim": 128, "rope_scaling": None, "sliding_window": None, "vocab_size": 151936,
    "max_position_embeddings": 40960,
}  # fmt: skip

# name: (config.json, parameters in millions, tokens of a sequence)
LOADS: dict[str, tuple[Fields, int, int]] = {
    "SmolLM2-135M": (
        published(
            49152, 576, 1536, 30, 9, 3, 8192, is_llama_config=True, rope_interleaved=False, rope_theta=100000,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, mlp_bias=False, pad_token_id=2,
            **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}},
        ),
        135, 8192,
    ),
    "TinyLlama-1.1B": (published(32000, 2048, 5632, 22, 32, 4, 2048), 1100, 2048),
    "TinyLlama-1.1B, dumped whole": (
        published(
            32000, 2048, 5632, 22, 32, 4, 2048, _name_or_path="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            _attn_implementation_autoset=False, attribute_map={}, head_dim=64, **BASE_CLASS,
        ),
        1100, 2048,
    ),
    "Llama-2-7b-chat": (
        published(32000, 4096, 11008, 32, 32, 32, 4096, torch_dtype="float16", pad_token_id=0, max_length=4096),
        6738, 4096,
    ),
    "Yi-34B": (
        published(64000, 7168, 20480, 60, 56, 8, 4096, rope_theta=5000000.0, pad_token_id=0), 34389, 4096,
    ),
    "Yi-1.5-9B": (
        published(64000, 4096, 11008, 48, 32, 4, 4096, rope_theta=5000000.0, rms_norm_eps=1e-06, pad_token_id=0),
        8829, 4096,
    ),
    "DeepSeek-LLM-7B": (
        published(
            102400, 4096, 11008, 30, 32, 32, 4096, bos_token_id=100000, eos_token_id=100001, rms_norm_eps=1e-06,
            rope_theta=10000.0,
        ),
        6910, 4096,
    ),
    "DeepSeek-Coder-6.7B": (
        published(
            32256, 4096, 11008, 32, 32, 32, 16384, bos_token_id=32013, eos_token_id=32014, rms_norm_eps=1e-06,
            rope_scaling={"factor": 4.0, "type": "linear"}, rope_theta=100000,
        ),
        6740, 65536,
    ),
    "DeepSeek-R1-Distill-Llama-8B": (
        published(
            128256, 4096, 14336, 32, 32, 8, 131072, bos_token_id=128000, eos_token_id=128001, mlp_bias=False,
            rope_scaling=LLAMA3_ROPE, rope_theta=500000.0,
        ),
        8030, 131072,
    ),
    "Vicuna-7b-v1.5-16k": (
        published(
            32000, 4096, 11008, 32, 32, 32, 4096, _name_or_path="vicuna-7b-v1.5-16k", max_sequence_length=16384,
            rope_scaling={"factor": 4.0, "type": "linear"}, torch_dtype="float16", pad_token_id=0,
        ),
        6738, 16384,
    ),
    "LongChat-7b-16k": (
        published(
            32000, 4096, 11008, 32, 32, 32, 2048, max_sequence_length=16384, rms_norm_eps=1e-06,
            rope_scaling={"factor": 8.0, "type": "linear"}, torch_dtype="float16",
        ),
        6738, 16384,
    ),
    "Hermes-3-Llama-3.1-8B": (
        published(
            128256, 4096, 14336, 32, 32, 8, 131072, bos_token_id=128000, eos_token_id=128040, mlp_bias=False,
            _name_or_path="meta-llama/Llama-3.1-8B", rope_scaling=LLAMA3_ROPE, rope_theta=500000.0,
        ),
        8030, 131072,
    ),
    "Llama-3.1-Nemotron-70B-Instruct": (
        published(
            128256, 8192, 28672, 80, 64, 8, 131072, bos_token_id=128000, eos_token_id=[128001, 128008, 128009],
            mlp_bias=False, rope_scaling=LLAMA3_ROPE, rope_theta=500000.0,
        ),
        70554, 131072,
    ),
    "Llama-3.2-1B, as Unsloth has it": (
        published(
            128256, 2048, 8192, 16, 32, 8, 131072, bos_token_id=128000, eos_token_id=128009, head_dim=64,
            mlp_bias=False, pad_token_id=128004, rope_scaling={**LLAMA3_ROPE, "factor": 32.0}, rope_theta=500000.0,
            tie_word_embeddings=True, unsloth_fixed=True, _commit_hash="4e20de3",
        ),
        1236, 131072,
    ),
    "Granite-3B-Code": (
        published(
            49152, 2560, 10240, 32, 32, 32, 2048, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=0, rope_theta=10000000,
        ),
        3482, 2048,
    ),
    "Falcon3-7B": (
        published(
            131072, 3072, 23040, 28, 12, 4, 32768, activation="swiglu", head_dim=256, bos_token_id=11, eos_token_id=11,
            mlp_bias=False, rms_norm_eps=1e-06, rope_theta=1000042,
        ),
        7456, 32768,
    ),
    "CodeLlama-7b": (
        published(32016, 4096, 11008, 32, 32, 32, 16384, rope_theta=1000000, torch_dtype="bfloat16"), 6738, 16384,
    ),
    "LLaMA-2-7B-32K, whose code of its own transformers does not take": (
        published(
            32000, 4096, 11008, 32, 32, 32, 32768, rope_scaling={"factor": 8.0, "type": "linear"}, pad_token_id=0,
            auto_map={"AutoModelForCausalLM": "modeling_flash_llama.LlamaForCausalLM"}, torch_dtype="float16",
        ),
        6738, 262144,
    ),
    "a file of transformers 5": (
        {
            **{k: v for k, v in published(128256, 2048, 8192, 16, 32, 8, 131072).items()
               if k not in ("rope_scaling", "torch_dtype")},
            "dtype": "bfloat16", "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}, "head_dim": 64,
            "layer_types": ["full_attention"] * 16, "tie_word_embeddings": True, "mlp_bias": False,
            "sliding_window": None, "max_window_layers": None,
        },
        1236, 131072,
    ),
    "Yarn-Llama-2-7b-128k": (
        published(
            32000, 4096, 11008, 32, 32, 32, 131072,
            rope_scaling={"factor": 32.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True},
        ),
        6738, 131072,
    ),
    "Granite 3, whose multipliers scale the residual": (
        published(
            49155, 4096, 12800, 40, 32, 8, 4096, architectures=["GraniteForCausalLM"], model_type="granite",
            attention_multiplier=0.0078125, embedding_multiplier=12.0, logits_scaling=16.0, residual_multiplier=0.22,
            tie_word_embeddings=True,
        ),
        8171, 4096,
    ),
    "Qwen2.5-32B-Instruct": (QWEN25_32B, 32764, 32768),
    "Qwen2.5-32B-Instruct, as its card lengthens it": (
        {**QWEN25_32B, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
        32764, 131072,
    ),
    "Qwen2.5-72B-Instruct": (
        {**QWEN2, "hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_hidden_layers": 80},
        72706, 32768,
    ),
    "Qwen3-8B": (
        {
            **QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
            "num_hidden_layers": 36, "max_window_layers": 36,
        },
        8191, 40960,
    ),
    "Qwen3-32B": (
        {
            **QWEN3, "hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64,
            "num_hidden_layers": 64, "max_window_layers": 64,
        },
        32762, 40960,
    ),
    "Llama-3.1-405B-Instruct-FP8": (
        published(
            128256, 16384, 53248, 126, 128, 8, 131072, rope_scaling=LLAMA3_ROPE, rope_theta=500000.0,
            quantization_config={
                "activation_scale_ub": 1200.0, "quant_method": "fbgemm_fp8",
                "modules_to_not_convert": ["lm_head", *(f"model.layers.{i}.self_attn.q_proj" for i in range(126))],
            },
        ),
        405853, 131072,
    ),
    "Qwen3-8B-FP8": (
        {
            **QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
            "num_hidden_layers": 36, "max_window_layers": 36,
            "quantization_config": {
                "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
            },
        },
        8191, 40960,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADS)
def test_published_files_load(name: str) -> None:
    fields, millions, length = LOADS[name]
    config = parse_config(fields)
    assert round(config.num_params / 1e6) == pytest.approx(millions, abs=1)
    assert config.max_length == length
    assert config.eos_token_ids and config.num_layers == fields["num_hidden_layers"]


def with_vision(name: str, model_type: str, text: Fields, **beside: Any) -> Fields:
    return {
        "architectures": [f"{name}ForConditionalGeneration"], "model_type": model_type, "text_config": text,
        "vision_config": {"hidden_size": 1152}, "image_token_index": 10, "torch_dtype": "bfloat16", **beside,
    }  # fmt: skip


def kinds(layers: int, every: int) -> list[str]:
    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]


GEMMA3_27B = {
    "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text",
    "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
}  # fmt: skip
OF_GEMMA3 = {"boi_token_index": 255999, "eoi_token_index": 256000, "mm_tokens_per_image": 256, "eos_token_id": [1, 106]}
WINDOWED: dict[str, tuple[Fields, float, int, list[int | None]]] = {
    "Gemma 3 27B": (with_vision("Gemma3", "gemma3", GEMMA3_27B, **OF_GEMMA3), 27009, 131072, [1024] * 5 + [None]),
    "Gemma 3 27B, a newer revision": (
        with_vision(
            "Gemma3", "gemma3",
            {
                **GEMMA3_27B, "rope_scaling": None, "_sliding_window_pattern": 6, "attn_logit_softcapping": None,
                "final_logit_softcapping": None, "rope_local_base_freq": 10000, "rope_theta": 1000000,
                "vocab_size": 262208, "layer_types": kinds(62, 6), "max_position_embeddings": 131072,
                "rope_parameters": {
                    "full_attention": {"factor": 8.0, "rope_type": "linear"},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            **OF_GEMMA3,
        ),
        27009, 131072, [1024] * 5 + [None],
    ),
    "OLMo 3 32B": (
        published(
            100278, 5120, 27648, 64, 40, 8, 65536, architectures=["Olmo3ForCausalLM"], model_type="olmo3",
            sliding_window=4096, layer_types=kinds(64, 4), rope_theta=500000, rms_norm_eps=1e-06,
            rope_scaling={
                "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                "original_max_position_embeddings": 8192, "rope_type": "yarn",
            },
        ),
        32234, 65536, [4096] * 3 + [None],
    ),
    "Ministral 3 14B": (
        with_vision(
            "Mistral3", "mistral3",
            {
                "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 16384,
                "max_position_embeddings": 262144, "model_type": "ministral3", "num_attention_heads": 32,
                "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "sliding_window": None,
                "tie_word_embeddings": False, "vocab_size": 131072, "attention_dropout": 0.0,
                "rope_parameters": {
                    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
                    "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1e9,
                    "rope_type": "yarn", "type": "yarn",
                },
            },
            tie_word_embeddings=False, multimodal_projector_bias=False, projector_hidden_act="gelu",
            spatial_merge_size=2, vision_feature_layer=-1,
        ),
        13506, 262144, [None],
    ),
    "Mistral 7B v0.1": (
        published(
            32000, 4096, 14336, 32, 32, 8, 32768, architectures=["MistralForCausalLM"], model_type="mistral",
            sliding_window=4096, attention_bias=None,
        ),
        7242, 32768, [4096],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWED)
def test_published_files_with_windows_load(name: str) -> None:
    """And those whose text model is one of the families, beside a vision tower."""
    fields, millions, length, windows = WINDOWED[name]
    config = parse_config(fields)
    assert round(config.num_params / 1e6) == millions
    assert config.max_length == length
    assert [layer.attention.window for layer in config.pattern] == windows


def test_ropes_by_kind_of_layer() -> None:
    """Two dialects of one model; what the file leaves out has defaults of its own for each kind."""
    for name in ("Gemma 3 27B", "Gemma 3 27B, a newer revision"):
        ropes = [layer.attention.rope for layer in parse_config(WINDOWED[name][0]).pattern]
        assert [(rope.kind, rope.theta, rope.factor) for rope in ropes] == [("default", 1e4, 1.0)] * 5 + [
            ("linear", 1e6, 8.0)
        ]
    ropes = [layer.attention.rope for layer in parse_config(WINDOWED["OLMo 3 32B"][0]).pattern]
    assert [(rope.kind, rope.theta) for rope in ropes] == [("default", 5e5)] * 3 + [("yarn", 5e5)]


# name: (config.json, the field that is named and what is accepted). Each would give other logits.
REFUSED: dict[str, tuple[Fields, str]] = {
    "Granite 3 under LLaMA's name": (
        published(49155, 4096, 12800, 40, 32, 8, 4096, embedding_multiplier=12.0),
        r"^embedding_multiplier: 12\.0 is not supported; accepted: 1$",
    ),
    "Llama-3.1-Nemotron-51B, whose layers differ": (
        published(128256, 8192, 28672, 80, 64, 8, 131072, architectures=["DeciLMForCausalLM"], block_configs=[]),
        r"^architectures: \['DeciLMForCausalLM'\]",
    ),
    "Qwen2.5-VL's rope of three positions": (
        {**QWEN25_32B, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
        r"^rope_scaling\.rope_type: 'mrope' is not supported; accepted: 'default', 'linear', 'llama3', 'yarn', ",
    ),
    "Gemma, which is another family": (
        published(256000, 2048, 16384, 18, 8, 1, 8192, architectures=["GemmaForCausalLM"], model_type="gemma"),
        r"^architectures: \['GemmaForCausalLM'\] is not supported; accepted: \['Gemma3ForCausalLM', 'Gemma3.*'Seed",
    ),
    "Qwen2.5-32B-Instruct-AWQ": (
        {**QWEN25_32B, "quantization_config": {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm"}},
        r"^quantization_config\.quant_method: 'awq' is not supported; accepted: 'compressed-tensors', ",
    ),
    "interleaved rotary pairs": (
        published(49152, 576, 1536, 30, 9, 3, 8192, rope_interleaved=True), r"^rope_interleaved: True is not supported",
    ),
    "a sliding window": (
        published(32000, 4096, 14336, 32, 32, 8, 32768, sliding_window=4096), r"^sliding_window: 4096 is not supported",
    ),
    "layers of several kinds": (
        published(
            32000, 4096, 14336, 2, 32, 8, 32768, layer_types=["full_attention", "sliding_attention"],
        ),
        r"^layer_types: 'sliding_attention' is not supported; accepted: 'full_attention' in every layer$",
    ),
    "a norm of queries and keys": (
        published(32000, 4096, 14336, 32, 32, 8, 32768, use_qk_norm=True), r"^use_qk_norm: True is not supported",
    ),
    "another activation": (
        published(32000, 4096, 14336, 32, 32, 8, 32768, hidden_act="relu2"), r"^hidden_act: 'relu2' is not supported",
    ),
    "experts": (published(32000, 4096, 14336, 32, 32, 8, 32768, num_experts=8), r"^num_experts: unknown field"),
    "a field that nobody knows": (
        published(32000, 4096, 14336, 32, 32, 8, 32768, key_value_sharing=2),
        r"^key_value_sharing: unknown field \(value 2\); this library would have to ignore it$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_published_files_that_would_give_other_logits_are_refused(name: str) -> None:
    fields, told = REFUSED[name]
    with pytest.raises(ConfigError, match=told):
        parse_config(fields)


def test_linear_scaling_lengthens_the_model(tmp_path: Any) -> None:
    """Vicuna's 4096 positions are 16,384 tokens: by default, and as the most that may be asked for."""
    made = llama2()
    scaled = {"max_position_embeddings": 32, "rope_scaling": {"type": "linear", "factor": 4.0}}
    folder = str(write_model(tmp_path, made, LLAMA2_CONFIG, {}, 2, **scaled))
    options: dict[str, Any] = {
        "tensor_parallel_size": 1, "tokens_per_step": 32, "decode_slots": 8, "page_size": 16, "kv_cache_tokens": 256,
        "progress": False,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"^max_model_len: 129; accepted: 2 to the model's 128$"):
        LLM(folder, max_model_len=129, **options)
    assert LLM(folder, **options).max_model_len == 128
