"""Requests whose outputs have a form, beside others that have none: through the engine, as users run them.

At temperature 1e6 the model knows nothing: it takes what is allowed evenly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoflow_jax import LLM, SamplingParams, StructuredOutputsParams
from nanoflow_jax.engine.booking import Booking
from nanoflow_jax.engine.request import CompletionOutput, RequestOutput
from nanoflow_jax.engine.runner import Runner
from nanoflow_jax.engine.structured import Constraint
from nanoflow_jax.step.extras import Sample
from tests.chat_templates import DEEPSEEK_R1, QWEN3
from tests.engine.engine_driver import assert_idle, small_pool
from tests.engine.test_structured_masks import FORMS
from tests.scripted import LLAMA3_CONFIG, llama3, write_model

pytestmark = pytest.mark.usefixtures("no_leak")
PROMPT = "12+30="
OPTIONS: dict[str, Any] = {
    "max_model_len": 256, "decode_slots": 8, "tokens_per_step": 64, "page_size": 16, "kv_cache_tokens": 2048,
    "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny", tensor_parallel_size=1, **OPTIONS)


def forms(**fields: Any) -> list[SamplingParams]:
    """One of each form, random."""
    return [
        SamplingParams(**{"temperature": 1e6, "max_tokens": 150, "seed": i, "structured_outputs": form, **fields})
        for i, (form, _) in enumerate(FORMS.values())
    ]


def run(llm: LLM, params: Sequence[SamplingParams], prompt: Any = PROMPT) -> list[RequestOutput]:
    return llm.generate([prompt] * len(params), list(params), use_tqdm=False)


def first(outputs: Sequence[RequestOutput]) -> list[CompletionOutput]:
    return [output.outputs[0] for output in outputs]


def ids(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [done.token_ids for done in first(outputs)]


def crowd() -> list[SamplingParams]:
    """Random ones of all forms, greedy ones, and as many without a form; longest outputs first and last."""
    free = [SamplingParams(temperature=float(i % 2), seed=i, max_tokens=20 + 5 * i, ignore_eos=True) for i in range(12)]
    return [x for pair in zip([*forms(), *forms(temperature=0.0)], free, strict=True) for x in pair]


def test_outputs_have_the_asked_form(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random and greedy; the twin, whose steps leave the masks out, fails: each request tells it."""
    for temperature in (1e6, 1.0, 0.0):
        for done, (form, fits) in zip(first(run(llm, forms(temperature=temperature))), FORMS.values(), strict=True):
            if done.finish_reason == "stop":
                assert fits(done.text), done.text
                assert done.stop_reason is None
            else:  # what there is can be gone on with
                assert done.finish_reason == "length"
                llm.engine.grammars.constraint(form).take(np.array(done.token_ids))
            assert not done.text.endswith("�")
    real = Runner.finish
    monkeypatch.setattr(Runner, "finish", lambda self, begun, allowed=None: real(self, begun))
    for done in first(run(llm, forms())):
        assert done.finish_reason == "error", done.text
        assert done.error is not None and "structured_outputs: " in done.error


def test_neighbours_are_untouched_and_lose_no_step(llm: LLM) -> None:
    """Bit for bit, and each in as many steps as alone: a constrained request has a row in every step."""
    params = crowd()[:8]
    free = [p for p in params if p.structured_outputs is None]
    before = llm.engine.num_steps
    together = run(llm, params)
    steps = llm.engine.num_steps - before
    assert ids(together[1::2]) == ids(run(llm, free))
    for output, one in zip(together, params, strict=True):
        assert ids(run(llm, [one])) == [output.outputs[0].token_ids]
    longest = max(len(output.outputs[0].token_ids) for output in together)
    assert steps <= longest + 4  # prompts first, one step ahead at the end


def test_only_steps_with_a_constrained_row_have_masks(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of such a step are dispatched before the tokens of the step before are read, what follows after; a
    step without one is dispatched as ever."""
    events, real = list[str](), {name: getattr(Runner, name) for name in ("begin", "finish", "dispatch", "_extra")}

    def spy(name: str) -> Any:
        def call(self: Any, *args: Any) -> Any:
            if name != "_extra":
                events.append(name)
            elif isinstance(args[0], Sample):
                events.append(f"masks {args[0].masks}")
            return real[name](self, *args)

        return call

    for name in real:
        monkeypatch.setattr(Runner, name, spy(name))
    book = Booking.book

    def booked(self: Booking, *args: Any) -> int:
        events.append("book")
        return book(self, *args)

    monkeypatch.setattr(Booking, "book", booked)
    free = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    run(llm, [free, SamplingParams(temperature=0, structured_outputs=StructuredOutputsParams(regex="abc"))])
    told = " ".join(events).replace("dispatch begin finish", "dispatch")
    constrained = "begin finish masks 8 begin book finish masks 8 begin book finish masks 8 "
    # The row of the step after its end has no mask any more; then only the free one is left.
    assert told.startswith(constrained + "begin book finish dispatch book dispatch book"), told
    assert "masks" not in told[len(constrained) :]


def test_preempted_requests_go_on_where_they_were(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = crowd()
    alone = ids(run(llm, params))
    stats = small_pool(llm, monkeypatch, 12, hopeful=True)
    outputs = run(llm, params)
    assert stats.preemptions >= 10
    preempted = [o.metrics.num_preemptions for o in outputs]
    assert sum(1 for p, n in zip(params, preempted, strict=True) if n and p.structured_outputs) >= 3
    assert ids(outputs) == alone


def test_a_step_that_fails_is_computed_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = forms()
    expected, real, calls = ids(run(llm, params)), Runner.finish, 0

    def fails(self: Runner, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("once")
        return real(self, *args)

    monkeypatch.setattr(Runner, "finish", fails)
    assert ids(run(llm, params)) == expected
    assert calls > 5


def test_each_completion_has_a_matcher_of_its_own(llm: LLM) -> None:
    form, fits = FORMS["json"]
    one = SamplingParams(temperature=1e6, seed=3, max_tokens=150, structured_outputs=form)
    (many,) = run(llm, [replace(one, n=6)])
    texts = [done.text for done in many.outputs]
    assert all(fits(text) for text in texts) and len(set(texts)) == 6
    (single, again) = run(llm, [one, one])
    assert single.outputs[0].text == again.outputs[0].text == texts[0]
    assert first(run(llm, [replace(one, seed=4)]))[0].text not in texts


def test_devices_and_determinism(llm: LLM) -> None:
    """Eight devices choose as one does; in deterministic mode a crowd's tokens are those of each alone."""
    params = crowd()
    expected = ids(run(llm, params))
    other = LLM("tiny", tensor_parallel_size=8, deterministic=True, **OPTIONS)
    assert ids(run(other, params)) == expected
    for number in (0, 7, 12, 20):
        assert ids(run(other, [params[number]])) == [expected[number]]
    assert_idle(other)


def test_logprobs_are_those_of_the_raw_logits(llm: LLM) -> None:
    """What is not allowed is among the likeliest all the same."""
    form = StructuredOutputsParams(choice=["zzz"])
    (free,) = run(llm, [SamplingParams(temperature=0, max_tokens=1, logprobs=5)])
    (done,) = run(llm, [SamplingParams(temperature=0, max_tokens=9, logprobs=5, structured_outputs=form)])
    found, raw = done.outputs[0].logprobs, free.outputs[0].logprobs
    assert found is not None and raw is not None and done.outputs[0].text == "zzz"
    z = ord("z")
    assert set(raw[0]) <= set(found[0]) and z not in raw[0]
    assert all(found[0][token] == raw[0][token] for token in raw[0])
    assert found[0][z].rank > 5 and len(found) == 3


def test_ends(llm: LLM) -> None:
    """A text that nothing can be added to ends; else the request's own ends decide."""

    def done(form: StructuredOutputsParams, **fields: Any) -> tuple[str, str | None, Any]:
        found = first(run(llm, [SamplingParams(**{"temperature": 0, "structured_outputs": form, **fields})]))[0]
        return found.text, found.finish_reason, found.stop_reason

    three, many = StructuredOutputsParams(regex="zzz"), StructuredOutputsParams(regex="z+")
    assert done(three) == ("zzz", "stop", None)
    assert done(three, max_tokens=3) == ("zzz", "stop", None)
    assert done(three, max_tokens=2) == ("zz", "length", None)
    assert done(three, min_tokens=10) == ("zzz", "stop", None)
    assert done(three, ignore_eos=True) == ("zzz", "stop", None)
    assert done(three, stop="zz") == ("", "stop", "zz")
    assert done(three, stop="zz", include_stop_str_in_output=True) == ("zz", "stop", "zz")
    assert done(three, stop_token_ids=[ord("z")]) == ("", "stop", ord("z"))
    assert done(many, max_tokens=5, ignore_eos=True) == ("zzzzz", "length", None)
    text, reason, stop = done(many, stop_token_ids=[ord("!")], logit_bias={ord("!"): 100}, ignore_eos=True)
    assert (text, reason, stop) == ("z", "stop", ord("!"))
    text, reason, _ = done(many, logit_bias={llm.engine._eos[0]: 100}, min_tokens=4)
    assert (text, reason) == ("zzzz", "stop")
    (failed,) = first(run(llm, [SamplingParams(temperature=0, structured_outputs=three, allowed_token_ids=[ord("a")])]))
    assert failed.finish_reason == "error" and "none is that of an allowed token" in str(failed.error)


def test_streams_grow(llm: LLM) -> None:
    form = StructuredOutputsParams(choice=["é√😀 the"])
    params = SamplingParams(temperature=1e6, max_tokens=40, structured_outputs=form)
    texts = [output.outputs[0].text for output in llm.stream([PROMPT], params)]
    assert texts[-1] == "é√😀 the" and len(set(texts)) > 4
    assert all(after.startswith(before) for before, after in pairwise(texts))


def test_bad_forms_are_told_before_any_work(llm: LLM) -> None:
    good, bad = forms()[0], SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": "objec"}))
    before = llm.engine.num_steps
    with pytest.raises(ValueError, match=r"^structured_outputs: json: .*cannot be compiled: Invalid type: objec$"):
        run(llm, [good, bad])
    assert llm.engine.num_steps == before


def test_a_matcher_that_gives_up_is_its_requests_own_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mask would allow the end: the text would be taken for complete."""
    params, real = forms(), Constraint.take
    expected, given_up = ids(run(llm, params)), set[int]()

    def take(self: Constraint, output: np.ndarray) -> None:
        if len(output) == 4 and not given_up:
            given_up.add(id(self))
        if id(self) in given_up:
            raise RuntimeError("structured_outputs: too complex")
        real(self, output)

    monkeypatch.setattr(Constraint, "take", take)
    found = first(run(llm, params))
    assert [done.finish_reason for done in found].count("error") == 1
    for done, tokens in zip(found, expected, strict=True):
        assert done.token_ids == tokens or done.error == "RuntimeError: structured_outputs: too complex"


# -- thoughts


def thinker(folder: Path, template: str, follows: dict[str, str]) -> LLM:
    """A model that says what follows its last token, of a style with <think> and </think>."""
    tokenizer = llama3()
    tokenizer.add_tokens(["<think>", "</think>", "<|User|>", "<|Assistant|>"])

    def token(text: str) -> int:
        (found,) = tokenizer.encode(text, add_special_tokens=False).ids
        return found

    made = write_model(
        folder, tokenizer, {**LLAMA3_CONFIG, "chat_template": template},
        {token(a): token(b) for a, b in follows.items()}, token("x"), eos_token_id=token("<|end_of_text|>"),
    )  # fmt: skip
    return LLM(made, tensor_parallel_size=1, **{**OPTIONS, "max_model_len": 128, "kv_cache_tokens": 512})


@pytest.mark.parametrize("style", ["begun by the prompt", "begun by the model", "none"])
def test_a_thought_before_the_answer_is_free(style: str, tmp_path: Path) -> None:
    template = DEEPSEEK_R1 if style == "begun by the prompt" else QWEN3
    # The newest token of the prompt decides: in R1's it is the end of the line behind <think>.
    follows = {"x": "y", "y": "</think>", "</think>": "x", "\n": "x" if style == "begun by the prompt" else "<think>"}
    follows |= {"<think>": "x"}
    if style == "none":
        follows["\n"] = "x"
    llm = thinker(tmp_path, template, follows)
    form = StructuredOutputsParams(regex="[0-9]{3}")
    params = SamplingParams(temperature=0, max_tokens=20, structured_outputs=form)
    (output,) = llm.chat([{"role": "user", "content": "one"}], params, use_tqdm=False)
    done = output.outputs[0]
    assert done.finish_reason == "stop" and done.error is None
    assert done.content is not None and re.fullmatch("[0-9]{3}", done.content)
    assert done.reasoning_content == (None if style == "none" else "xy")
    short = replace(params, max_tokens=2)
    (output,) = llm.chat([{"role": "user", "content": "one"}], short, use_tqdm=False)
    assert output.outputs[0].finish_reason == "length"
    assert_idle(llm)
