"""A thousand requests of every kind through a pool a tenth of what they could use: all end, none is wrong."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.engine import setup
from nanoflow_jax.engine.pages import PagePool
from nanoflow_jax.engine.request import Request
from nanoflow_jax.engine.scheduler import SchedulerStats
from nanoflow_jax.step.batch import StepShape
from tests.engine.engine_driver import CASE, VOCAB, assert_idle, make_llm, small_pool, write_tokenizer

COUNT, SLOTS, PAGE, LIMIT = 1000, 64, 4, 40
ROOMY = SLOTS * LIMIT // PAGE  # every slot's longest request
TIGHT = ROOMY // 10


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    tokenizer, _ = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    table = LIMIT // PAGE
    with pytest.MonkeyPatch.context() as patch:  # two shapes: compiling takes longer than running
        shapes = [StepShape(SLOTS, 0, 0, table), StepShape(SLOTS, 64, 8, table)]
        patch.setattr(setup, "step_shapes", lambda *_: shapes)
        return make_llm(
            tmp_path_factory.mktemp(CASE), tokenizer=str(tokenizer), max_model_len=LIMIT, decode_slots=SLOTS,
            tokens_per_step=128, page_size=PAGE, kv_cache_tokens=ROOMY * PAGE,
        )  # fmt: skip


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Some prompts begin alike, some cannot be served; half of the requests are greedy, a few have each option."""
    rng = np.random.default_rng(12)
    beginnings = [rng.integers(3, VOCAB, 12).tolist() for _ in range(8)]
    found = []
    for number in range(COUNT):
        prompt = rng.integers(3, VOCAB, rng.integers(1, 13)).tolist()
        if rng.random() < 0.4:
            prompt = beginnings[int(rng.integers(8))] + prompt
        if rng.random() < 0.02:
            prompt = [[], prompt * 40, [*prompt, VOCAB]][int(rng.integers(3))]
        fields: dict[str, Any] = {
            "temperature": float(rng.choice([0, 0.7, 1.5])), "seed": number, "max_tokens": int(rng.integers(1, 17)),
            "ignore_eos": bool(rng.random() < 0.5),
        }  # fmt: skip
        options: list[dict[str, Any]] = [
            {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"presence_penalty": 1.0}, {"repetition_penalty": 1.3},
            {"logit_bias": {int(rng.integers(VOCAB)): 4.0}}, {"allowed_token_ids": rng.integers(3, VOCAB, 9).tolist()},
            {"stop": ["a", "zz", "Q"]}, {"stop_token_ids": rng.integers(3, VOCAB, 12).tolist()},
            {"logprobs": 1}, {"prompt_logprobs": 0}, {"min_tokens": 1},
        ]  # fmt: skip
        for option in options:
            if rng.random() < 0.04:
                fields |= option
        found.append((prompt, SamplingParams(**fields)))
    return found


@dataclass
class Run:
    """Feeds requests as they come, cancels some, and checks what ends."""

    llm: LLM
    load: list[tuple[list[int], SamplingParams]]
    cancel: bool
    requests: dict[int, Request] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    seconds: float = 0.0
    steps: int = 0

    def go(self) -> Run:
        engine, rng, begun = self.llm.engine, np.random.default_rng(3), time.perf_counter()
        waiting, steps = list(enumerate(self.load)), engine.num_steps
        while waiting or engine.has_work:
            for number, (prompt, params) in waiting[:25]:
                try:
                    self.llm.check(prompt, params)
                except ValueError:
                    self.refused.add(number)
                else:
                    self.requests[number] = engine.add(None, prompt, params)
            del waiting[:25]
            engine.step()
            if self.cancel and rng.random() < 0.1:
                running = [r for r in self.requests.values() if not r.finish_reason]
                if running:
                    engine.abort(running[int(rng.integers(len(running)))])
            pool = engine.scheduler.pool
            assert engine.running.num_pages.sum() >= pool.num_pages - pool.num_available  # shared ones count twice
        self.seconds, self.steps = time.perf_counter() - begun, engine.num_steps - steps
        assert_idle(self.llm)
        return self


def test_soak(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    load, scheduler = requests(), llm.engine.scheduler
    assert scheduler.pool.num_pages == ROOMY
    calm = Run(llm, load, cancel=False).go()
    assert scheduler.stats.preemptions == 0
    stats: SchedulerStats = small_pool(llm, monkeypatch, TIGHT, hopeful=True)
    assert isinstance(scheduler.pool, PagePool)
    tight = Run(llm, load, cancel=True).go()
    cancelled = [n for n, r in tight.requests.items() if r.finish_reason == "abort"]
    for name, run in (("roomy", calm), ("tight", tight)):
        print(f"\n{name}: {run.steps} steps in {run.seconds:.1f} s", end="")
    print(
        f"; {stats.preemptions} preemptions, {stats.cached_tokens} of {stats.prompt_tokens} prompt tokens found, "
        f"{stats.recomputed_tokens} computed again, {len(cancelled)} cancelled, {len(tight.refused)} refused"
    )
    assert calm.refused == tight.refused
    assert 10 < len(tight.refused) < 100
    assert len(tight.requests) + len(tight.refused) == COUNT
    assert stats.preemptions > 100
    assert stats.cached_tokens > 500
    assert len(cancelled) > 50
    for number, want in calm.requests.items():
        got, produced = tight.requests[number], want.output_token_ids
        assert want.finish_reason in ("stop", "length")
        if got.finish_reason == "abort":
            assert got.output_token_ids == produced[: len(got.output_token_ids)]
            continue
        assert got.output_token_ids == produced, f"request {number}: {want.params}"
        assert (got.finish_reason, got.stop_reason, got.text) == (want.finish_reason, want.stop_reason, want.text)
        assert got.logprobs.count == want.logprobs.count == (len(produced) if want.params.logprobs is not None else 0)
        assert got.prompt_logprobs.count == want.prompt_logprobs.count
