"""Cases of the dense families beside LLaMA, and of the RoPE kinds that LLaMA's own cases leave out.

Between them: windows shorter than the prompts, layers of two kinds in uneven numbers, 1 to 8 KV heads, both dialects of
config.json (cases.py), tied and untied heads, every bias, norm and multiplier of each family, and fields that must be
ignored. make_reference.py refuses a case in which leaving one of these out would hardly show.
"""

from __future__ import annotations

from typing import Any

from cases import Case, make_config

_MISTRAL, _MINISTRAL3 = ("Mistral", "mistral"), ("Ministral3", "ministral3")
_QWEN2, _QWEN3, _SEED_OSS = ("Qwen2", "qwen2"), ("Qwen3", "qwen3"), ("SeedOss", "seed_oss")
_GRANITE, _OLMO2, _OLMO3 = ("Granite", "granite"), ("Olmo2", "olmo2"), ("Olmo3", "olmo3")
_GEMMA3 = ("Gemma3", "gemma3_text")
_FULL, _SLIDING = "full_attention", "sliding_attention"
_BASE: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "max_position_embeddings": 256}


def _default_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


FAMILY_CASES: dict[str, Case] = {
    "mistral_window": Case(
        "v0.1 style: window of 8 in every layer, old dialect, 8 query heads on 2 KV heads; bfloat16 file",
        make_config(
            64, 128, 3, 8, 80, _MISTRAL, **_BASE,
            num_key_value_heads=2, head_dim=None, rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=8,
            tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.34.0.dev0", use_cache=True,
        ),
        file_dtype="bfloat16",
    ),
    "mistral_head_dim": Case(
        "Nemo and Large style: no window, head_dim 16 where hidden_size / heads is 8, 1 KV head, an eps that matters",
        make_config(
            64, 96, 2, 8, 88, _MISTRAL, **_BASE,
            num_key_value_heads=1, head_dim=16, rms_norm_eps=0.25, sliding_window=None, tie_word_embeddings=False,
            rope_parameters=_default_rope(1e6), dtype="float32",
        ),
        seed=1, shards=2,
    ),
    "ministral3": Case(
        "yarn with mscale = mscale_all_dim (attention factor 1), queries scaled by position, 4 KV heads",
        make_config(
            64, 112, 3, 8, 80, _MINISTRAL3, **_BASE,
            num_key_value_heads=4, head_dim=16, rms_norm_eps=1e-05, sliding_window=None, tie_word_embeddings=False,
            rope_parameters={
                "type": "yarn", "rope_type": "yarn", "rope_theta": 1000.0, "factor": 16.0, "beta_fast": 32.0,
                "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
                "max_position_embeddings": 256, "llama_4_scaling_beta": 0.5,
            },
        ),
    ),
    "ministral3_tied": Case(
        "tied; yarn spelled 'type' with mscale unlike mscale_all_dim, queries scaled every 9 positions, 16 heads on 2",
        make_config(
            64, 112, 2, 16, 80, _MINISTRAL3, **_BASE,
            num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-05, sliding_window=None, tie_word_embeddings=True,
            rope_parameters={
                "type": "yarn", "rope_theta": 300.0, "factor": 12.0, "beta_fast": 32.0, "beta_slow": 0.25,
                "mscale": 1.0, "mscale_all_dim": 0.25, "original_max_position_embeddings": 9,
                "llama_4_scaling_beta": 0.3,
            },
        ),
        seed=7,
    ),
    "qwen2_biases": Case(
        "Qwen2.5 style: biases on q, k and v alone; the window is given but not used; old dialect, untied",
        make_config(
            64, 128, 2, 8, 80, _QWEN2, **_BASE,
            num_key_value_heads=2, attention_dropout=0.0, max_window_layers=1, rms_norm_eps=1e-06, rope_theta=1000000.0,
            sliding_window=8, use_sliding_window=False, tie_word_embeddings=False, torch_dtype="bfloat16",
        ),
        seed=1, file_dtype="bfloat16", shards=2,
    ),
    "qwen2_window": Case(
        "a window of 8 from layer 2 of 5 on (use_sliding_window, max_window_layers), tied, 16 heads on 4 KV heads",
        make_config(
            64, 96, 5, 16, 72, _QWEN2, **_BASE,
            num_key_value_heads=4, max_window_layers=2, rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=8,
            use_sliding_window=True, tie_word_embeddings=True,
        ),
        seed=15,
    ),
    "qwen2_yarn": Case(
        "yarn in the old dialect as Qwen2.5's model card has it: attention factor 0.1 ln(factor) + 1",
        make_config(
            64, 128, 2, 8, 80, _QWEN2, **{**_BASE, "max_position_embeddings": 16},
            num_key_value_heads=1, max_window_layers=1, rms_norm_eps=1e-06, rope_theta=1000.0, sliding_window=8,
            rope_scaling={"factor": 8.0, "original_max_position_embeddings": 16, "type": "yarn"},
            use_sliding_window=False, tie_word_embeddings=False,
        ),
        seed=2,
    ),
    "qwen2_yarn_fields": Case(
        "yarn with every field, not truncated, in the new dialect; layer_types say which of 3 layers slide",
        make_config(
            64, 128, 3, 8, 80, _QWEN2, **_BASE,
            num_key_value_heads=4, head_dim=16, rms_norm_eps=1e-06, sliding_window=12, use_sliding_window=True,
            max_window_layers=3, layer_types=[_SLIDING, _FULL, _SLIDING], tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 100.0, "factor": 10.0, "attention_factor": 0.9, "beta_fast": 1.25,
                "beta_slow": 0.2, "original_max_position_embeddings": 24, "truncate": False,
            },
        ),
        seed=2,
    ),
    "qwen3": Case(
        "norms over each head of q and k, head_dim 16, an eps that matters in them, old dialect, 1 KV head",
        make_config(
            64, 128, 3, 8, 80, _QWEN3, **_BASE,
            num_key_value_heads=1, head_dim=16, attention_bias=False, max_window_layers=3, rms_norm_eps=0.05,
            rope_scaling=None, rope_theta=1000000.0, sliding_window=None, use_sliding_window=False,
            tie_word_embeddings=False, torch_dtype="bfloat16",
        ),
        seed=1, file_dtype="bfloat16",
    ),
    "qwen3_window_biases": Case(
        "biases on q, k, v and O, a window of 12 from layer 1 of 3 on, tied, new dialect, 16 heads on 2 KV heads",
        make_config(
            64, 96, 3, 16, 80, _QWEN3, **_BASE,
            num_key_value_heads=2, head_dim=8, attention_bias=True, max_window_layers=1, rms_norm_eps=1e-06,
            rope_parameters=_default_rope(10000.0), sliding_window=12, use_sliding_window=True,
            tie_word_embeddings=True,
        ),
        seed=4,
    ),
    "seed_oss": Case(
        "biases on q, k and v by default, none on O; dropouts that inference ignores; old dialect, 1 KV head",
        make_config(
            64, 128, 2, 8, 80, _SEED_OSS, **_BASE,
            num_key_value_heads=1, head_dim=16, attention_dropout=0.1, residual_dropout=0.1, rms_norm_eps=1e-06,
            rope_scaling={"rope_type": "default"}, rope_theta=10000000.0, tie_word_embeddings=False,
        ),
        seed=7,
    ),
    "seed_oss_biases": Case(
        "biases on O and the MLP, none on q, k and v; tied, new dialect, 8 query heads on 4 KV heads",
        make_config(
            64, 128, 2, 8, 80, _SEED_OSS, **_BASE,
            num_key_value_heads=4, head_dim=8, attention_bias=False, attention_out_bias=True, mlp_bias=True,
            rms_norm_eps=1e-06, rope_parameters=_default_rope(10000.0), tie_word_embeddings=True,
        ),
        seed=14,
    ),
    "granite": Case(
        "3.x style: the four multipliers, tied, old dialect, 8 query heads on 2 KV heads",
        make_config(
            64, 128, 3, 8, 80, _GRANITE, **_BASE,
            num_key_value_heads=2, attention_bias=False, attention_dropout=0.1, attention_multiplier=0.625,
            embedding_multiplier=12.0, logits_scaling=16.0, mlp_bias=False, residual_multiplier=0.6,
            rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=True,
        ),
        seed=7,
    ),
    "granite_biases": Case(
        "whole multipliers, biases everywhere, untied, new dialect, head_dim given, 16 query heads on 4 KV heads",
        make_config(
            64, 96, 2, 16, 80, _GRANITE, **_BASE,
            num_key_value_heads=4, head_dim=8, attention_bias=True, attention_multiplier=1, embedding_multiplier=6,
            logits_scaling=8, mlp_bias=True, residual_multiplier=0.22, rms_norm_eps=1e-05,
            rope_parameters=_default_rope(10000.0), tie_word_embeddings=False,
        ),
    ),
    "olmo2": Case(
        "norms after each block alone, q and k normed over the whole projection, no GQA, old dialect",
        make_config(
            64, 128, 2, 8, 80, _OLMO2, **_BASE,
            num_key_value_heads=8, attention_bias=False, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=500000.0,
            tie_word_embeddings=False,
        ),
    ),
    "olmo2_gqa": Case(
        "32B style: 16 query heads on 2 KV heads; biases before the norms, an eps that matters, tied, new dialect",
        make_config(
            64, 96, 3, 16, 80, _OLMO2, **_BASE,
            num_key_value_heads=2, head_dim=8, attention_bias=True, rms_norm_eps=0.25,
            rope_parameters=_default_rope(10000.0), tie_word_embeddings=True,
        ),
        seed=3,
    ),
    "olmo3": Case(
        "3 sliding layers and 2 full ones, yarn in the old dialect (which reaches the full layers alone), 2 KV heads",
        make_config(
            64, 96, 5, 8, 72, _OLMO3, **_BASE,
            num_key_value_heads=2, attention_bias=False, layer_types=[_SLIDING, _SLIDING, _FULL, _SLIDING, _FULL],
            rms_norm_eps=1e-06, rope_theta=500000.0, sliding_window=8, tie_word_embeddings=False,
            rope_scaling={
                "attention_factor": 1.5, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                "original_max_position_embeddings": 32, "rope_type": "yarn",
            },
        ),
    ),
    "olmo3_default_layers": Case(
        "no layer_types: every fourth layer of 5 is full; a theta for each kind, tied, 16 heads on 4 KV heads",
        make_config(
            64, 96, 5, 16, 72, _OLMO3, **_BASE,
            num_key_value_heads=4, rms_norm_eps=1e-06, sliding_window=12, tie_word_embeddings=True,
            rope_parameters={_FULL: _default_rope(500000.0), _SLIDING: _default_rope(100.0)},
        ),
        seed=3,
    ),
    "gemma3": Case(
        "old dialect: sliding_window_pattern 3 of 4 layers, linear scaling in the full one, tied by default, 4 KV",
        make_config(
            96, 128, 4, 8, 72, _GEMMA3,
            attention_bias=False, attn_logit_softcapping=None, bos_token_id=2, eos_token_id=[1, 3],
            final_logit_softcapping=None, head_dim=16, hidden_activation="gelu_pytorch_tanh",
            max_position_embeddings=256, num_key_value_heads=4, query_pre_attn_scalar=40, rms_norm_eps=1e-06,
            rope_local_base_freq=100.0, rope_scaling={"factor": 8.0, "rope_type": "linear"}, rope_theta=10000.0,
            sliding_window=8, sliding_window_pattern=3, torch_dtype="bfloat16",
        ),
        seed=18, file_dtype="bfloat16",
    ),
    "gemma3_new_rope": Case(
        "new dialect: layer_types, rope by layer kind, untied, 16 query heads on 1 KV head, an eps that matters",
        make_config(
            64, 96, 3, 16, 72, _GEMMA3,
            bos_token_id=2, eos_token_id=1, head_dim=8, hidden_activation="gelu_pytorch_tanh",
            layer_types=[_FULL, _SLIDING, _SLIDING], max_position_embeddings=256, num_key_value_heads=1,
            query_pre_attn_scalar=4, rms_norm_eps=0.02, sliding_window=12, tie_word_embeddings=False,
            rope_parameters={
                _FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}, _SLIDING: _default_rope(50.0),
            },
        ),
        seed=2,
    ),
    "llama_dynamic": Case(
        "dynamic rope: the base grows with the sequence beyond max_position_embeddings, which is 24 here; old dialect",
        make_config(
            64, 128, 2, 8, 80, **{**_BASE, "max_position_embeddings": 24},
            num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-05, rope_scaling={"factor": 4.0, "type": "dynamic"},
            rope_theta=100.0, tie_word_embeddings=False,
        ),
        seed=1,
    ),
    "llama_longrope": Case(
        "longrope in the new dialect: short factors up to 32 tokens, long ones beyond; attention factor by default",
        make_config(
            64, 128, 2, 8, 80, **_BASE,
            num_key_value_heads=4, head_dim=8, rms_norm_eps=1e-05, tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 32,
                "short_factor": [1.0, 1.25, 1.5, 2.0], "long_factor": [2.0, 4.0, 6.0, 8.0],
            },
        ),
        seed=6,
    ),
    "llama_longrope_short": Case(
        "longrope as Phi-3 has it: the original length beside rope_scaling; longer than all, so short factors alone",
        make_config(
            64, 128, 2, 8, 80, **{**_BASE, "max_position_embeddings": 1024},
            num_key_value_heads=8, head_dim=8, original_max_position_embeddings=128, rms_norm_eps=1e-05,
            rope_scaling={
                "long_factor": [2.0, 4.0, 6.0, 8.0], "short_factor": [1.5, 2.0, 3.0, 4.0], "type": "longrope",
            },
            rope_theta=1000.0, tie_word_embeddings=False,
        ),
    ),
    "qwen2_longrope_long": Case(
        "longrope with an original length shorter than all, so long factors alone; attention_factor given",
        make_config(
            64, 128, 2, 8, 80, _QWEN2, **_BASE,
            num_key_value_heads=2, rms_norm_eps=1e-06, tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 1000.0, "attention_factor": 1.25, "factor": 4.0,
                "original_max_position_embeddings": 2, "short_factor": [1.0, 1.0, 1.0, 1.0],
                "long_factor": [1.5, 2.0, 3.0, 4.0],
            },
        ),
    ),
}  # fmt: skip
