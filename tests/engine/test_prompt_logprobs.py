"""Logprobs of outputs and prompts, and `LLM.score`, against the logits that `transformers` computed, and where there
are none of those, against a step of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.engine.request import Logprob
from nanoflow_jax.engine.scheduler import SchedulerStats
from tests.engine.engine_driver import (
    CASE,
    MAX_MODEL_LEN,
    PAGE,
    VOCAB,
    assert_idle,
    crowd,
    greedy,
    log_softmax,
    oracle,
    shared_llm,
    small_pool,
    tokens,
)
from tests.reference.checkpoints import Reference, load_reference
from tests.tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("no_leak")

Entry = dict[int, Logprob]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return shared_llm()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return load_reference(CASE)


def assert_entries(llm: LLM, entries: list[Entry], logits: np.ndarray, ids: list[int], top: int) -> None:
    """Entry i is about token ids[i], sampled from logits[i]: the token first, then the likeliest in order."""
    assert len(entries) == len(ids) == len(logits)
    want = log_softmax(logits)
    slack = 2 * TOLERANCES["float32"] * np.linalg.norm(logits, axis=1)
    for entry, token, row, eps in zip(entries, ids, want, slack, strict=True):
        found = np.array([x.logprob for x in entry.values()])
        np.testing.assert_allclose(found, row[list(entry)], rtol=0, atol=eps)
        for x in entry.values():
            larger = [(row > x.logprob + sign * 2 * eps).sum() for sign in (1, -1)]
            assert larger[0] + 1 <= x.rank <= larger[1] + 1
        assert next(iter(entry)) == token
        listed = sorted(entry.values(), key=lambda x: x.rank)[:top]
        assert [x.rank for x in listed] == list(range(1, top + 1))
        assert top <= len(entry) <= top + 1
        assert {t: x.decoded_token for t, x in entry.items()} == {t: llm.tokenizer.decode([t], False) for t in entry}


# -- outputs


def test_logprobs_of_outputs(llm: LLM, reference: Reference) -> None:
    """Of greedy and sampled tokens, with and without likeliest ones, whatever penalties and temperature do: those of
    the raw logits. The first are `transformers`' own."""
    params = [
        greedy(24, logprobs=5),
        greedy(24, logprobs=0, repetition_penalty=1.4, logit_bias={7: 4.0}),
        SamplingParams(temperature=1.7, top_k=30, seed=3, max_tokens=24, ignore_eos=True, logprobs=20),
        greedy(24),
        SamplingParams(temperature=0.5, seed=3, max_tokens=24, ignore_eos=True, logprobs=1),
    ]
    outputs = llm.generate(reference.prompts, params, use_tqdm=False)
    for i, (p, output, logits) in enumerate(zip(params, outputs, oracle().output_logits(outputs), strict=True)):
        done = output.outputs[0]
        if p.logprobs is None:
            assert done.logprobs is done.cumulative_logprob is None
            continue
        assert done.logprobs is not None
        assert_entries(llm, done.logprobs, logits, done.token_ids, p.logprobs)
        assert_entries(llm, done.logprobs[:1], reference.logits["float32"][i][-1:], done.token_ids[:1], p.logprobs)
        want = sum(entry[t].logprob for entry, t in zip(done.logprobs, done.token_ids, strict=True))
        assert done.cumulative_logprob == pytest.approx(want)
    done = outputs[0].outputs[0]
    with pytest.raises(AssertionError):
        assert_entries(
            llm, done.logprobs or [], np.roll(oracle().output_logits(outputs[:1])[0], 1, 0), done.token_ids, 5
        )


def test_logprobs_of_preempted_requests(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is lost, doubled or another's where requests are preempted, their tokens still in flight among them."""
    prompts, params = crowd(logprobs=2)
    stats = small_pool(llm, monkeypatch, 20, hopeful=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert stats.preemptions > 10
    for output, logits in zip(outputs, oracle().output_logits(outputs), strict=True):
        done = output.outputs[0]
        assert_entries(llm, done.logprobs or [], logits, done.token_ids, 2)


# -- prompts


def test_logprobs_of_prompts(llm: LLM, reference: Reference) -> None:
    """All prompts together, in chunks as the budget of a step cuts them, twice: what was computed before is not found
    where its logprobs are wanted."""
    params = [greedy(2, prompt_logprobs=k, logprobs=0) for k in (3, 0, 20, 1, 5)]
    for _ in range(2):
        outputs = llm.generate(reference.prompts, params, use_tqdm=False)
        for p, output, logits in zip(params, outputs, reference.logits["float32"], strict=True):
            assert output.prompt_logprobs is not None
            first, *rest = output.prompt_logprobs
            assert first is None
            entries = [entry for entry in rest if entry is not None]
            assert_entries(llm, entries, logits[:-1], output.prompt_token_ids[1:], p.prompt_logprobs or 0)
    (one,) = llm.generate([[5]], greedy(1, prompt_logprobs=2), use_tqdm=False)
    assert one.prompt_logprobs == [None]


@pytest.mark.parametrize("num_pages", [128, 20])
def test_logprobs_of_prompts_longer_than_a_step(llm: LLM, monkeypatch: pytest.MonkeyPatch, num_pages: int) -> None:
    """Prompts of up to 95 tokens, 56 of them in a step, some of them preempted between their chunks."""
    rng = np.random.default_rng(8)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (95, 9, 57, 56, 94, 2, 90, 64, 65, 91)]
    stats = small_pool(llm, monkeypatch, num_pages, hopeful=True)
    outputs = llm.generate(prompts, greedy(32, prompt_logprobs=1), use_tqdm=False)
    assert (stats.preemptions > 0) is (num_pages == 20)
    for output, logits in zip(outputs, oracle().logits(prompts), strict=True):
        entries = [entry for entry in output.prompt_logprobs or [] if entry is not None]
        assert_entries(llm, entries, logits[:-1], output.prompt_token_ids[1:], 1)


def test_logprobs_of_outputs_after_prefix_hits(llm: LLM, reference: Reference) -> None:
    prompt = (reference.prompts[4] * 3)[:100]
    llm.generate([prompt], greedy(1), use_tqdm=False)
    outputs = llm.generate([prompt, [*prompt, 3, 4]], greedy(8, logprobs=3), use_tqdm=False)
    assert [o.metrics.num_cached_tokens for o in outputs] == [96, 96]
    for output, logits in zip(outputs, oracle().output_logits(outputs), strict=True):
        done = output.outputs[0]
        assert_entries(llm, done.logprobs or [], logits, done.token_ids, 3)


# -- score


def test_score_token_ids(llm: LLM, reference: Reference) -> None:
    """The reference's own greedy tokens are greedy, others are not; sums are those of prompt_logprobs."""
    pairs: list[tuple[list[int], list[int]]] = []
    for prompt, following in zip(reference.prompts, reference.greedy_tokens.tolist(), strict=True):
        changed = [*following[:9], (following[9] + 1) % VOCAB, *following[10:20]]
        pairs += [(prompt, following[:20]), (prompt, changed), (prompt[:1], prompt[1:]), (prompt, following[:1])]
    found = llm.score(pairs, use_tqdm=False)
    whole = [[*a, *b] for a, b in pairs]
    outputs = llm.generate(whole, greedy(1, prompt_logprobs=0), use_tqdm=False)
    for (context, continuation), (score, is_greedy), output, logits in zip(
        pairs, found, outputs, oracle().logits(whole), strict=True
    ):
        rows, first = log_softmax(logits), len(context)
        want = sum(rows[first - 1 + i, t] for i, t in enumerate(continuation))
        assert score == pytest.approx(want, abs=2e-3 * len(continuation))
        entries = (output.prompt_logprobs or [])[first:]
        assert score == pytest.approx(sum(e[t].logprob for e, t in zip(entries, continuation, strict=True) if e))
        assert is_greedy is all(rows[first - 1 + i].argmax() == t for i, t in enumerate(continuation))
    assert [is_greedy for _, is_greedy in found[0::4]] == [True] * 5
    assert [is_greedy for _, is_greedy in found[1::4]] == [False] * 5


def test_score_text(llm: LLM) -> None:
    """Text is its tokens; an empty context is the first token."""
    encode = llm.tokenizer.encode
    pairs = [("onion ring", "s, two"), ("", "abc"), ("a", "é")]
    as_ids = [(encode(a, True) or [1], encode(b, False)) for a, b in pairs]
    assert as_ids[1][0] == [1]
    assert llm.score(pairs, use_tqdm=False) == llm.score(as_ids, use_tqdm=False)
    assert llm.score([([], encode("abc", False))], use_tqdm=False) == llm.score(pairs[1:2], use_tqdm=False)
    assert llm.score([], use_tqdm=False) == []


def test_score_shares_contexts(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten continuations of one context compute it once."""
    stats: SchedulerStats = small_pool(llm, monkeypatch, 128)
    context = np.random.default_rng(2).integers(0, VOCAB, 80).tolist()
    pairs = [(context, [3 + i, 50, 60 + i]) for i in range(10)]
    found = llm.score(pairs, use_tqdm=False)
    assert stats.cached_tokens >= 8 * (79 // PAGE * PAGE)
    for (_, continuation), (score, _), logits in zip(
        pairs, found, oracle().logits([[*a, *b] for a, b in pairs]), strict=True
    ):
        rows = log_softmax(logits)
        assert score == pytest.approx(sum(rows[79 + i, t] for i, t in enumerate(continuation)), abs=5e-3)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([("a", "")], ["continuation", "''"]),
        ([([5], [])], ["continuation", "[]"]),
        ([("a", [5])], ["pairs", "both"]),
        ([([5], [VOCAB])], ["prompt", "112", "0 to 111"]),
        ([([5], [6] * MAX_MODEL_LEN)], ["prompt", "129 tokens", "at most 127"]),
        ([([5], [6.5])], ["prompt", "6.5"]),
    ],
    ids=str,
)
def test_score_refuses(llm: LLM, monkeypatch: pytest.MonkeyPatch, pairs: Any, words: list[str]) -> None:
    monkeypatch.setattr(llm.engine, "step", lambda: pytest.fail("a step ran"))
    with pytest.raises(ValueError) as error:
        llm.score([([5], [6]), *pairs], use_tqdm=False)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


# -- a stream


def without_logprobs(output: Any) -> Any:
    return replace(output, logprobs=None, cumulative_logprob=None)


def test_stream(llm: LLM, reference: Reference) -> None:
    """Outputs grow: each is a prefix of the next in tokens and text, never ends in half a character, and the last one
    is what `generate` gives."""
    params = [
        greedy(30),
        SamplingParams(temperature=1.5, seed=1, n=3, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=1.5, seed=2, max_tokens=40, ignore_eos=True, logprobs=1),
        SamplingParams(temperature=1.5, seed=3, max_tokens=40, stop=["a", "e", "1"]),
        greedy(1),
    ]
    want = llm.generate(reference.prompts, params, use_tqdm=False)
    place = {tuple(prompt): i for i, prompt in enumerate(reference.prompts)}
    seen: dict[tuple[int, int], list[tuple[str, list[int]]]] = {}
    ended: dict[int, Any] = {}
    for output in llm.stream(reference.prompts, params):
        i = place[tuple(output.prompt_token_ids)]
        assert i not in ended, "it had finished"
        for done in output.outputs:
            if not done.finish_reason:
                assert not done.text.endswith("\ufffd")
            seen.setdefault((i, done.index), []).append((done.text, done.token_ids))
        if output.finished:
            ended[i] = output
    for i, output in enumerate(want):
        for mine, done in zip(ended[i].outputs, output.outputs, strict=True):
            # Which requests share a step differs, and with it the last digits of log-probabilities.
            assert without_logprobs(mine) == without_logprobs(done)
            assert (mine.logprobs is None) == (done.logprobs is None)
            pairs: list[Any] = list(zip(mine.logprobs or [], done.logprobs or [], strict=True))
            for ours, theirs in pairs:
                assert ours.keys() == theirs.keys()
                for token, one in ours.items():
                    assert one.logprob == pytest.approx(theirs[token].logprob, abs=1e-4)
            steps = seen[i, done.index]
            for (text, ids), (later_text, later_ids) in zip(
                steps, [*steps[1:], (done.text, done.token_ids)], strict=True
            ):
                assert later_text.startswith(text)
                assert later_ids[: len(ids)] == ids
            if len(done.token_ids) > 10:
                assert len({text for text, _ in steps}) > 5, "it came in one piece"


def test_closing_a_stream_ends_its_requests(llm: LLM, reference: Reference) -> None:
    stream = llm.stream(reference.prompts, greedy(40))
    got = [next(stream) for _ in range(7)]
    assert not any(o.finished for o in got)
    stream.close()
    assert_idle(llm)
    llm.stream(reference.prompts, greedy(40))  # never read: nothing is queued
    assert_idle(llm)
    found = tokens(llm.generate(reference.prompts[:2], greedy(8), use_tqdm=False))
    assert found == reference.greedy_tokens[:2, :8].tolist()


def test_streams_and_other_calls_share_the_engine(llm: LLM, reference: Reference) -> None:
    """`generate` in the middle of two streams: all get their tokens, one stream is closed early."""
    one, two = llm.stream(reference.prompts[0], greedy(30)), llm.stream(reference.prompts[1], greedy(30))
    for stream in (one, two, one):
        next(stream)
    found = tokens(llm.generate(reference.prompts[2:4], greedy(12), use_tqdm=False))
    assert found == reference.greedy_tokens[2:4, :12].tolist()
    three = llm.stream(reference.prompts[2], greedy(30))
    next(three)
    three.close()
    assert tokens([list(one)[-1], list(two)[-1]]) == reference.greedy_tokens[:2, :30].tolist()
