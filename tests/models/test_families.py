"""What config.json says in each family beside LLaMA, and of the ropes that lengthen: fields, defaults, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from nanoflow_jax.config import ConfigError, Experts, RopeConfig
from nanoflow_jax.models.registry import parse_config
from nanoflow_jax.models.rope import rope_frequencies
from tests.reference.checkpoints import load_rope_reference
from tests.test_config import SIZES, parse, rope_of

MISTRAL: dict[str, Any] = SIZES | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2: dict[str, Any] = SIZES | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}
FULL, SLIDING = "full_attention", "sliding_attention"
ORIGINAL = "original_max_position_embeddings"
YARN: dict[str, Any] = {"type": "yarn", "factor": 4.0, ORIGINAL: 512}
LONGROPE: dict[str, Any] = {"type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [1, 2, 3, 4]}


def test_ropes_that_lengthen() -> None:
    """How many tokens a sequence has, and what else the block says."""
    yarn = parse(rope_scaling=YARN)
    factor = 0.1 * math.log(4.0) + 1.0
    assert rope_of(yarn) == RopeConfig(
        "yarn", factor=4.0, original_max_position_embeddings=512, attention_factor=factor
    )
    assert yarn.max_length == 2048
    assert parse(rope_scaling={**YARN, "factor": None}).max_length == 2048  # max_position_embeddings over the original
    assert rope_of(parse(rope_scaling=YARN, **{ORIGINAL: 256})).original_max_position_embeddings == 256
    scales = {"mscale": 1.0, "mscale_all_dim": 0.5}
    assert rope_of(parse(rope_scaling=YARN | scales)).attention_factor == pytest.approx(factor / (0.5 + factor / 2))
    assert rope_of(parse(rope_scaling=YARN | {"attention_factor": 0.5})).attention_factor == 0.5
    dynamic = parse(rope_scaling={"type": "dynamic", "factor": 3.0})
    assert (rope_of(dynamic).length, dynamic.max_length) == (6144, 6144)
    assert rope_of(dynamic.for_length(100)).length == 100
    long = parse(rope_scaling=LONGROPE | {ORIGINAL: 512})
    assert (rope_of(long).length, long.max_length) == (2048, 2048)
    assert rope_of(long).attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(512)))
    assert yarn.for_length(100) == yarn and parse().for_length(100) == parse()


def test_rope_frequencies_of_published_settings() -> None:
    """Those of `transformers` at the sizes of published models; each would be told from the default's."""
    for settings, want in load_rope_reference():
        length, fields = settings["length"], {"head_dim": settings["head_dim"], "rope_theta": settings["rope_theta"]}
        scaling, positions = settings["rope_scaling"], settings["max_position_embeddings"]
        rope = rope_of(parse(**fields, rope_scaling=scaling, max_position_embeddings=positions)).for_length(length)
        got = rope_frequencies(rope, settings["head_dim"])
        np.testing.assert_allclose(got, want, rtol=2e-6, err_msg=settings["about"])
        assert rope.attention_factor == pytest.approx(settings["attention_factor"], rel=1e-6)
        plain = rope_frequencies(RopeConfig(theta=settings["rope_theta"]), settings["head_dim"])
        is_default = rope.kind == "dynamic" and length <= positions
        assert is_default == np.allclose(plain, want, rtol=1e-5), settings["about"]


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        (MISTRAL, [4096]),  # absent is 4096, null is none
        (MISTRAL | {"sliding_window": None}, [None]),
        (MISTRAL | {"sliding_window": None, "layer_types": [FULL, FULL]}, [None]),
        (MISTRAL | {"sliding_window": 64, "layer_types": [SLIDING, SLIDING]}, [64]),
        (QWEN2 | {"sliding_window": 64}, [None]),
        (QWEN2 | {"sliding_window": 64, "use_sliding_window": False, "max_window_layers": 0}, [None]),
        (QWEN2 | {"sliding_window": 64, "use_sliding_window": True}, [None]),  # from layer 28 on
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 0}, [4096]),
        (QWEN2 | {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, [None, 64]),
        (QWEN2 | {"sliding_window": 64, "use_sliding_window": True, "layer_types": [SLIDING, FULL]}, [64, None]),
        (QWEN2 | {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, [None]),
    ],
)
def test_windows(fields: dict[str, Any], windows: list[int | None]) -> None:
    """Which layers have one."""
    config = parse_config(fields)
    assert [layer.attention.window for layer in config.pattern] == windows


def test_defaults_of_families() -> None:
    """Of fields that are absent; null is what else `transformers` takes."""
    assert parse_config(MISTRAL).num_kv_heads == 8 and parse_config(MISTRAL).max_position_embeddings == 131072
    seed = SIZES | {"architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss"}
    assert parse_config(seed).head_dim == 128 and parse_config(seed | {"head_dim": None}).head_dim == 8
    (layer,) = parse_config(seed).pattern
    assert layer.attention.qkv_bias and not layer.attention.o_bias
    granite = parse_config(SIZES | {"architectures": ["GraniteForCausalLM"], "model_type": "granite"})
    assert granite.pattern[0].attention.scale == granite.residual_multiplier == granite.logits_divisor == 1.0
    qwen3 = SIZES | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_key_value_heads": 2}
    assert parse_config(qwen3).num_params - parse(head_dim=128, num_key_value_heads=2).num_params == 2 * 2 * 128


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        # windows that no layer or another has
        (MISTRAL | {"layer_types": [SLIDING, FULL]}, "layer_types", "accepted: 'sliding_attention' in every layer"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window", "positive integer"),
        (QWEN2 | {"layer_types": [SLIDING, FULL]}, "layer_types", "accepted: 'full_attention' in every layer"),
        (QWEN2 | {"use_sliding_window": True, "layer_types": [FULL]}, "layer_types", "for each of 2 layers, not"),
        (
            QWEN2 | {"use_sliding_window": True, "sliding_window": None, "layer_types": [FULL, SLIDING]},
            "layer_types",
            "must be 'full_attention' for each",
        ),
        # a field of another family
        (QWEN2 | {"attention_bias": True}, "attention_bias", "unknown field"),
        (MISTRAL | {"mlp_bias": True}, "mlp_bias", "unknown field"),
        ({"attention_multiplier": 2.0}, "attention_multiplier", "unknown field"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.factor", "positive number"),
        ({"rope_scaling": YARN, "rope_theta": 1}, "rope_scaling.rope_type", "needs a rope_theta above 1"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "rope_scaling.truncate", "must be bool"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor", "positive number"),
        ({"rope_scaling": {**YARN, "short_factor": [1.0]}}, "rope_scaling.short_factor", "unknown field"),
        (
            {"rope_scaling": LONGROPE | {"short_factor": [1.0]}},
            "rope_scaling.short_factor",
            "head_dim / 2 = 4 positive",
        ),
        ({"rope_scaling": LONGROPE | {"long_factor": [1, 2, 3, 0]}}, "rope_scaling.long_factor", "4 positive numbers"),
        ({"rope_scaling": LONGROPE | {"factor": 2, ORIGINAL: 1}}, f"rope_scaling.{ORIGINAL}", "must be at least 2"),
        ({ORIGINAL: 1024}, ORIGINAL, "unknown field"),
    ],
)
def test_errors_name_the_field(fields: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(SIZES | fields)
    assert str(caught.value).startswith(field + ":")
    assert says in str(caught.value) and "\n" not in str(caught.value)


QWEN3_MOE: dict[str, Any] = SIZES | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
GPT_OSS: dict[str, Any] = SIZES | {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
_QWEN3_30B = {
    "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "vocab_size": 151936, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8,
}  # fmt: skip
_QWEN15_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_size": 2048, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936, "intermediate_size": 5632,
    "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4,
}  # fmt: skip
_MIXTRAL_8X22B = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 6144, "num_hidden_layers": 56,
    "num_attention_heads": 48, "num_key_value_heads": 8, "vocab_size": 32768, "intermediate_size": 16384,
    "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "billions", "active"),
    [
        (QWEN3_MOE | _QWEN3_30B, 30.5, 3.3),
        (_QWEN15_MOE, 14.3, 2.7),
        (_MIXTRAL_8X22B, 140.6, 39.2),
        (GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32, "vocab_size": 201088, "hidden_size": 2880}
         | {"num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 2880, "head_dim": 64}, 20.9, 4.2),
    ],
    ids=["Qwen3-30B-A3B", "Qwen1.5-MoE-A2.7B", "Mixtral-8x22B", "gpt-oss-20b"],
)  # fmt: skip
def test_weights_of_published_models_with_experts(fields: dict[str, Any], billions: float, active: float) -> None:
    """As their makers count them; of gpt-oss the latter without its embedding, 3.6."""
    config = parse_config(fields)
    assert config.num_params / 1e9 == pytest.approx(billions, abs=0.06)
    assert config.active_params / 1e9 == pytest.approx(active, abs=0.06)


def test_defaults_of_gpt_oss() -> None:
    """What a file leaves out is the 120b's."""
    config = parse_config({"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"})
    assert config.num_params / 1e9 == pytest.approx(116.8, abs=0.05)
    sliding, full = config.pattern
    assert (sliding.attention.window, full.attention.window) == (128, None)
    assert sliding.attention.rope.kind == "yarn" and sliding.attention.rope.theta == 150000.0
    assert (sliding.mlp.limit, sliding.mlp.alpha, sliding.mlp.experts) == (7.0, 1.702, Experts(128, 4, 2880, bias=True))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            QWEN3_MOE | {"num_experts": 4, "num_experts_per_tok": 5},
            "num_experts_per_tok: 5 must be at most num_experts",
        ),
        (QWEN3_MOE | {"mlp_only_layers": [2]}, "mlp_only_layers: [2] must be indices of the 2 layers"),
        (QWEN3_MOE | {"mlp_only_layers": [0, 1]}, "mlp_only_layers: no layer is left with experts"),
        (QWEN3_MOE | {"num_local_experts": 4}, "num_local_experts: unknown field"),
        (GPT_OSS | {"experts_per_token": 3}, "experts_per_token: 3 contradicts num_experts_per_tok = 4"),
        (GPT_OSS | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.quant_method: 'fp8' is not"),
        (GPT_OSS | {"swiglu_limit": 0}, "swiglu_limit: 0 must be a positive number"),
    ],
)
def test_errors_of_experts_name_the_field(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(fields)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
