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
    (b'{"prompt": "x", "temperature": NaN}', None, "NaN"),
    (b'{"prompt": "x", "prompt": "y"}', "prompt", "there twice"),
    ({}, "prompt", "missing"),
    ({"prompt": None}, "prompt", "None"),
    ({"prompt": {"text": "x"}}, "prompt", "a text or a list of token ids"),
    ({"prompt": ["a", "b"]}, "prompt", "its own line"),
    ({"prompt": [1, True]}, "prompt", "token ids"),
    ({"prompt": [1, 2.0]}, "prompt", "token ids"),
    ({"prompt": "x", "custom_id": 7}, "custom_id", "7"),
    ({"prompt": "x", "custom_id": ""}, "custom_id", "512"),
    ({"prompt": "x", "custom_id": "a" * 513}, "custom_id", "512"),
    ({"prompt": "x", "colour": "red"}, "colour", "unknown"),
    ({"prompt": "x", "n": 129}, "n", "from 1 to 128"),
    ({"prompt": "x", "n": 10**30}, "n", "from 1 to 128"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "'a'"),
    ({"custom_id": "a", "method": "GET", "url": CHAT, "body": {}}, "method", "'POST'"),
    ({"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}}, "url", COMPLETIONS),
    ({"custom_id": "a", "method": "POST", "url": CHAT, "body": []}, "body", "object"),
    ({"method": "POST", "url": CHAT, "body": {}}, "custom_id", "missing"),
    ({**chat(), "priority": 1}, "priority", "unknown"),
    (chat(model="gpt-4"), "model", "'tiny'"),
    (chat(stream=True), "stream", "not supported"),
    (chat(stream=0), "stream", "not supported"),
    (chat(tools=[]), "tools", "accepted: allowed_token_ids"),
    (chat(temprature=1), "temprature", "did you mean 'temperature'?"),
    (chat(prompt="x"), "prompt", "unsupported"),
    (chat(response_format={"type": "json_object"}), "response_format", "json_object"),
    (chat(messages=[]), "messages", "at least one"),
    (chat(messages="hi"), "messages", "at least one"),
    (chat(messages=[{"role": "user"}]), "messages", "content"),
    (chat(messages=[{"role": "user", "content": "a", "name": "b"}]), "messages", "'name'"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]), "messages", "only text"),
    (chat(messages=[{"role": "user", "content": [{"type": "text", "text": 1}]}]), "messages", "text"),
    (chat(logprobs=3), "logprobs", "true or false"),
    (chat(top_logprobs=3), "top_logprobs", "logprobs: true"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "from 0 to 20"),
    (chat(max_tokens=3, max_completion_tokens=4), "max_completion_tokens", "max_tokens is 3"),
    (completion(echo=True), "echo", "not supported"),
    (completion(best_of=2), "best_of", "not supported"),
    (completion(suffix="x"), "suffix", "unsupported"),
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
