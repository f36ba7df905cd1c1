"""What a request may ask for: completions, stops, minimum lengths, biases, penalties. Each is compared with what the
raw logits, computed by a step of their own, say."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.engine.engine import Engine
from nanoflow_jax.engine.request import Request, RequestOutput
from tests.engine.engine_driver import (
    CASE,
    EOS,
    VOCAB,
    greedy,
    oracle,
    shared_llm,
    small_pool,
    tokens,
    write_tokenizer,
)
from tests.reference.checkpoints import Reference, load_reference

pytestmark = pytest.mark.usefixtures("no_leak")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return shared_llm()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return load_reference(CASE)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))[1]


# -- completions


def test_completions_have_noise_of_their_own(llm: LLM, reference: Reference) -> None:
    """Completion 0 with seed s is the one that n=1 gives; the others differ, from each other and from seed to seed, and
    come again with the seed."""
    prompts = reference.prompts[:2]
    one = SamplingParams(temperature=1.0, seed=7, max_tokens=16, ignore_eos=True)
    many = replace(one, n=5)
    single, together, again, other = (
        llm.generate(prompts, p, use_tqdm=False) for p in (one, many, many, replace(many, seed=8))
    )
    for s, t, a, o in zip(single, together, again, other, strict=True):
        assert [c.index for c in t.outputs] == [0, 1, 2, 3, 4]
        assert t.outputs[0].token_ids == s.outputs[0].token_ids
        found = [tuple(c.token_ids) for c in t.outputs]
        assert found == [tuple(c.token_ids) for c in a.outputs]
        assert len({*found, *(tuple(c.token_ids) for c in o.outputs)}) == 10
        assert {len(f) for f in found} == {16}
        assert t.finished
    assert len({o.request_id for o in together}) == 2
    free = llm.generate(prompts[0], SamplingParams(n=3, max_tokens=16, ignore_eos=True), use_tqdm=False)
    assert len({tuple(c.token_ids) for c in free[0].outputs}) == 3


# -- stops


def text_of(pieces: list[bytes], ids: list[int]) -> str:
    return b"".join(pieces[i] for i in ids).decode("utf-8", "replace")


def varied(llm: LLM, prompt: list[int], count: int) -> list[RequestOutput]:
    """Sampled outputs without stops, of many different tokens."""
    params = [SamplingParams(temperature=1.5, seed=s, max_tokens=40, ignore_eos=True) for s in range(count)]
    return llm.generate([prompt] * count, params, use_tqdm=False)


def test_text_is_that_of_the_bytes(llm: LLM, reference: Reference, pieces: list[bytes]) -> None:
    for output in varied(llm, reference.prompts[0], 8):
        assert output.outputs[0].text == text_of(pieces, output.outputs[0].token_ids)


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(llm: LLM, reference: Reference, pieces: list[bytes], include: bool) -> None:
    """Sixty strings cut at random from unstopped texts end the same requests with the token that completes them, be it
    in the middle of a token or over several."""
    prompt, rng = reference.prompts[0], np.random.default_rng(5)
    params, want = [], []
    kinds: Counter[str] = Counter()
    for seed, output in enumerate(varied(llm, prompt, 12)):
        ids = output.outputs[0].token_ids
        texts = [text_of(pieces, ids[:k]) for k in range(len(ids) + 1)]
        for _ in range(5):
            while True:
                start = int(rng.integers(0, len(texts[-1]) - 6))
                stop = texts[-1][start : start + int(rng.integers(1, 6))]
                if "\ufffd" not in stop:
                    break
            k = next(k for k, text in enumerate(texts) if stop in text)
            at = texts[k].index(stop)
            inside = at + len(stop) < len(texts[k])
            kinds["inside a token" if inside else "at its end"] += 1
            kinds["over several tokens"] += texts[k - 1].startswith(texts[k][: at + 1])
            stops = [stop, "never there", stop + "\0"]
            params.append(
                SamplingParams(
                    temperature=1.5, seed=seed, max_tokens=40, ignore_eos=True,
                    stop=stops if rng.integers(2) else stop, include_stop_str_in_output=include,
                )
            )  # fmt: skip
            want.append((ids[:k], texts[k][: at + len(stop) if include else at], stop))
    assert min(kinds.values()) >= 5, kinds
    found = [o.outputs[0] for o in llm.generate([prompt] * len(params), params, use_tqdm=False)]
    assert [(o.token_ids, o.text, o.stop_reason) for o in found] == want
    assert {o.finish_reason for o in found} == {"stop"}


def test_stop_strings_end_preempted_requests_too(
    llm: LLM, reference: Reference, pieces: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is kept while a request waits for its pages, and while its last token is still on its way."""
    prompt = reference.prompts[3]
    params, want = [], []
    for seed, output in enumerate(varied(llm, prompt, 24)):
        ids = output.outputs[0].token_ids
        last = text_of(pieces, ids)[-4:]
        stop = last if "\ufffd" not in last else "never there"
        k = next((k for k in range(len(ids) + 1) if stop in text_of(pieces, ids[:k])), len(ids))
        params.append(SamplingParams(temperature=1.5, seed=seed, max_tokens=40, ignore_eos=True, stop=stop))
        want.append(ids[:k])
    stats = small_pool(llm, monkeypatch, 20, hopeful=True)
    assert tokens(llm.generate([prompt] * len(params), params, use_tqdm=False)) == want
    assert stats.preemptions > 10


def test_a_stop_token_among_many(llm: LLM, reference: Reference) -> None:
    """More stop tokens than are compared at once."""
    ids = reference.greedy_tokens[0].tolist()
    place = next(i for i in range(5, 64) if ids[i] not in ids[:i])
    others = [t for t in range(VOCAB) if t not in ids][:20]
    (output,) = llm.generate([reference.prompts[0]], greedy(stop_token_ids=[*others, ids[place]]), use_tqdm=False)
    assert output.outputs[0].token_ids == ids[: place + 1]
    assert output.outputs[0].stop_reason == ids[place]


def test_min_tokens(llm: LLM, reference: Reference, pieces: list[bytes]) -> None:
    """Before it no stop token is generated and no stop string counts; the tokens are the likeliest of the others."""
    prompt, free = reference.prompts[0], reference.greedy_tokens[0].tolist()
    stop = free[:6]
    params = greedy(40, min_tokens=20, stop_token_ids=stop)
    string = text_of(pieces, free[:2])
    found, texts = llm.generate([prompt] * 2, [params, greedy(40, min_tokens=20, stop=string)], use_tqdm=False)
    ids = found.outputs[0].token_ids
    assert len(ids) >= 20
    assert not set(ids[:20]) & set(stop)
    logits = oracle().output_logits([found])[0]
    banned = np.where(np.isin(np.arange(VOCAB), stop), -np.inf, logits)
    assert_likeliest(np.where(np.arange(len(ids))[:, None] < 20, banned, logits), ids)
    if found.outputs[0].finish_reason == "stop":
        assert ids[-1] in stop
    done = texts.outputs[0]
    assert len(done.token_ids) >= 20
    assert done.token_ids == free[: len(done.token_ids)]
    assert done.finish_reason == ("stop" if string in text_of(pieces, free[20:40]) else "length")


# -- biases and penalties


def assert_likeliest(logits: np.ndarray, ids: list[int]) -> None:
    """Each token is the argmax of its row of logits [n, V]."""
    best = logits.argmax(axis=1)
    chosen = logits[np.arange(len(ids)), ids]
    tied = logits.max(axis=1) - chosen < 1e-4
    assert ((best == ids) | tied).all(), f"first at {int(np.argmin((best == ids) | tied))}"
    assert (best == ids).mean() > 0.9


def penalised(params: SamplingParams, prompt: list[int], ids: list[int], logits: np.ndarray) -> np.ndarray:
    """The definitions, token by token: what each of `ids` must be the argmax of."""
    rows = []
    for n, row in enumerate(logits.astype(np.float64)):
        x = row.copy()
        for token, bias in (params.logit_bias or {}).items():
            x[token] += bias
        if params.allowed_token_ids is not None:
            x[[t for t in range(VOCAB) if t not in params.allowed_token_ids]] = -np.inf
        counts = Counter(ids[:n])
        for token in {*prompt, *counts}:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        for token, count in counts.items():
            x[token] -= params.frequency_penalty * count + params.presence_penalty
        rows.append(x)
    return np.array(rows)


OPTIONS: dict[str, dict[str, Any]] = {
    "bias": {"logit_bias": {5: 3.0, 40: -100.0, 98: 2.5, EOS: 1.0}},
    "allowed": {"allowed_token_ids": [3, 9, 17, 40, 41, 42, 100]},
    "allowed and biased": {"allowed_token_ids": [3, 9, 17, 40], "logit_bias": {9: 1.5, 50: 100.0}},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "negative": {"presence_penalty": -0.5, "frequency_penalty": -0.1},
    "repetition": {"repetition_penalty": 1.3},
    "all": {
        "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1, "logit_bias": {5: 2.0, 98: -3.0}
    },
}  # fmt: skip


@pytest.mark.parametrize("num_pages", [128, 18])
def test_biases_and_penalties(llm: LLM, reference: Reference, monkeypatch: pytest.MonkeyPatch, num_pages: int) -> None:
    """Greedy requests with each option, beside each other: every token is the likeliest after the adjustment, also
    where requests are preempted and their token counts written again."""
    stats = small_pool(llm, monkeypatch, num_pages, hopeful=True)
    prompts = [reference.prompts[1 + i % 3] for i in range(len(OPTIONS))]
    params = [greedy(48, **fields) for fields in OPTIONS.values()]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for name, p, output, logits in zip(OPTIONS, params, outputs, oracle().output_logits(outputs), strict=True):
        ids = output.outputs[0].token_ids
        assert len(ids) == 48
        adjusted = penalised(p, output.prompt_token_ids, ids, logits)
        assert_likeliest(adjusted, ids)
        assert (logits.argmax(axis=1) != ids).any(), f"{name} changed nothing: the test could not fail"
    assert (stats.preemptions > 0) is (num_pages == 18)


def test_an_option_ends_with_its_request(llm: LLM, reference: Reference) -> None:
    """Slots and bias rows are used again; a request without options after one with them is not touched by them. More
    different biases than the table has rows wait for each other."""
    prompt = reference.prompts[1]
    params = [greedy(4, logit_bias={(3 + i) % VOCAB: 50.0}, repetition_penalty=1.2) for i in range(100)]
    outputs = tokens(llm.generate([prompt] * 100, params, use_tqdm=False))
    assert [ids[0] for ids in outputs] == [(3 + i) % VOCAB for i in range(100)]
    found = tokens(llm.generate([prompt] * 8, greedy(16), use_tqdm=False))
    assert found == [reference.greedy_tokens[1, :16].tolist()] * 8


# -- refusals


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"logit_bias": {VOCAB: 1.0}}, ["logit_bias", "112", "0 to 111"]),
        ({"allowed_token_ids": [3, 500]}, ["allowed_token_ids", "500", "0 to 111"]),
        ({"stop_token_ids": [112]}, ["stop_token_ids", "112"]),
        ({"min_tokens": 1, "allowed_token_ids": [EOS], "ignore_eos": False}, ["min_tokens", "allowed_token_ids"]),
    ],
    ids=str,
)
def test_what_the_vocabulary_does_not_allow(llm: LLM, fields: dict[str, Any], words: list[str]) -> None:
    """One line, before any prompt runs; the same options within the vocabulary pass elsewhere in this file."""
    for call in (llm.generate, llm.stream):
        with pytest.raises(ValueError) as error:
            call([[5, 6]], greedy(4, **fields))
        message = str(error.value)
        assert "\n" not in message
        assert all(word in message for word in words), message
    (output,) = llm.generate([[5, 6]], greedy(4, min_tokens=1, allowed_token_ids=[EOS]), use_tqdm=False)
    assert output.outputs[0].token_ids == [EOS] * 4, "with ignore_eos the end token is one like the others"


def test_folder_of_the_tokenizer_is_as_described(pieces: list[bytes], tmp_path: Path) -> None:
    """The tests above need tokens of several characters, and of less than one."""
    assert sum(len(p) > 1 for p in pieces) > 50
    assert sum(not p.isascii() for p in pieces) >= 10
    assert write_tokenizer(tmp_path)[1] == pieces


@pytest.mark.parametrize("how", ["generate", "run_stream", "stream"])
def test_the_completions_that_wait_do_not_grow_with_n(
    llm: LLM, reference: Reference, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts with n = 60 never more requests are there than slots and what the next steps may take, and a prompt's
    outputs are given out as soon as its last one has ended: before later prompts have begun."""
    alive, most, order = weakref.WeakSet(), 0, []
    add, step = Engine.add, Engine.step

    def added(self: Engine, *args: Any, **options: Any) -> Request:
        request = add(self, *args, **options)
        alive.add(request)
        return request

    def stepped(self: Engine) -> list[Request]:
        nonlocal most
        most = max(most, len(alive))
        return step(self)

    monkeypatch.setattr(Engine, "add", added)
    monkeypatch.setattr(Engine, "step", stepped)
    params = SamplingParams(temperature=1.0, seed=3, n=60, max_tokens=2, ignore_eos=True)
    prompts = [p[:9] for p in reference.prompts[:3]]
    if how == "generate":
        outputs = llm.generate(prompts, params, use_tqdm=False)
    elif how == "run_stream":
        found = {}
        for work, output in llm.run_stream(llm.prepare(p, params, i) for i, p in enumerate(prompts)):
            found[work.key] = output
            order.append(len(alive))
        outputs = [found[i] for i in range(3)]
    else:
        last = {o.request_id: o for o in llm.stream(prompts, params)}
        outputs = list(last.values())
        assert all(o.finished for o in outputs)
    assert [[c.index for c in o.outputs] for o in outputs] == [list(range(60))] * 3  # type: ignore[union-attr]
    assert len({tuple(c.token_ids) for c in outputs[0].outputs}) > 20  # type: ignore[union-attr]
    ahead = 2 * max(shape.prefill_segments for shape in llm.engine.scheduler.shapes)
    assert most <= 2 * (llm.engine.running.count + ahead) < 60, "some are kept a step longer"
