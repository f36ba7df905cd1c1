"""A request's tokens do not depend on its neighbours; it ends when it should; an interrupted engine goes on.

The model is a random checkpoint of tests/reference in float32, on two devices; its greedy tokens by `transformers`
are committed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.engine.request import Request
from nanoflow_jax.engine.slot_table import SlotTable
from tests.engine.engine_driver import (
    CASE,
    EOS,
    MAX_MODEL_LEN,
    PAGE,
    assert_idle,
    crowd,
    greedy,
    shared_llm,
    small_pool,
    tokens,
)
from tests.reference.checkpoints import Reference, load_reference

pytestmark = pytest.mark.usefixtures("no_leak")

SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, top_k=40, seed=1234, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return shared_llm()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return load_reference(CASE)


# -- neighbours


def test_greedy_tokens_are_those_of_transformers(llm: LLM, reference: Reference) -> None:
    """64 tokens for each of five prompts, together."""
    found = tokens(llm.generate(reference.prompts, greedy(), use_tqdm=False))
    assert found == reference.greedy_tokens.tolist()


@pytest.mark.parametrize("num_pages", [8 * MAX_MODEL_LEN // PAGE, 24])
def test_alone_and_among_forty_others(
    llm: LLM, reference: Reference, monkeypatch: pytest.MonkeyPatch, num_pages: int
) -> None:
    """Greedy and seeded tokens are the same alone and in a crowd, with pages for all and with so few that requests
    are preempted and computed again, those looked at among them."""
    prompt = reference.prompts[2]
    alone = tokens(llm.generate([prompt, prompt], [greedy(), SAMPLED], use_tqdm=False))
    assert alone[0] == reference.greedy_tokens[2].tolist()
    stats = small_pool(llm, monkeypatch, num_pages, hopeful=True)
    prompts, params = crowd()
    order = [*range(1, 6), "greedy", "sampled", *range(6, 40), 0]
    mine = {"greedy": (prompt, greedy()), "sampled": (prompt, SAMPLED)}
    load = [mine[i] if isinstance(i, str) else (prompts[i], params[i]) for i in order]
    outputs = llm.generate([p for p, _ in load], [s for _, s in load], use_tqdm=False)
    by_name = dict(zip(order, outputs, strict=True))
    assert by_name["greedy"].outputs[0].token_ids == alone[0]
    assert by_name["sampled"].outputs[0].token_ids == alone[1]
    few = num_pages == 24
    assert (stats.preemptions > 0) is few
    assert (by_name["greedy"].metrics.num_preemptions + by_name["sampled"].metrics.num_preemptions > 0) is few
    for i, (p, s) in enumerate(load):
        assert outputs[i].prompt_token_ids == p
        assert len(outputs[i].outputs[0].token_ids) == min(s.max_tokens or 0, MAX_MODEL_LEN - len(p))
        assert outputs[i].outputs[0].finish_reason == "length"


def test_the_whole_crowd_is_the_same_with_few_pages(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the forty, not only the one looked at above."""
    prompts, params = crowd()
    roomy = tokens(llm.generate(prompts, params, use_tqdm=False))
    stats = small_pool(llm, monkeypatch, 20, hopeful=True)
    assert tokens(llm.generate(prompts, params, use_tqdm=False)) == roomy
    assert stats.preemptions > 0


def test_keys_and_values_that_are_not_recomputed_are_noticed(
    llm: LLM, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin: a preempted request goes on from pages that are another's by now."""
    enter = SlotTable.enter

    def keeps_progress(self: SlotTable, request: Request, pages: Any, computed: int, *more: Any) -> int:
        again = request.metrics.num_preemptions > 0
        return enter(self, request, pages, len(request.tokens) - 1 if again else computed, *more)

    monkeypatch.setattr(SlotTable, "enter", keeps_progress)
    stats = small_pool(llm, monkeypatch, 16, hopeful=True)
    found = tokens(llm.generate(reference.prompts[:3], greedy(), use_tqdm=False))
    assert stats.preemptions > 0
    assert found != reference.greedy_tokens[:3].tolist()


def test_a_seed_is_the_requests_own(llm: LLM, reference: Reference) -> None:
    """The same seed gives the same tokens, another seed others; without one, two requests differ."""
    prompt = reference.prompts[1]

    def sampled(seed: int | None) -> SamplingParams:
        return SamplingParams(temperature=1.0, seed=seed, max_tokens=24, ignore_eos=True)

    one, two, again, free, free_too = tokens(
        llm.generate([prompt] * 5, [sampled(1), sampled(2), sampled(1), sampled(None), sampled(None)], use_tqdm=False)
    )
    assert one == again
    assert len({tuple(t) for t in (one, two, free, free_too)}) == 4


# -- the end of a request


def first_repeat_free(sequence: list[int]) -> int:
    """A place, not the first, whose token did not come up before it."""
    return next(i for i in range(5, len(sequence)) if sequence[i] not in sequence[:i])


def test_stops_at_stop_token_ids(llm: LLM, reference: Reference) -> None:
    expected = reference.greedy_tokens[0].tolist()
    place = first_repeat_free(expected)
    stop = expected[place]
    (output,) = llm.generate([reference.prompts[0]], greedy(stop_token_ids=[stop, 111]), use_tqdm=False)
    done = output.outputs[0]
    assert done.token_ids == expected[: place + 1]
    assert (done.finish_reason, done.stop_reason) == ("stop", stop)
    assert done.text == llm.tokenizer.decode(expected[:place]), "the stop token is not part of the text"


def test_stops_at_eos_unless_told_to_ignore_it(llm: LLM, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """EOS ends a request without a stop_reason. The engine's EOS is set to a token that the reference is known to
    give."""
    assert llm.engine._eos == (EOS,)
    expected = reference.greedy_tokens[0].tolist()
    place = first_repeat_free(expected)
    monkeypatch.setattr(llm.engine, "_eos", (111, expected[place]))
    stopped, ignored = llm.generate([reference.prompts[0]] * 2, [greedy(ignore_eos=False), greedy()], use_tqdm=False)
    assert stopped.outputs[0].token_ids == expected[: place + 1]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", None)
    assert ignored.outputs[0].token_ids == expected
    assert (ignored.outputs[0].finish_reason, ignored.outputs[0].stop_reason) == ("length", None)


def test_stops_at_max_tokens_and_at_max_model_len(llm: LLM, reference: Reference) -> None:
    prompt = reference.prompts[4]
    long = (prompt * 4)[: MAX_MODEL_LEN - 1]
    params = [greedy(1), greedy(7), greedy(None), greedy(10_000), greedy(5)]
    outputs = llm.generate([prompt, prompt, prompt, prompt, long], params, use_tqdm=False)
    room = MAX_MODEL_LEN - len(prompt)
    assert [len(t) for t in tokens(outputs)] == [1, 7, room, room, 1]
    assert {o.outputs[0].finish_reason for o in outputs} == {"length"}
    assert tokens(outputs)[1] == reference.greedy_tokens[4][:7].tolist()


def test_a_request_as_long_as_the_pool_finishes(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes every page; others wait for it, or give way to it, and end too."""
    stats = small_pool(llm, monkeypatch, MAX_MODEL_LEN // PAGE, hopeful=True)
    prompts = [[5] * 3, [6] * (MAX_MODEL_LEN - 20), [7] * 30]
    outputs = llm.generate(prompts, greedy(None), use_tqdm=False)
    assert [len(p) + len(t) for p, t in zip(prompts, tokens(outputs), strict=True)] == [MAX_MODEL_LEN] * 3
    assert stats.preemptions > 0


# -- interruptions


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [RuntimeError("a device is lost"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_after_an_interruption_the_engine_goes_on(
    llm: LLM, reference: Reference, monkeypatch: pytest.MonkeyPatch, error: BaseException, when: str
) -> None:
    """Raised in the middle of generate, before the step or when it has already taken the donated state. An error that
    passes costs nobody a token; an interrupt leaves nothing queued, and the next answers are right."""
    runner = llm.engine.runner
    dispatch, calls = runner.dispatch, 0

    def raises_once(shape: Any, inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            if when == "after":
                state = runner.state
                dispatch(shape, inputs)
                runner.state = state  # as when the assignment was not reached
            raise error
        return dispatch(shape, inputs)

    prompts, params = crowd()
    params = [replace(p, max_tokens=min(p.max_tokens or 0, 12)) for p in params]
    calm = tokens(llm.generate(prompts, params, use_tqdm=False))
    monkeypatch.setattr(runner, "dispatch", raises_once)
    if isinstance(error, Exception):
        assert tokens(llm.generate(prompts, params, use_tqdm=False)) == calm
    else:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, params, use_tqdm=False)
        assert calls == 6
    assert_idle(llm)
    found = tokens(llm.generate(reference.prompts[:2], greedy(16), use_tqdm=False))
    assert found == reference.greedy_tokens[:2, :16].tolist()
