"""What the endpoints answer: the same as batch files and `LLM`, whole or streamed, and one line for what is refused."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the serve extra is not installed")

from prometheus_client.parser import text_string_to_metric_families

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.evaluate.batch import Settings, answer
from nanoflow_jax.evaluate.lines import Line
from nanoflow_jax.evaluate.records import CHAT, COMPLETIONS, parse_line
from nanoflow_jax.serve.app import Limits, Server
from nanoflow_jax.serve.run import bind, listening
from tests.serve.client import Client, serving

HELLO = [{"role": "user", "content": "What is 25+17?"}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "12+30=", "max_tokens": 8, "temperature": 0}),
    (COMPLETIONS, {"prompt": "reverse nanobatch=", "max_tokens": 20, "logprobs": 2, "echo": True}),
    (COMPLETIONS, {"prompt": [256, 49, 50, 43, 51, 48, 61], "max_tokens": 0, "logprobs": 1, "echo": True}),
    (COMPLETIONS, {"prompt": "12+30=", "max_tokens": 1, "echo": True}),
    (COMPLETIONS, {"prompt": "reverse abcdef=", "stop": ["edx", "cb"], "max_tokens": 20, "logprobs": 0}),
    (COMPLETIONS, {"prompt": "sort 529=", "n": 3, "temperature": 2.0, "seed": 5, "max_tokens": 9, "ignore_eos": True}),
    (COMPLETIONS, {"prompt": "sort 52917=", "temperature": 3.0, "min_p": 0.01, "top_k": 50, "top_p": 0.99, "seed": 1}),
    (CHAT, {"messages": HELLO, "max_completion_tokens": 12, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"messages": HELLO, "n": 2, "temperature": 1.5, "seed": 3, "max_tokens": 7}),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}, "tools": [{"type": "function"}]}),
]  # fmt: skip


def record(llm: LLM, url: str, body: dict[str, Any]) -> Any:
    """The body of the response in a batch file."""
    found: list[Any] = []
    line = json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}).encode()
    answer(llm, [parse_line(Line(1, line))], Settings("tiny"), found.append)
    assert found[0]["error"] is None, found
    return found[0]["response"]["body"]


def joined(events: list[Any]) -> dict[int, Any]:
    """The choices that the chunks of a stream come to."""
    found: dict[int, Any] = {}
    for event in events:
        for part in event["choices"]:
            delta = part.pop("delta", None)
            whole = found.setdefault(part["index"], {"texts": {}, "logprobs": None, "finish_reason": None})
            assert whole["finish_reason"] is None, "nothing follows the end"
            whole["finish_reason"] = part["finish_reason"]
            for name, text in ({"text": part["text"]} if delta is None else delta).items():
                whole["texts"][name] = whole["texts"].get(name, "") + text
            if part["logprobs"] is not None:
                before = whole["logprobs"] or {}
                whole["logprobs"] = {k: before.get(k, []) + v for k, v in part["logprobs"].items() if v is not None}
    return found


@pytest.mark.parametrize(("url", "body"), BODIES, ids=range(len(BODIES)))
def test_answers_are_those_of_a_batch_file_whole_and_streamed(llm: LLM, url: str, body: dict[str, Any]) -> None:
    wanted = record(llm, url, body)

    async def ask() -> tuple[Any, list[Any]]:
        async with serving(llm) as client:
            whole = await client.post(url, {**body, "model": "tiny"})
            options = {"stream": True, "stream_options": {"include_usage": True}}
            streamed = await client.post(url, {**body, **options})
            assert streamed.headers["content-type"].startswith("text/event-stream")
            return whole.json, streamed.events

    whole, events = asyncio.run(ask())
    assert whole["choices"] == wanted["choices"]
    assert whole["usage"] == wanted["usage"] == events[-1]["usage"]
    assert (whole["object"], whole["model"]) == (wanted["object"], "tiny")
    parts = joined(events)
    assert list(parts) == list(range(len(wanted["choices"])))
    for choice in wanted["choices"]:
        part = parts[choice["index"]]
        texts = choice.get("message") or {"text": choice["text"]}
        assert part["texts"] == {name: text for name, text in texts.items() if text is not None}
        assert part["finish_reason"] == choice["finish_reason"]
        logprobs = choice["logprobs"] and {k: v for k, v in choice["logprobs"].items() if v is not None}
        assert part["logprobs"] == logprobs


def test_echo_is_the_prompt_with_its_logprobs(llm: LLM) -> None:
    """As `prompt_logprobs` has them; lm-eval's harness reads them by position."""
    choice = record(llm, COMPLETIONS, {"prompt": "12+30=", "max_tokens": 0, "logprobs": 1, "echo": True})["choices"][0]
    ids = llm.tokenizer.encode("12+30=", True)
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    steps = llm.generate([ids], params, use_tqdm=False)[0].prompt_logprobs
    assert steps is not None
    assert choice["text"] == "12+30=" and choice["finish_reason"] == "length"
    found = choice["logprobs"]
    wanted = [step and step[token].logprob for token, step in zip(ids, steps, strict=True)]
    assert found["token_logprobs"] == wanted and wanted[0] is None
    assert found["tokens"][1:] == list("12+30=") and found["text_offset"] == [0, 0, 1, 2, 3, 4, 5]
    more = record(llm, COMPLETIONS, {"prompt": "12+30=", "max_tokens": 2, "logprobs": 1, "echo": True})["choices"][0]
    assert more["text"] == "12+30=42" and more["logprobs"]["text_offset"][-3:] == [5, 6, 7]
    assert [max(t.values()) for t in found["top_logprobs"][1:]] == [
        max(lp.logprob for lp in s.values()) for s in steps if s
    ]


def test_several_prompts_of_one_request(llm: LLM) -> None:
    async def ask() -> None:
        async with serving(llm) as client:
            prompts = ["12+30=", "reverse abc=", "47+85="]
            fields = {"n": 2, "temperature": 0.01, "seed": 0, "max_tokens": 8}
            done = (await client.complete(prompts, **fields)).json
            assert [c["index"] for c in done["choices"]] == list(range(6))
            assert [c["text"] for c in done["choices"]] == ["42", "42", "cba", "cba", "132", "132"]
            parts = joined((await client.complete(prompts, stream=True, **fields)).events)
            assert [parts[i]["texts"]["text"] for i in range(6)] == ["42", "42", "cba", "cba", "132", "132"]
            ids = [llm.tokenizer.encode(p, True) for p in prompts]
            done = (await client.complete(ids, max_tokens=8)).json
            assert [c["text"] for c in done["choices"]] == ["42", "cba", "132"]
            assert done["usage"]["prompt_tokens"] == sum(map(len, ids))

    asyncio.run(ask())


def test_samples_without_a_seed_differ(llm: LLM) -> None:
    async def ask() -> None:
        async with serving(llm) as client:
            fields = {"temperature": 3.0, "max_tokens": 12, "ignore_eos": True}
            asked = [client.complete("12", **fields) for _ in range(3)] + [client.complete(["12", "12"], **fields)]
            done = [c["text"] for reply in await asyncio.gather(*asked) for c in reply.json["choices"]]
            assert len(set(done)) == 5, done

    asyncio.run(ask())


REFUSED: list[tuple[str, Any, int, str | None, str]] = [
    (COMPLETIONS, b"", 400, None, "the body is empty"),
    (COMPLETIONS, b"\xff", 400, None, "not UTF-8 text (byte 0 of the body)"),
    (COMPLETIONS, b"[1]", 400, None, "not a JSON object"),
    (COMPLETIONS, {}, 400, "prompt", "a text or a list of token ids"),
    (COMPLETIONS, {"prompt": ["a", 3]}, 400, "prompt", "a text or a list of token ids"),
    (COMPLETIONS, {"prompt": ["a"] * 5}, 400, "prompt", "5 prompts; accepted: at most 4"),
    (COMPLETIONS, {"prompt": [999999]}, 400, "prompt", "outside the vocabulary"),
    (COMPLETIONS, {"prompt": "a" * 200}, 400, "prompt", "accepted: at most 127"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "an integer from 1"),
    (COMPLETIONS, {"prompt": "a", "top_p": 1.5}, 400, "top_p", "at most 1"),
    (COMPLETIONS, {"prompt": "a", "maxtokens": 5}, 400, "maxtokens", "did you mean 'max_tokens'"),
    (COMPLETIONS, {"prompt": "a", "stream": 1}, 400, "stream", "true or false"),
    (
        COMPLETIONS,
        {"prompt": "a", "stream": None, "stream_options": {"include_usage": True}},
        400,
        "stream_options",
        "true",
    ),
    (COMPLETIONS, {"prompt": "a", "stream": True, "stream_options": {"x": 1}}, 400, "stream_options", "include_usage"),
    (COMPLETIONS, {"prompt": "a", "n": 12, "temperature": 1}, 400, "n", "12 completions; accepted: at most 11"),
    (COMPLETIONS, {"prompt": "a", "model": "gpt-4"}, 404, "model", "'tiny'"),
    (COMPLETIONS, {"prompt": "\ud800", "model": "\udcff"}, 404, "model", "\\udcff"),
    (CHAT, {"messages": []}, 400, "messages", "at least one message"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "only text"),
    (CHAT, {"messages": HELLO, "prompt": "a"}, 400, "prompt", "unknown or unsupported field"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_is_one_line_that_names_the_field(llm: LLM, stream: bool) -> None:
    async def ask() -> None:
        async with serving(llm, Limits(prompts=4, queue=3)) as client:
            for url, body, status, param, words in REFUSED:
                if isinstance(body, dict):
                    body = {"stream": stream, **body}
                reply = await client.post(url, body)
                error = reply.json["error"]
                assert (reply.status, error["param"]) == (status, param), (body, error)
                assert words in error["message"] and "\n" not in error["message"], error
                assert error["type"] == "invalid_request_error" and error["code"]

    asyncio.run(ask())


def test_what_is_no_request_is_told_in_the_same_form(llm: LLM) -> None:
    async def ask() -> None:
        async with serving(llm) as client:
            for method, path, status, words in (
                ("GET", "/v1/nothing", 404, "/v1/nothing is not here"),
                ("GET", COMPLETIONS, 405, "GET is not accepted here; accepted: POST"),
                ("POST", "/health", 405, "accepted: GET"),
                ("GET", "/v1/models/other", 404, "accepted: 'tiny'"),
            ):
                reply = await client.ask(method, path)
                assert reply.status == status and words in reply.json["error"]["message"], reply
            reply = await client.ask("POST", COMPLETIONS, b'{"prompt": "a"}', content_type="text/plain")
            assert reply.status == 415 and "application/json" in reply.json["error"]["message"]
            models = (await client.get("/v1/models")).json["data"]
            assert [m["id"] for m in models] == ["tiny"] and models[0]["max_model_len"] == 128
            assert (await client.get("/v1/models/tiny")).json == models[0]
            assert (await client.get("/health")).json == {"status": "ok"}

    asyncio.run(ask())


def test_a_body_that_is_too_large_is_not_read(llm: LLM) -> None:
    async def ask() -> None:
        async with serving(llm, Limits(body_bytes=1000)) as client:
            told = await client.post(COMPLETIONS, b"{}", content_length="1001")
            chunks = [b" " * 400] * 5
            found = await client.post(COMPLETIONS, chunks)
            assert told.status == found.status == 413
            assert told.json["error"]["code"] == "request_too_large"
            just = json.dumps({"prompt": "12+30=", "max_tokens": 4}).encode().ljust(1000)
            assert (await client.post(COMPLETIONS, [just[:300], just[300:]])).json["choices"][0]["text"] == "42"

    asyncio.run(ask())


def test_a_key_opens_all_but_health(llm: LLM) -> None:
    async def ask() -> None:
        async with serving(llm, api_key="s€cret") as client:
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
                for headers in ({}, {"authorization": "Bearer secret"}, {"authorization": "s€cret"}):
                    reply = await client.get(path, **headers)
                    assert reply.status == 401 and reply.json["error"]["code"] == "invalid_api_key"
            assert (await client.get("/v1/models", authorization="Bearer s€cret")).status == 200
            assert (await client.get("/health")).status == 200

    asyncio.run(ask())


def test_a_full_queue_says_when_to_come_again(llm: LLM) -> None:
    """Eight slots, and room for two more."""

    async def ask() -> None:
        async with serving(llm, Limits(queue=2)) as client:
            first = [asyncio.ensure_future(client.complete("12", max_tokens=100, ignore_eos=True)) for _ in range(10)]
            while client.server.engine.load < 10:
                await asyncio.sleep(0)
            reply = await client.complete("12+30=")
            assert reply.status == 429 and int(reply.headers["retry-after"]) >= 1
            assert reply.json["error"]["type"] == "rate_limit_error"
            assert all(r.status == 200 for r in await asyncio.gather(*first))
            assert (await client.complete("12+30=")).status == 200

    asyncio.run(ask())


def test_what_runs_is_finished_and_what_is_new_is_refused(llm: LLM) -> None:
    async def ask() -> None:
        async with serving(llm) as client:
            running = asyncio.ensure_future(client.complete("12", max_tokens=60, ignore_eos=True, stream=True))
            while not client.server.engine.load:
                await asyncio.sleep(0)
            drained = asyncio.ensure_future(client.server.drain())
            await asyncio.sleep(0)
            new, health = await client.complete("12+30="), await client.get("/health")
            assert new.status == health.status == 503
            assert new.json["error"]["code"] == "shutting_down" and "retry-after" in new.headers
            assert not drained.done()
            assert (await running).events[-1]["choices"][0]["finish_reason"] == "length"
            await drained

    asyncio.run(ask())


def test_a_request_on_which_the_engine_fails_is_told_and_the_next_is_served(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = llm.engine.runner
    dispatch = runner.dispatch

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of order")

    async def ask() -> None:
        async with serving(llm) as client:
            monkeypatch.setattr(runner, "dispatch", fail)
            whole, streamed = await client.complete("12+30="), await client.complete("12+30=", stream=True)
            assert whole.status == 500 and "out of order" in whole.json["error"]["message"]
            assert whole.json["error"]["type"] == "server_error"
            assert b'"error": {"message": "RuntimeError: out of order' in streamed.body
            assert b"[DONE]" not in streamed.body
            monkeypatch.setattr(runner, "dispatch", dispatch)
            assert (await client.complete("12+30=")).json["choices"][0]["text"] == "42"

    asyncio.run(ask())


def test_a_collection_does_not_look_at_what_was_there(llm: LLM) -> None:
    """The model's and JAX's objects: a full collection in the middle of requests would stop all threads."""

    async def ask() -> None:
        server = Server(llm, Settings("tiny"))
        before = len(gc.get_objects())
        async with listening(server, bind("127.0.0.1", 0)):
            assert len(gc.get_objects()) < before / 10
        server.close()

    asyncio.run(ask())
    gc.unfreeze()


def test_metrics_count(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step = llm.engine.step

    def slow() -> Any:
        time.sleep(0.005)  # so that a request is still running when it is looked at
        return step()

    async def counts(client: Client) -> dict[str, float]:
        reply = await client.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        found = {}
        for family in text_string_to_metric_families(reply.body.decode()):
            assert family.documentation and family.type in ("counter", "gauge", "histogram")
            for sample in family.samples:
                found["".join([sample.name.removeprefix("nanoflow_"), *sorted(sample.labels.values())])] = sample.value
        return found

    async def ask() -> None:
        async with serving(llm) as client:
            await client.complete(["12+30=", "reverse abc="], max_tokens=8)
            await client.chat("What is 25+17?", stream=True)
            await client.complete("12", top_p=3)
            await client.complete("12", stream=True, leaves=lambda parts: parts > 1, max_tokens=100, ignore_eos=True)
            with monkeypatch.context() as patch:
                patch.setattr(llm.engine, "step", slow)
                running = asyncio.ensure_future(client.complete("12", max_tokens=100, ignore_eos=True))
                while not (found := await counts(client))["completions_running"]:  # it is counted after its first step
                    assert not running.done()
            assert found["completions_running"] == 1 and found["kv_pages_in_use"] > 0
            await running
            found = await counts(client)
            assert found["requests_total/v1/completions200"] == 2 and found["requests_total/v1/completions400"] == 1
            assert found["requests_total/v1/completions499"] == 1
            assert found["completions_totalstop"] == 3 and found["completions_totalcancelled"] == 1
            assert found["prompt_tokens_total"] == sum(
                len(llm.tokenizer.encode(p, True)) for p in ("12+30=", "reverse abc=", "12")
            ) + len(llm.tokenizer.encode(llm.tokenizer.chat([{"role": "user", "content": "What is 25+17?"}]), False))
            assert found["generated_tokens_total"] == 3 + 4 + 9 + 100
            assert found["completion_seconds_count"] == found["completion_seconds_bucket+Inf"] == 4
            assert found["completions_running"] == found["completions_waiting"] == found["kv_pages_in_use"] == 0
            assert found["slots"] == 8 and found["kv_pages"] == llm.engine.scheduler.pool.num_pages

    asyncio.run(ask())
