"""Published models that are not LLaMA-70B, compiled at full width for eight H200: what biases, norms of queries and
keys, 12 query heads per KV head and a hidden size that the norm's kernel does not take make of the plan's promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanoflow_jax.inspect.step import inspect_step
from tests.test_published_configs import LOADS, Fields, published

pytestmark = pytest.mark.aot

MISTRAL_LARGE = published(
    32768, 12288, 28672, 88, 96, 8, 131072, architectures=["MistralForCausalLM"], model_type="mistral", head_dim=128,
    sliding_window=None, rope_theta=1000000.0,
)  # fmt: skip
del MISTRAL_LARGE["attention_bias"], MISTRAL_LARGE["pretraining_tp"], MISTRAL_LARGE["rope_scaling"]


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        pytest.param(LOADS["Qwen2.5-72B-Instruct"][0], 2.8e6, id="Qwen2.5-72B"),
        pytest.param(LOADS["Qwen3-32B"][0], 3.8e6, id="Qwen3-32B"),
        pytest.param(MISTRAL_LARGE, 2.2e6, id="Mistral-Large-2411"),
    ],
)
def test_an_inner_layer_is_as_planned(fields: Fields, tokens: float, tmp_path: Path) -> None:
    """Nothing merged, copied, exposed or untraced in it; most of the network beside other work; and KV for 1280
    requests of 1024 tokens, with room."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    step = inspect_step(str(path), "h200", "nanoflow_70b", layers=3)
    inner = step.inner_layer
    assert [f for f in step.report.findings if f.layer == 1] == []
    assert inner.exposed_network_us < 0.3 * inner.network_us
    assert inner.collectives == 5, "GEMV.AG, O.AG; O.AR; and D.AR twice"
    assert step.memory.kv_tokens > tokens > 1280 * 1024
    assert step.attention_backend == "mosaic"
