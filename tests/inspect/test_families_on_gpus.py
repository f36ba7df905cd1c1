"""Published models that are not LLaMA-70B, compiled at full width for eight H200: what biases, norms of queries and
keys, 12 query heads per KV head, a hidden size that the norm's kernel does not take, four norms a layer and windows
make of the plan's promise."""

from __future__ import annotations

import pytest

from nanoflow_jax.cost.demand import StepLoad
from nanoflow_jax.cost.latency import RooflineModel
from nanoflow_jax.inspect.step import inspect_step
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.search.simulate import simulate_step

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(
    ("model", "tokens", "layers"),
    [
        ("qwen2.5-72b", 2.8e6, 3),
        ("qwen3-32b", 3.8e6, 3),
        ("mistral-large-2411", 2.2e6, 3),
        ("gemma-3-27b", 2.0e6, 8),  # five layers with a window, one that sees all, and an end on each side
    ],
)
def test_an_inner_layer_is_as_planned(model: str, tokens: float, layers: int) -> None:
    """Nothing merged, copied, exposed or untraced in it; most of the network beside other work; and KV for 1280
    requests of 1024 tokens, with room. The simulator says the same but for small kernels."""
    step = inspect_step(model, "h200", "nanoflow_70b", layers=layers)
    inner = step.inner_layer
    assert [f for f in step.report.findings if f.layer in range(1, layers - 1)] == []
    assert inner.exposed_network_us < 0.3 * inner.network_us
    assert inner.collectives == 5, "GEMV.AG, O.AG; O.AR; and D.AR twice"
    assert step.memory.kv_tokens > tokens > 1280 * 1024
    assert step.attention_backend == "mosaic"
    load = StepLoad(step.decode_tokens, step.tokens - step.decode_tokens, step.context, step.context)
    config = model_config(model)[1]
    simulated = simulate_step(load_plan("nanoflow_70b"), config, RooflineModel(step.hardware), 8, load)
    assert inner.us == pytest.approx(simulated.inner.us, rel=0.025)


@pytest.mark.parametrize(
    ("model", "plan", "tokens", "layers"),
    [
        ("qwen3-235b-a22b", "auto_qwen3_235b_a22b_8xh200", 1.5e6, 3),
        ("gpt-oss-120b", "auto_gpt_oss_120b_8xh200", 2.0e7, 4),
    ],
)
def test_an_inner_layer_of_experts_is_as_planned(model: str, plan: str, tokens: float, layers: int) -> None:
    """At the size that the plan was searched for: grouped GEMMs found, no copy of an expert's weight among temporaries,
    the network beside the other nano-batch's experts."""
    found = load_plan(plan)
    step = inspect_step(model, "h200", plan, layers=layers, tokens=found.tokens_per_step or 0)
    inner = step.inner_layer
    assert [f for f in step.report.findings if f.layer in range(1, layers - 1)] == []
    assert inner.exposed_network_us < 0.3 * inner.network_us
    assert inner.collectives == 4, "O.AR and D.AR, twice"
    assert step.memory.kv_tokens > tokens
    assert step.memory.temporaries < 2**30
    load = StepLoad(step.decode_tokens, step.tokens - step.decode_tokens, step.context, step.context)
    simulated = simulate_step(found, model_config(model)[1], RooflineModel(step.hardware), 8, load)
    assert inner.us == pytest.approx(simulated.inner.us, rel=0.025)
