"""Published models that are not LLaMA-70B, compiled at full width for eight H200: what biases, norms of queries and
keys, 12 query heads per KV head, a hidden size that the norm's kernel does not take, four norms a layer and windows
make of the plan's promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanoflow_jax.inspect.step import inspect_step
from tests.test_published_configs import LOADS, WINDOWED, Fields, published

pytestmark = pytest.mark.aot

MISTRAL_LARGE = published(
    32768, 12288, 28672, 88, 96, 8, 131072, architectures=["MistralForCausalLM"], model_type="mistral", head_dim=128,
    sliding_window=None, rope_theta=1000000.0,
)  # fmt: skip
del MISTRAL_LARGE["attention_bias"], MISTRAL_LARGE["pretraining_tp"], MISTRAL_LARGE["rope_scaling"]


@pytest.mark.parametrize(
    ("fields", "tokens", "layers"),
    [
        pytest.param(LOADS["Qwen2.5-72B-Instruct"][0], 2.8e6, 3, id="Qwen2.5-72B"),
        pytest.param(LOADS["Qwen3-32B"][0], 3.8e6, 3, id="Qwen3-32B"),
        pytest.param(MISTRAL_LARGE, 2.2e6, 3, id="Mistral-Large-2411"),
        pytest.param(WINDOWED["Gemma 3 27B"][0], 2.0e6, 8, id="Gemma-3-27B"),  # a layer that sees all, and two more
    ],
)
def test_an_inner_layer_is_as_planned(fields: Fields, tokens: float, layers: int, tmp_path: Path) -> None:
    """Nothing merged, copied, exposed or untraced in it; most of the network beside other work; and KV for 1280
    requests of 1024 tokens, with room."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    step = inspect_step(str(path), "h200", "nanoflow_70b", layers=layers)
    inner = step.inner_layer
    assert [f for f in step.report.findings if f.layer in range(1, layers - 1)] == []
    assert inner.exposed_network_us < 0.3 * inner.network_us
    assert inner.collectives == 5, "GEMV.AG, O.AG; O.AR; and D.AR twice"
    assert step.memory.kv_tokens > tokens > 1280 * 1024
    assert step.attention_backend == "mosaic"
