"""The embedded model, measured by the library itself on problems that it was not trained on."""

from __future__ import annotations

import itertools

import pytest

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.assets.tasks import problems

WANTED = 0.95


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(
        "tiny",
        tensor_parallel_size=2,
        max_model_len=512,
        decode_slots=8,
        tokens_per_step=72,
        page_size=16,
        kv_cache_tokens=4096,
        progress=False,
    )


@pytest.mark.parametrize(("task", "count"), [("addition", 200), ("lookup", 60)])
def test_greedy_accuracy(llm: LLM, task: str, count: int) -> None:
    """At least 95 % of held-out two-digit additions, and of look-ups in a context of 300 to 500 tokens, are exactly
    right."""
    asked = list(itertools.islice(problems(task, "test", seed=1), count))
    outputs = llm.generate([p.prompt for p in asked], SamplingParams(temperature=0.0, max_tokens=8), use_tqdm=False)
    if task == "lookup":
        lengths = [len(o.prompt_token_ids) for o in outputs]
        assert min(lengths) >= 300
        assert max(lengths) <= 500
    answers = [o.outputs[0].text for o in outputs]
    wrong = [(p.prompt[-24:], p.answer, a) for p, a in zip(asked, answers, strict=True) if a != p.answer]
    assert len(wrong) <= count * (1 - WANTED), f"{len(wrong)} of {count} wrong: {wrong[:8]}"
