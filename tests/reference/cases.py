"""The LLaMA cases, and what a case is (family_cases.py has the other families).

"Old dialect": rope_scaling and rope_theta side by side; "new dialect": rope_parameters, as transformers 5 writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One checkpoint: `config` is config.json verbatim; the rest says how its weights are made and stored."""

    about: str
    config: dict[str, Any]
    seed: int = 0  # chosen so that make_reference.py accepts the case
    file_dtype: str = "float32"  # float32, float16 or bfloat16
    shards: int = 1
    store_inv_freq: bool = False  # old checkpoints hold rotary buffers, which a loader must skip
    store_tied_head: bool = False  # some tied checkpoints hold lm_head.weight as well

    @property
    def family(self) -> str:
        """The `model_type`: llama, mistral, qwen2, ..."""
        return self.config["model_type"]

    @property
    def num_kv_heads(self) -> int:
        return self.config.get("num_key_value_heads") or self.config["num_attention_heads"]

    @property
    def experts(self) -> int:
        """Of a layer that has some; 0: none has."""
        return self.config.get("num_local_experts") or self.config.get("num_experts") or 0

    @property
    def expert_size(self) -> int:
        return self.config.get("moe_intermediate_size") or self.config["intermediate_size"]

    def has_experts(self, layer: int) -> bool:
        dense = layer in self.config.get("mlp_only_layers", []) or (layer + 1) % self.config.get(
            "decoder_sparse_step", 1
        )
        return bool(self.experts and not dense)

    @property
    def head_dim(self) -> int:
        return self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]


def make_config(
    hidden: int,
    inter: int,
    layers: int,
    heads: int,
    vocab: int,
    family: tuple[str, str] = ("Llama", "llama"),
    **fields: Any,
) -> dict[str, Any]:
    """A config.json; `family` is the architecture, less ForCausalLM, and the model type."""
    return {
        "architectures": [f"{family[0]}ForCausalLM"],
        "model_type": family[1],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **fields,
    }


_LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}

CASES: dict[str, Case] = {
    "llama2_mha": Case(
        "Llama-2 style: no num_key_value_heads, head_dim or rope_theta; float16 file with rotary buffers",
        make_config(
            64, 176, 2, 8, 96,
            _name_or_path="some/llama-2", bos_token_id=1, eos_token_id=2, hidden_act="silu", initializer_range=0.02,
            max_position_embeddings=256, pad_token_id=0, pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None,
            tie_word_embeddings=False, torch_dtype="float16", transformers_version="4.31.0.dev0", use_cache=True,
        ),
        seed=5, file_dtype="float16", store_inv_freq=True,
    ),
    "llama3_old_rope": Case(
        "Llama-3.1 style: 8 query heads on 1 KV head, llama3 rope in the old dialect, EOS list; 2 bfloat16 shards",
        make_config(
            64, 128, 3, 8, 128,
            num_key_value_heads=1, attention_bias=False, attention_dropout=0.0, bos_token_id=1, eos_token_id=[2, 3, 4],
            hidden_act="silu", max_position_embeddings=256, mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-05,
            rope_scaling=dict(_LLAMA3_SCALING), rope_theta=10000.0, tie_word_embeddings=False,
            torch_dtype="bfloat16", transformers_version="4.42.3", use_cache=True,
        ),
        seed=5, file_dtype="bfloat16", shards=2,
    ),
    "llama3_new_rope_tied": Case(
        "Llama-3.2 style: 16 query heads on 8 KV heads, tied, head_dim given, llama3 rope in the new dialect",
        make_config(
            96, 112, 2, 16, 112,
            num_key_value_heads=8, head_dim=8, attention_bias=False, bos_token_id=1, dtype="float32", eos_token_id=2,
            hidden_act="silu", max_position_embeddings=256, mlp_bias=False, rms_norm_eps=1e-05,
            rope_parameters={**_LLAMA3_SCALING, "rope_theta": 10000.0}, tie_word_embeddings=True,
            transformers_version="5.0.0", use_cache=True,
        ),
    ),
    "biases": Case(
        "attention_bias, mlp_bias, rms_norm_eps that matters, 8 query heads on 2 KV heads, default rope, new dialect",
        make_config(
            64, 128, 2, 8, 104,
            num_key_value_heads=2, head_dim=8, attention_bias=True, mlp_bias=True, dtype="float32", eos_token_id=2,
            max_position_embeddings=128, rms_norm_eps=0.05, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
        seed=11,
    ),
    "linear_old_rope_head_dim": Case(
        "head_dim 16 where hidden_size / heads is 8, 8 query heads on 8 KV heads, linear rope spelled 'type', tied",
        make_config(
            64, 96, 2, 8, 120,
            num_key_value_heads=8, head_dim=16, eos_token_id=2, max_position_embeddings=512, rms_norm_eps=1e-05,
            rope_scaling={"type": "linear", "factor": 4.0}, rope_theta=10000.0, tie_word_embeddings=True,
            torch_dtype="float32",
        ),
        seed=1,
    ),
    "linear_new_rope_sharded": Case(
        "16 query heads on 2 KV heads, linear rope in the new dialect, vocabulary of 101, 3 float32 shards",
        make_config(
            64, 120, 3, 16, 101,
            num_key_value_heads=2, head_dim=8, dtype="float32", eos_token_id=2, max_position_embeddings=512,
            rms_norm_eps=1e-05, rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 500000.0},
            tie_word_embeddings=False,
        ),
        seed=6, shards=3,
    ),
    "odd_vocab_tied": Case(
        "vocabulary of 131, tied with lm_head.weight stored as well, 8 query heads on 1 KV head, bfloat16 file",
        make_config(
            96, 160, 2, 8, 131,
            num_key_value_heads=1, dtype="bfloat16", eos_token_id=2, max_position_embeddings=128, rms_norm_eps=1e-05,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, tie_word_embeddings=True,
        ),
        seed=10, file_dtype="bfloat16", store_tied_head=True,
    ),
    "bare_config": Case(
        "only sizes in config.json, the rest by default (its logits show rope and untied; rms_norm_eps hardly)",
        make_config(64, 128, 2, 8, 96, num_key_value_heads=4, max_position_embeddings=128),
        seed=3,
    ),
}  # fmt: skip
