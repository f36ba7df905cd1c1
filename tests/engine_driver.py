"""Small LLMs for the engine's tests, and what many of those tests do with them.

The models are random checkpoints of tests/reference in float32, on two devices; tokens and logits that `transformers`
computed for them are committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import GREEDY_TOKENS, write_checkpoint

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.engine.admission import Expectation
from nanoflow_jax.engine.pages import PagePool
from nanoflow_jax.engine.request import RequestOutput
from nanoflow_jax.engine.scheduler import Scheduler, SchedulerStats
from nanoflow_jax.weights.hub import resolve_model

CASE = "llama3_new_rope_tied"  # 16 query heads on 8 KV heads, 2 layers, vocabulary of 112, EOS is 2
VOCAB, EOS = 112, 2
PAGE = 8
MAX_MODEL_LEN = 128


def make_llm(folder: Path, **options: Any) -> LLM:
    """An LLM of CASE, its checkpoint written into `folder`; without options, with room for eight full requests."""
    return LLM(
        write_checkpoint(CASE, folder),
        **{
            # Its tokens are bytes, then special tokens: every id of the checkpoint has a text.
            "tokenizer": str(resolve_model("tiny")),
            "dtype": "float32",
            "tensor_parallel_size": 2,
            "max_model_len": MAX_MODEL_LEN,
            "decode_slots": 8,
            "tokens_per_step": 64,
            "page_size": PAGE,
            "kv_cache_tokens": 8 * MAX_MODEL_LEN,
            "progress": False,
            **options,
        },
    )


def assert_idle(llm: LLM) -> None:
    """Nothing is queued or running, and every page is available."""
    engine = llm.engine
    assert not engine.has_work
    assert engine.running.num_running == 0
    assert engine.scheduler.pool.num_available == engine.scheduler.pool.num_pages
    assert not engine.scheduler.orphans
    assert not engine._biases
    assert not engine._texts


def small_pool(llm: LLM, monkeypatch: pytest.MonkeyPatch, num_pages: int, hopeful: bool = False) -> SchedulerStats:
    """Lets the scheduler use only some of the pages of the compiled pool; nothing is known of earlier requests.

    hopeful  admits whatever fits now, without a thought of growth: preemptions are many
    """
    scheduler = llm.engine.scheduler
    scheduler.pool.reset()  # what its pages hold will be overwritten
    evicted = llm.engine._evicted if llm.engine.offload is not None else None
    monkeypatch.setattr(scheduler, "pool", PagePool(num_pages, evicted))
    monkeypatch.setattr(scheduler, "expectation", Expectation())
    if hopeful:
        monkeypatch.setattr(Scheduler, "_fits_later", lambda self, request, needed, available: needed <= available)
    stats = SchedulerStats()
    monkeypatch.setattr(scheduler, "stats", stats)
    return stats


def tokens(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in outputs]


def greedy(max_tokens: int | None = GREEDY_TOKENS, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **fields})


def crowd(**fields: Any) -> tuple[list[list[int]], list[SamplingParams]]:
    """Forty ragged requests: prompts of 1 to 60 tokens, 1 to 50 new ones, half greedy, half sampled."""
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in rng.permutation(np.linspace(1, 60, 40).astype(int))]
    params = [
        SamplingParams(
            temperature=float(i % 2), top_p=0.9, seed=i, max_tokens=int(rng.integers(1, 51)), ignore_eos=True, **fields
        )
        for i in range(40)
    ]
    return prompts, params
