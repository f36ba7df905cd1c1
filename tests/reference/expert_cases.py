"""Cases of families with experts.

Between them: numbers of experts that eight devices divide and do not, 1 to 4 of them for a token, weights that are
normalized and are not, layers with experts and without, a shared expert, sinks, clamps, biases, both names of Mixtral's
tensors, windows. `checkpoints._with_routes` keeps scores near a tie out of them: in bfloat16 either could be chosen.
"""

from __future__ import annotations

from typing import Any

from cases import Case, make_config

_MIXTRAL, _GPT_OSS = ("Mixtral", "mixtral"), ("GptOss", "gpt_oss")
_QWEN2, _QWEN3 = ("Qwen2Moe", "qwen2_moe"), ("Qwen3Moe", "qwen3_moe")
_BASE: dict[str, Any] = {
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
    "router_aux_loss_coef": 0.001, "output_router_logits": False,
}  # fmt: skip

EXPERT_CASES: dict[str, Case] = {
    "mixtral": Case(
        "8x7B style: 2 of 8 experts, no window, old dialect, 8 query heads on 2 KV heads; bfloat16 file",
        make_config(
            64, 48, 2, 8, 80, _MIXTRAL, **_BASE,
            num_key_value_heads=2, num_experts_per_tok=2, num_local_experts=8, rope_theta=1000000.0,
            sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16",
        ),
        file_dtype="bfloat16", shards=2,
    ),
    "mixtral_window": Case(
        "a window of 8 and 3 of 4 experts, more devices than experts, tied",
        make_config(
            64, 32, 3, 8, 80, _MIXTRAL, **_BASE,
            num_key_value_heads=1, num_experts_per_tok=3, num_local_experts=4, sliding_window=8,
            tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, dtype="float32",
        ),
        seed=22,
    ),
    "qwen2_moe": Case(
        "Qwen1.5-MoE style: 4 of 6 experts, not normalized, a shared one with a gate, biases on q, k and v",
        make_config(
            64, 96, 2, 8, 80, _QWEN2, **_BASE,
            num_key_value_heads=8, decoder_sparse_step=1, max_window_layers=2, mlp_only_layers=[],
            moe_intermediate_size=32, norm_topk_prob=False, num_experts=6, num_experts_per_tok=4, qkv_bias=True,
            rope_theta=1000000.0, shared_expert_intermediate_size=64, sliding_window=8, use_sliding_window=False,
            tie_word_embeddings=False, torch_dtype="bfloat16",
        ),
        file_dtype="bfloat16",
        seed=5,
    ),
    "qwen2_moe_mixed": Case(
        "experts in layers 1 and 3 of 4 alone, normalized, 1 of 8; no biases; a window of 8 in every second layer",
        make_config(
            64, 64, 4, 8, 80, _QWEN2, **_BASE,
            num_key_value_heads=2, decoder_sparse_step=2, max_window_layers=4, mlp_only_layers=[0],
            moe_intermediate_size=48, norm_topk_prob=True, num_experts=8, num_experts_per_tok=1, qkv_bias=False,
            rope_theta=10000.0, shared_expert_intermediate_size=32, sliding_window=8, use_sliding_window=True,
            tie_word_embeddings=False,
        ),
        seed=100,
    ),
    "qwen3_moe": Case(
        "30B-A3B style: 3 of 16 experts, normalized, norms over each head of q and k, 1 KV head",
        make_config(
            64, 96, 3, 8, 80, _QWEN3, **_BASE,
            num_key_value_heads=1, head_dim=16, attention_bias=False, decoder_sparse_step=1, max_window_layers=3,
            mlp_only_layers=[], moe_intermediate_size=32, norm_topk_prob=True, num_experts=16, num_experts_per_tok=3,
            rope_scaling=None, rope_theta=1000000.0, sliding_window=None, use_sliding_window=False,
            tie_word_embeddings=False, torch_dtype="bfloat16",
        ),
        file_dtype="bfloat16",
        seed=27,
    ),
    "qwen3_moe_mixed": Case(
        "layer 1 of 3 without experts, not normalized, biases, tied, 2 of 8 experts",
        make_config(
            64, 64, 3, 8, 80, _QWEN3, **_BASE,
            num_key_value_heads=2, head_dim=8, attention_bias=True, mlp_only_layers=[1], moe_intermediate_size=40,
            norm_topk_prob=False, num_experts=8, num_experts_per_tok=2, rope_theta=10000.0, tie_word_embeddings=True,
        ),
        seed=12,
    ),
    "gpt_oss": Case(
        "2 of 8 experts, a window of 8 in every second layer, sinks, biases, a clamp that matters, yarn, new dialect",
        make_config(
            64, 48, 3, 8, 80, _GPT_OSS, **_BASE,
            num_key_value_heads=2, head_dim=16, attention_bias=True, num_local_experts=8, num_experts_per_tok=2,
            sliding_window=8, swiglu_limit=1.5, tie_word_embeddings=False, dtype="bfloat16",
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 16,
            },
        ),
        file_dtype="bfloat16",
        seed=12,
    ),
    "gpt_oss_default_layers": Case(
        "layers, alpha and limit by default, 4 of 6 experts, the old dialect of yarn, no biases of attention",
        make_config(
            64, 64, 2, 8, 80, _GPT_OSS, **_BASE,
            num_key_value_heads=1, head_dim=16, attention_bias=False, experts_per_token=4, num_local_experts=6,
            num_experts_per_tok=4, sliding_window=16, initial_context_length=32, tie_word_embeddings=False,
            rope_theta=1000.0,
            rope_scaling={
                "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 32,
            },
        ),
        shards=2,
    ),
}  # fmt: skip
