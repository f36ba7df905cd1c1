"""What the host starts after a step: only what some row wants, and all of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nanoflow_jax.engine import runner
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.extras import Extra, Logprobs, Sample, Score, wanted
from nanoflow_jax.step.logprobs import SCORE_CHUNK
from nanoflow_jax.step.slots import SlotSizes, empty_inputs
from tests.engine.engine_driver import shared_llm

PLAIN = Sample(top_k=False, top_p=False)
CASES: dict[str, tuple[dict[str, Any], set[Extra]]] = {
    "greedy": ({}, set()),
    "greedy, whatever its filters": ({"top_k": 3, "top_p": 0.5}, set()),
    "temperature": ({"temperature": 0.7}, {PLAIN}),
    "top_k": ({"temperature": 0.7, "top_k": 3}, {Sample(top_k=True, top_p=False)}),
    "top_p": ({"temperature": 0.7, "top_p": 0.5}, {Sample(top_k=False, top_p=True)}),
    "bias": ({"logit_bias": {3: 2.0}}, {PLAIN}),
    "presence": ({"presence_penalty": 0.5}, {PLAIN}),
    "frequency": ({"frequency_penalty": 0.5}, {PLAIN}),
    "repetition": ({"repetition_penalty": 1.5}, {PLAIN}),
    "logprobs": ({"logprobs": 0}, {Logprobs()}),
    "prompt_logprobs": ({"prompt_logprobs": 0}, {Score()}),
}


@pytest.mark.parametrize("case", CASES)
def test_only_what_a_row_wants_runs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a greedy neighbour, whose tokens stay."""
    fields, expected = CASES[case]
    llm, asked = shared_llm(), set()
    real = runner.Runner._extra

    def spy(self: Any, extra: Extra, shape: StepShape) -> Any:
        asked.add(extra)
        return real(self, extra, shape)

    monkeypatch.setattr(runner.Runner, "_extra", spy)
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    alone = llm.generate([[5, 9, 2]], greedy, use_tqdm=False)[0]
    assert asked == set()
    params = SamplingParams(**{"temperature": 0, "max_tokens": 4, "ignore_eos": True, **fields})
    beside, _ = llm.generate([[5, 9, 2], [7, 3, 4, 8]], [greedy, params], use_tqdm=False)
    assert asked == expected
    assert beside.outputs[0].token_ids == alone.outputs[0].token_ids


def test_prompt_rows_are_scored_in_as_many_chunks_as_they_need() -> None:
    sizes, rows = SlotSizes(slots=8, bias_rows=4, table_width=4), 2 * SCORE_CHUNK + 8
    for targets, chunks in ((0, 0), (1, 1), (SCORE_CHUNK, 1), (SCORE_CHUNK + 1, 2), (2 * SCORE_CHUNK + 8, 3)):
        inputs = empty_inputs(StepShape(8, rows, 2, 4), 16, sizes.slots, sizes.bias_rows)
        inputs.targets[np.random.default_rng(0).permutation(rows)[:targets]] = 0
        assert wanted(inputs, sizes).chunks == chunks


def test_the_end_of_the_process_waits_for_steps_of_runners_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step ahead that nobody waits for: its runner may be collected before it has run. And for its tokens' copy to
    the host, which ends later: XLA's thread would find no interpreter (`terminate called`)."""
    llm, waited = shared_llm(), list[Any]()
    monkeypatch.setattr(runner, "_RUNNERS", set())  # all of them gone
    dispatched = list[Any]()
    real = runner.Runner.dispatch

    def spy(*arguments: Any) -> Any:
        dispatched.append(real(*arguments))
        return dispatched[-1]

    monkeypatch.setattr(runner.Runner, "dispatch", spy)
    llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True), use_tqdm=False)
    monkeypatch.setattr(runner.jax, "block_until_ready", waited.append)
    copied, real_copy = list[Any](), np.asarray
    monkeypatch.setattr(runner.np, "asarray", lambda x, *more: copied.append(x) or real_copy(x, *more))
    runner._wait_for_steps()
    assert any(output is dispatched[-1] for output in waited)
    assert any(tokens is dispatched[-1].sampled.tokens for tokens in copied)
