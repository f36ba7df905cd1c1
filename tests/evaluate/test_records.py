"""Lines of a batch file: what is taken from them, and what each bad one is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.evaluate.lines import Line
from nanoflow_jax.evaluate.records import CHAT, COMPLETIONS, Problem, Record, parse_line
from nanoflow_jax.evaluate.response import encode_record, error_record

MESSAGES = [{"role": "user", "content": "Hello"}]


def parse(fields: Any) -> Record | Problem:
    data = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return parse_line(Line(4, data), ("tiny",))


def chat(**body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"messages": MESSAGES, **body}}


def completion(**body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": {"prompt": "x", **body}}


def test_every_field_arrives() -> None:
    """Under the name that SamplingParams has for it; null is the same as nothing."""
    shared = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "max_tokens": 7, "min_tokens": 1,
        "stop": ["x", "y"], "stop_token_ids": [5], "ignore_eos": True, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.5, "allowed_token_ids": [1, 2], "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }  # fmt: skip
    ignored = {"model": "tiny", "user": "me", "metadata": {"a": "b"}, "stream": False, "store": None, "echo": None}
    expected = {**shared, "logit_bias": {50: -1.5}}
    found = parse(completion(**shared, **ignored, logit_bias={"50": -1.5}, logprobs=3, best_of=1))
    assert found == Record(4, "a", COMPLETIONS, "x", None, {**expected, "logprobs": 3}, found.num_bytes)  # type: ignore
    found = parse(
        chat(**shared, logit_bias={"50": -1.5}, logprobs=True, top_logprobs=4, response_format={"type": "text"})
    )
    assert isinstance(found, Record)
    assert (found.endpoint, found.prompt, found.messages) == (CHAT, None, MESSAGES)
    assert found.sampling == {**expected, "logprobs": 4}
    assert parse({"prompt": [1, 2], **shared}) == Record(
        4, None, COMPLETIONS, [1, 2], None, shared, found_bytes(shared)
    )
    assert parse(chat(max_completion_tokens=9)).sampling == {"max_tokens": 9}  # type: ignore[union-attr]
    assert parse(chat(max_completion_tokens=9, max_tokens=9)).sampling == {"max_tokens": 9}  # type: ignore[union-attr]
    assert parse(chat(logprobs=True)).sampling == {"logprobs": 0}  # type: ignore[union-attr]
    assert parse(chat(logprobs=False, temperature=None)).sampling == {}  # type: ignore[union-attr]
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    found = parse(chat(messages=[{"role": "user", "content": parts}]))
    assert isinstance(found, Record) and found.messages == MESSAGES


def found_bytes(fields: dict[str, Any]) -> int:
    return len(json.dumps({"prompt": [1, 2], **fields}))


BAD: list[tuple[Any, str | None, str]] = [
    (b"", None, "the line is empty"),
    (b"   \t", None, "the line is empty"),
    (b"{", None, "not JSON"),
    (b'{"prompt": "a"} {"prompt": "b"}', None, "not JSON"),
    (b"\x00\x01\xfe\xff", None, "not UTF-8"),
    (b'{"prompt": "a\x00b"}', None, "not JSON"),
    (b"[1, 2]", None, "not a JSON object but list"),
    (b"9" * 5000, None, "not JSON"),
    (b"[" * 100_000, None, "nested too deeply"),
    (b'{"prompt": "x", "temperature": NaN}', "temperature", "finite number"),
    (b'{"prompt": "x", "prompt": "y"}', "prompt", "there twice"),
    ({}, "prompt", "missing"),
    ({"prompt": None}, "prompt", "None"),
    ({"prompt": {"text": "x"}}, "prompt", "a text or a list of token ids"),
    ({"prompt": ["a", "b"]}, "prompt", "its own line"),
    ({"prompt": [1, True]}, "prompt", "token ids"),
    ({"prompt": [1, 2.5]}, "prompt", "token ids"),
    ({"prompt": "x", "custom_id": 7}, "custom_id", "7"),
    ({"prompt": "x", "custom_id": ""}, "custom_id", "512"),
    ({"prompt": "x", "custom_id": "a" * 513}, "custom_id", "512"),
    ({"prompt": "x", "colour": "red"}, "colour", "unknown"),
    ({"prompt": "x", "n": 1001}, "n", "from 1 to 1000"),
    ({"prompt": "x", "n": 10**30}, "n", "from 1 to 1000"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "'a'"),
    ({"custom_id": "a", "method": "GET", "url": CHAT, "body": {}}, "method", "'POST'"),
    ({"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}}, "url", COMPLETIONS),
    ({"custom_id": "a", "method": "POST", "url": CHAT, "body": []}, "body", "object"),
    ({"method": "POST", "url": CHAT, "body": {}}, "custom_id", "missing"),
    ({**chat(), "priority": 1}, "priority", "unknown"),
    (chat(model="gpt-4"), "model", "'tiny'"),
    (chat(stream=True), "stream", "not supported"),
    (chat(stream=0), "stream", "not supported"),
    (completion(tools=[{"type": "function"}]), "tools", "accepted: []"),
    (chat(tools=[3]), "tools", "a list of JSON objects"),
    (chat(documents="x"), "documents", "a list of JSON objects"),
    (chat(chat_template_kwargs=[1]), "chat_template_kwargs", "a JSON object"),
    (chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs", "'messages' is not accepted"),
    (chat(continue_final_message=True), "continue_final_message", "accepted: add_generation_prompt false"),
    (chat(add_generation_prompt="no"), "add_generation_prompt", "true or false"),
    (chat(chat_template="{{ messages }}"), "chat_template", "unsupported"),
    (chat(tool_choice="required"), "tool_choice", 'accepted: "none" or "auto"'),
    (chat(do_sample=False), "do_sample", "accepted: add_generation_prompt, allowed_token_ids"),
    (chat(num_beams=4), "num_beams", "accepted: 1"),
    (chat(num_beams=True), "num_beams", "accepted: 1"),
    (chat(reasoning_effort=3), "reasoning_effort", "one of none, minimal"),
    (chat(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "high"}), "reasoning_effort", "give one"),
    (completion(reasoning_effort="low"), "reasoning_effort", "unsupported"),
    (chat(add_special_tokens=True), "add_special_tokens", "accepted: false"),
    (completion(add_special_tokens=False), "add_special_tokens", "accepted: true"),
    (completion(add_generation_prompt=True), "add_generation_prompt", "unsupported"),
    (chat(temprature=1), "temprature", "did you mean 'temperature'?"),
    (chat(prompt="x"), "prompt", "unsupported"),
    (chat(response_format={"type": "xml"}), "response_format", "json_object"),
    (chat(response_format="json_object"), "response_format", "json_object"),
    (chat(response_format={"type": "json_schema"}), "response_format", "json_schema"),
    (chat(response_format={"type": "json_object", "json_schema": {}}), "response_format", "json_schema"),
    (chat(response_format={"type": "json_schema", "json_schema": {"name": "a"}}), "response_format", "schema"),
    (completion(structured_outputs={"regx": "a"}), "structured_outputs", "did you mean regex"),
    (completion(structured_outputs={"structural_tag": "a"}), "structured_outputs", "structural_tag"),
    (completion(structured_outputs={"regex": "a", "choice": ["b"]}), "structured_outputs", "exactly one"),
    (completion(structured_outputs="json"), "structured_outputs", "an object"),
    (
        completion(structured_outputs={"regex": "a"}, response_format={"type": "json_object"}),
        "response_format",
        "give one",
    ),
    (chat(messages=[]), "messages", "at least one"),
    (chat(messages="hi"), "messages", "at least one"),
    (chat(messages=[{"role": "user"}]), "messages", "content"),
    (chat(messages=[{"role": "user", "content": "a", "name": 3}]), "messages", "name is a text"),
    (chat(messages=[{"role": "user", "content": "a", "mood": "good"}]), "messages", "'mood'"),
    (chat(messages=[{"role": "assistant", "content": None, "tool_calls": [3]}]), "messages", "a tool call is"),
    (chat(messages=[{"role": "a", "tool_calls": [{"function": {"arguments": "{"}}]}]), "messages", "'arguments'"),
    (chat(messages=[{"role": "tool", "content": "a", "tool_call_id": 3}]), "messages", "tool_call_id is a text"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]), "messages", "only text"),
    (chat(messages=[{"role": "user", "content": [{"type": "text", "text": 1}]}]), "messages", "text"),
    (chat(logprobs=3), "logprobs", "true or false"),
    (chat(top_logprobs=3), "top_logprobs", "logprobs: true"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "from 0 to 20"),
    (chat(max_tokens=3, max_completion_tokens=4), "max_completion_tokens", "max_tokens is 3"),
    (completion(echo=3), "echo", "true or false"),
    (chat(echo=True), "echo", "not supported"),
    (completion(best_of=2), "best_of", "not supported"),
    (completion(suffix="x"), "suffix", "not supported"),
    (completion(messages=MESSAGES), "messages", "unsupported"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=lambda x: repr(x)[:40])
def test_a_bad_line_names_its_field(fields: Any, param: str | None, words: str) -> None:
    found = parse(fields)
    assert isinstance(found, Problem), found
    assert found.param == param, found
    assert words in found.message, found
    assert found.line == 4
    assert "\n" not in found.message
    assert len(found.message) < 520
    if isinstance(fields, dict) and isinstance(fields.get("custom_id"), str) and 0 < len(fields["custom_id"]) < 513:
        assert found.custom_id == fields["custom_id"], "its id is in the error record"


def test_bodies_as_client_libraries_write_them() -> None:
    """Objects dumped whole: nulls, defaults written out, whole numbers as 8.0. None of it changes the answer."""
    nulls = dict.fromkeys((
        "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "max_completion_tokens",
        "max_tokens", "metadata", "modalities", "n", "parallel_tool_calls", "prediction", "presence_penalty", "audio",
        "reasoning_effort", "response_format", "seed", "service_tier", "stop", "store", "stream", "stream_options",
        "temperature", "tool_choice", "tools", "top_logprobs", "top_p", "user", "verbosity", "web_search_options",
        "guided_json", "structured_outputs", "chat_template", "truncate_prompt_tokens", "prompt_logprobs",
    ))  # fmt: skip
    assert parse(chat(**nulls)).sampling == {}  # type: ignore[union-attr]
    assert parse(completion(**nulls, suffix=None)).sampling == {}  # type: ignore[union-attr]
    written: dict[str, Any] = {
        "stream": False, "stream_options": {}, "store": False, "response_format": {"type": "text"}, "tools": [],
        "tool_choice": "auto", "functions": [], "function_call": "none", "parallel_tool_calls": True,
        "modalities": ["text"], "service_tier": "auto", "safety_identifier": "a", "prompt_cache_key": "b",
        "num_beams": 1, "num_return_sequences": 1.0, "length_penalty": 1, "early_stopping": False, "best_of": 1,
        "use_beam_search": False, "no_repeat_ngram_size": 0, "typical_p": 1.0, "bad_words": [], "detokenize": True,
        "logits_processors": [], "return_token_ids": False, "spaces_between_special_tokens": True,
        "guidance_scale": 1, "priority": 0, "request_id": "r", "chat_template_kwargs": {}, "documents": [],
    }  # fmt: skip
    for_chat = {"add_special_tokens": False, "add_generation_prompt": True, "continue_final_message": False}
    assert parse(chat(**written, **for_chat, logprobs=False, top_logprobs=0)).sampling == {}  # type: ignore[union-attr]
    for_text = {"add_special_tokens": True, "suffix": "", "echo": False, "logprobs": False}
    assert parse(completion(**written, **for_text)).sampling == {}  # type: ignore[union-attr]
    numbers = {
        "max_tokens": 8.0, "n": 2.0, "top_k": 5.0, "seed": 3.0, "min_tokens": 1.0, "stop_token_ids": [5.0],
        "allowed_token_ids": [1.0, 2],
    }  # fmt: skip
    found = parse(completion(**numbers, logprobs=3.0, temperature=1))
    wanted = {
        "max_tokens": 8, "n": 2, "top_k": 5, "seed": 3, "min_tokens": 1, "stop_token_ids": [5],
        "allowed_token_ids": [1, 2], "logprobs": 3, "temperature": 1,
    }  # fmt: skip
    assert isinstance(found, Record) and found.sampling == wanted
    assert all(type(found.sampling[name]) is int for name in ("max_tokens", "n", "seed", "logprobs"))
    found = parse(chat(max_completion_tokens=9.0, logprobs=True, top_logprobs=2.0))
    assert found.sampling == {"max_tokens": 9, "logprobs": 2}  # type: ignore[union-attr]
    assert parse(completion(max_tokens=8.5)).sampling == {"max_tokens": 8.5}, "SamplingParams refuses it"  # type: ignore[union-attr]
    assert isinstance(parse({"prompt": "x", "custom_id": None, "url": None, "suffix": None}), Record)


def test_seeds_of_64_bits() -> None:
    """Folded to the 32 that the noise has; those of 32 bits stay, and the same seed is always the same noise."""
    seeds = [2**32, 2**32 + 1, 2**40, 2**63 - 1]
    folded = [parse(completion(seed=s)).sampling["seed"] for s in seeds]  # type: ignore[union-attr]
    assert len(set(folded)) == 4 and all(0 <= s < 2**32 for s in folded)
    assert [parse(completion(seed=s)).sampling["seed"] for s in seeds] == folded  # type: ignore[union-attr]
    assert parse(completion(seed=2**32 - 1)).sampling["seed"] == 2**32 - 1  # type: ignore[union-attr]
    assert [parse(completion(seed=s)).sampling["seed"] for s in (-1, 2**63)] == [-1, 2**63]  # type: ignore[union-attr]


def test_messages_as_answers_hold_them() -> None:
    """An answer of the interface sent back: what is empty in it changes nothing; a name goes to the template."""
    answer = {
        "role": "assistant", "content": "Hello", "refusal": None, "tool_calls": None, "function_call": None,
        "audio": None, "annotations": [], "reasoning_content": None, "name": None,
    }  # fmt: skip
    part = {"type": "text", "text": "Hi", "annotations": None}
    found = parse(chat(messages=[{"role": "user", "name": "Ann", "content": [part]}, answer]))
    assert isinstance(found, Record)
    assert found.messages == [
        {"role": "user", "content": "Hi", "name": "Ann"}, {"role": "assistant", "content": "Hello"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"prompt": "x", "n": 2}, {"n": 2, "prompt": "x"}, True),
        ({"prompt": "x", "n": 2}, {"prompt": "x", "n": 3}, False),
        ({"prompt": "x"}, {"prompt": "x "}, False),
        (b"{", b"{{", False),
    ],
    ids=str,
)
def test_a_digest_is_of_the_content(one: Any, other: Any, same: bool) -> None:
    """Not of spaces and order; problems have one, too."""
    assert (parse(one).digest == parse(other).digest) is same
    assert len(parse(one).digest) == 16


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just(10**400)
    | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KNOWN = "prompt messages custom_id body url method n stop logit_bias model logprobs top_logprobs max_tokens stream"
names = st.sampled_from(KNOWN.split()) | st.text(max_size=5)
objects = st.dictionaries(names, values, max_size=5)
bodies = st.builds(
    lambda top, body: {"custom_id": "i", "method": "POST", "url": CHAT, **top, "body": body}, objects, objects
)
texts = st.one_of(values, objects, bodies, objects.map(lambda b: completion(**b))).map(lambda v: json.dumps(v).encode())


@given(
    texts
    | st.binary(max_size=40)
    | st.builds(lambda t, i, b: t[:i] + b + t[i:], texts, st.integers(0, 60), st.binary(max_size=3))
)
def test_any_line_gives_a_record_or_a_problem(data: bytes) -> None:
    """Never an exception; an error record can always be written, and is one line of UTF-8 and JSON."""
    found = parse(data)
    assert isinstance(found, Record | Problem)
    assert found.line == 4
    if isinstance(found, Problem):
        line = encode_record(error_record(found))
        assert line.count(b"\n") == 1
        assert json.loads(line.decode("utf-8"))["error"]["line"] == 4
        assert json.loads(line)["custom_id"] == found.custom_id
