"""A batch file through the model: every line has one record, and each says what the library itself says."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoflow_jax import LLM, SamplingParams, api
from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.booking import Booking
from nanoflow_jax.engine.engine import Engine
from nanoflow_jax.engine.feed import Work
from nanoflow_jax.engine.request import RequestOutput
from nanoflow_jax.evaluate import batch, journal
from nanoflow_jax.evaluate.batch import Settings, answer, parse_lines, write_in_order
from nanoflow_jax.evaluate.lines import Line, NumberSet, identify, read_lines
from nanoflow_jax.evaluate.manifest import Manifest
from nanoflow_jax.evaluate.prompts import samples
from nanoflow_jax.evaluate.records import CHAT, COMPLETIONS, Record
from nanoflow_jax.evaluate.run_task import run_task
from nanoflow_jax.evaluate.tasks import load_task
from nanoflow_jax.evaluate.windows import longest_first
from nanoflow_jax.system import progress
from tests.evaluate.flags import Cli
from tests.evaluate.stand_in import StandIn

Json = dict[str, Any]


def run(cli: Cli, folder: Path, lines: list[Any], *options: str) -> tuple[list[Json], str]:
    """The records by line, and what the command printed."""
    data = b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    (folder / "in.jsonl").write_bytes(data)
    output = folder / "out.jsonl"
    status, printed, err = cli("batch", "-i", str(folder / "in.jsonl"), "-o", str(output), *options)
    assert status == 0, err
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]]
    return sorted(records, key=lambda r: int(r["id"].removeprefix("batch_req_"))), printed


def request(url: str, custom_id: str, **body: Any) -> Json:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def test_answers_are_those_of_the_library(cli: Cli, llm: LLM, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "What is 25+17?"}]
    lines = [
        {"prompt": "12+30="},
        {"prompt": [*b"47+85="], "max_tokens": 2, "custom_id": "ids"},
        request(CHAT, "chat", model="tiny", messages=messages, logprobs=True, top_logprobs=2),
        request(COMPLETIONS, "two", prompt="reverse abc", n=2, temperature=3.0, seed=7, max_tokens=9, logprobs=3),
        request(COMPLETIONS, "bias", prompt="12+30=", logit_bias={"57": 100}, max_tokens=3),
        request(COMPLETIONS, "stop", prompt="reverse abc=", stop=["b"]),
        request(CHAT, "limit", messages=messages, max_completion_tokens=4),
    ]
    records, printed = run(cli, tmp_path, lines)
    assert "7 lines: 7 answered, 0 with an error" in printed
    assert [r["custom_id"] for r in records] == [None, "ids", "chat", "two", "bias", "stop", "limit"]
    assert all(r["error"] is None and r["response"]["status_code"] == 200 for r in records)
    bodies = [r["response"]["body"] for r in records]
    first = {"index": 0, "text": "42", "logprobs": None, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert bodies[0] == {
        "id": "cmpl-1", "object": "text_completion", "created": 0, "model": "tiny", "choices": [first], "usage": usage,
    }  # fmt: skip
    assert bodies[1]["choices"][0]["finish_reason"] == "length"
    assert bodies[4]["choices"][0]["text"] == "999"
    assert (bodies[5]["choices"][0]["text"], bodies[5]["choices"][0]["finish_reason"]) == ("c", "stop")
    assert bodies[6]["choices"][0]["message"]["content"] == "25+1"

    chat = bodies[2]
    assert (chat["object"], chat["id"]) == ("chat.completion", "chatcmpl-3")
    direct = llm.chat(messages, SamplingParams(temperature=0, max_tokens=None, logprobs=2), use_tqdm=False)[0].outputs[
        0
    ]
    choice = chat["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": direct.text, "refusal": None}
    assert direct.logprobs is not None
    content = choice["logprobs"]["content"]
    assert [c["logprob"] for c in content] == [
        step[token].logprob for token, step in zip(direct.token_ids, direct.logprobs, strict=True)
    ]
    for entry, step in zip(content, direct.logprobs, strict=True):
        best = sorted(step.values(), key=lambda lp: lp.rank)[:2]
        assert [(t["token"], t["logprob"]) for t in entry["top_logprobs"]] == [
            (b.decoded_token, b.logprob) for b in best
        ]
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]

    params = SamplingParams(n=2, temperature=3.0, seed=7, max_tokens=9, logprobs=3)
    direct_two = llm.generate("reverse abc", params, use_tqdm=False)[0].outputs
    two = bodies[3]["choices"]
    assert [c["text"] for c in two] == [o.text for o in direct_two]
    assert two[0]["text"] != two[1]["text"]
    for choice, output in zip(two, direct_two, strict=True):
        logprobs = choice["logprobs"]
        assert output.logprobs is not None
        steps = list(zip(output.token_ids, output.logprobs, strict=True))
        assert logprobs["token_logprobs"] == [step[token].logprob for token, step in steps]
        assert all(len(top) == 3 for top in logprobs["top_logprobs"])
        assert any(step[token].rank > 3 for token, step in steps), "a sampled token outside the likeliest three"
        joined = "".join(logprobs["tokens"])
        assert [joined[at:].startswith(t) for at, t in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)]
    made = sum(len(o.token_ids) for o in direct_two)
    assert bodies[3]["usage"] == {"prompt_tokens": 12, "completion_tokens": made, "total_tokens": 12 + made}


def test_errors_that_only_the_model_can_tell(cli: Cli, tmp_path: Path) -> None:
    """Each names its field; the lines beside them run."""
    lines = [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [1, 2, 70_000]},
        {"prompt": "x" * 500},
        {"prompt": "12+30=", "temperature": 10**400},
        {"prompt": "12+30=", "temperature": "hot"},
        {"prompt": "12+30=", "top_p": 2},
        {"prompt": "12+30=", "n": 2, "temperature": 0},
        {"prompt": "12+30=", "logit_bias": {"70000": 1}},
        {"prompt": "12+30=", "logprobs": 10**20},
        {"prompt": "12+30=", "stop": ["", 3]},
        {"prompt": "12+30=", "seed": -1},
        {"prompt": "\ud800"},
        {"prompt": "12+30="},
    ]
    records, _ = run(cli, tmp_path, lines)
    expected = ["prompt"] * 3 + ["temperature"] * 2 + ["top_p", "n", "logit_bias", "logprobs", "stop", "seed", "prompt"]
    assert records[0]["error"] is None, "an empty text is one token: that which begins a text"
    assert [r["error"]["param"] for r in records[1:-1]] == expected
    assert all(r["error"]["line"] == i for i, r in enumerate(records[1:-1], start=2))
    assert records[-1]["response"]["body"]["choices"][0]["text"] == "42"


def test_structured_outputs(cli: Cli, tmp_path: Path) -> None:
    """In OpenAI's words, in vLLM's, for chats and completions; one that cannot be compiled is that line's error."""
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}}, "required": ["a"]}
    tight = {"json": {**schema, "additionalProperties": False}, "disable_any_whitespace": True}
    messages = [{"role": "user", "content": "What is 25+17?"}]

    def asked(kind: str, **more: Any) -> Json:
        return {"temperature": 1e6, "max_tokens": 60, "response_format": {"type": kind, **more}}

    lines = [
        request(COMPLETIONS, "schema", prompt="12+30=", temperature=1e6, max_tokens=60, structured_outputs=tight),
        request(CHAT, "bad", messages=messages, **asked("json_schema", json_schema={"schema": {"type": "objec"}})),
        request(
            CHAT, "chat", messages=messages, **asked("json_schema", json_schema={"name": "a", "schema": tight["json"]})
        ),
        request(CHAT, "object", messages=messages, **asked("json_object")),
        {"prompt": "12+30=", "structured_outputs": {"choice": ["maybe"]}},
        {"prompt": "12+30=", "structured_outputs": {"regex": "("}},
        {"prompt": "12+30="},
    ]
    records, printed = run(cli, tmp_path, lines)
    assert "7 lines: 5 answered, 2 with an error" in printed
    errors = {i: r["error"] for i, r in enumerate(records) if r["error"] is not None}
    assert {i: (e["code"], e["param"], e["line"]) for i, e in errors.items()} == {
        1: ("invalid_request", "structured_outputs", 2),
        5: ("invalid_request", "structured_outputs", 6),
    }
    assert "Invalid type: objec" in errors[1]["message"] and "unclosed group" in errors[5]["message"]
    choices = [r["response"]["body"]["choices"][0] for r in records if r["error"] is None]
    assert json.loads(choices[0]["text"]) in ({"a": "x"}, {"a": "yy"})
    chat, whole = choices[1]["message"]["content"], choices[1]["finish_reason"] == "stop"
    assert json.loads(chat) in ({"a": "x"}, {"a": "yy"}) if whole else chat.startswith("{")
    assert choices[2]["message"]["content"].startswith("{")
    assert [choice["text"] for choice in choices[3:]] == ["maybe", "42"]


def test_characters_that_other_readers_take_for_line_ends(cli: Cli, tmp_path: Path) -> None:
    """U+2028, U+0085 and a form feed in a text, unescaped: one line in, one line out, and the text as it was."""
    odd = "a\u2028b\u0085c\x0bd"
    lines = [json.dumps({"prompt": odd + str(i), "custom_id": odd + str(i)}, ensure_ascii=False) for i in range(2)]
    records, _ = run(cli, tmp_path, [line.encode() for line in lines])
    assert [r["custom_id"] for r in records] == [odd + "0", odd + "1"]
    assert all(r["error"] is None for r in records)


def test_a_fuzzed_file_is_accounted_for(cli: Cli, tmp_path: Path) -> None:
    """CRLF, a byte order mark, binary, a line of 5 MB, one id twice: one record per line, and the good ones run."""
    rng = random.Random(0)
    good = json.dumps({"prompt": "12+30="}).encode()
    lines = [b"\xef\xbb\xbf" + good, good + b"\r", b"", b"\0" * 50, b'{"prompt": "' + b"x" * 5 * 2**20 + b'"}', good]
    lines += [bytes(rng.randrange(256) for _ in range(30)).replace(b"\n", b"") for _ in range(20)]
    for _ in range(60):
        broken = bytearray(json.dumps(request(CHAT, "a", messages=[{"role": "user", "content": "Hi"}])).encode())
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(len(broken))] = rng.choice(b'"{}[]:,0a\\')
        lines.append(bytes(broken))
    lines += [json.dumps({"custom_id": "twice", "prompt": "25+25="}).encode()] * 3
    records, printed = run(cli, tmp_path, [*lines, good], "--ordered")
    assert [r["id"] for r in records] == [f"batch_req_{i}" for i in range(1, len(lines) + 2)]
    for i in (0, 1, 5, len(lines)):
        assert records[i]["response"]["body"]["choices"][0]["text"] == "42"
    for i in (2, 3, 4):
        assert records[i]["error"]["code"] == "invalid_request"
    assert "accepted: at most 4194304" in records[4]["error"]["message"]
    twice = records[-4:-1]
    assert [r["error"] is None for r in twice] == [True, False, False]
    assert "an earlier line has the same" in twice[1]["error"]["message"]
    failed = sum(r["error"] is not None for r in records)
    assert f"{len(records)} lines: {len(records) - failed} answered, {failed} with an error" in printed
    written = [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert written == [r["id"] for r in records], "--ordered"


def test_the_models_own_limit_is_that_of_chats(
    cli: Cli, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """max_new_tokens of generation_config.json, where the request leaves it open; a completion has its 16."""
    monkeypatch.setitem(llm._defaults, "max_tokens", 3)
    messages = [{"role": "user", "content": "What is 25+17?"}]
    plain = {"ignore_eos": True}
    lines = [
        request(CHAT, "open", messages=messages, **plain),
        request(CHAT, "own", messages=messages, max_tokens=5, **plain),
        request(COMPLETIONS, "completion", prompt="12+30=", **plain),
    ]
    records, _ = run(cli, tmp_path, lines)
    assert [r["response"]["body"]["usage"]["completion_tokens"] for r in records] == [3, 5, 16]


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file(cli: Cli, tmp_path: Path, data: bytes) -> None:
    records, printed = run(cli, tmp_path, [data], "--ordered")
    assert records == []
    assert "0 lines: 0 answered" in printed


def test_wrong_usage(cli: Cli, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "12+30="}\n')
    for arguments, words in (
        (["-i", str(tmp_path / "none"), "-o", str(output)], "is not a file"),
        (["-i", str(source), "-o", str(source)], "is the input"),
        (["-i", str(source), "-o", str(tmp_path / "no" / "x")], "folder does not exist"),
        (["-i", str(source), "-o", str(output), "--temperature", "-1"], "temperature"),
        (["-i", str(source), "-o", str(output), "--seed", "-1"], "--seed"),
        (["-i", str(source), "-o", str(output), "--model", "./no/such"], "no/such"),
    ):
        status, out, err = cli("batch", *arguments)
        assert (status, out) == (1, ""), arguments
        assert words in err and err.count("\n") == 1
    assert cli("batch", "-i", str(source))[0] == 2
    assert not output.exists()


def test_a_changed_run_is_refused(cli: Cli, tmp_path: Path) -> None:
    """Another input, another setting; told to go on, only what has no record is run."""
    lines: list[Any] = [{"prompt": "12+30="}]
    run(cli, tmp_path, lines)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    before = output.read_bytes()
    for options in (["--max-tokens", "3"], ["--seed", "5"], ["--plan", "two_all_reduce"]):
        status, _, err = cli("batch", "-i", str(source), "-o", str(output), *options)
        assert (status, output.read_bytes()) == (1, before)
        assert "holds results of another run" in err
        assert options[0].removeprefix("--").split("-")[0] in err
    records, printed = run(cli, tmp_path, [*lines, {"prompt": "25+25="}], "--allow-changed")
    assert "1 were there before" in printed
    assert [r["response"]["body"]["choices"][0]["text"] for r in records] == ["42", "50"]
    assert output.read_bytes().startswith(before)


def test_input_that_changes_while_it_is_read(
    cli: Cli, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many lines, other bytes: none of them is answered under the old digest; one line says so, the records stay,
    and with the file as it was the run goes on."""
    lines = [b"{broken", *({"prompt": f"{i}+30=", "max_tokens": 3} for i in range(10, 30))]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    monkeypatch.setattr("nanoflow_jax.evaluate.lines._CHUNK", 128)
    run(cli, tmp_path, lines, "--json")
    whole = output.read_bytes().splitlines()
    output.unlink()
    make, before = api.LLM, source.read_bytes()

    def change(*arguments: Any, **options: Any) -> LLM:  # the file has been identified by now
        source.write_bytes(before.replace(b'"29+30="', b'"92+30="'))
        return make(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(api, "LLM", change)
        status, printed, err = cli("batch", "-i", str(source), "-o", str(output))
    assert (status, printed, err.count("\n")) == (1, "", 1)
    assert f"{source} was changed during the run, after byte" in err
    kept = output.read_bytes().splitlines()
    assert set() < set(kept) < set(whole)
    assert cli("batch", "-i", str(source), "-o", str(output))[0] == 1, "another input than the manifest's"
    source.write_bytes(before)
    assert cli("batch", "-i", str(source), "-o", str(output))[0] == 0
    assert sorted(output.read_bytes().splitlines()) == sorted(whole)


def test_the_file_is_locked_while_it_is_ordered(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the records of a run that begins then would be lost with the file that takes its place."""
    order, tried = batch.write_in_order, []

    def ordered(path: Path) -> None:
        with pytest.raises(ConfigError, match="is being written by another process"):
            journal._locked(path)
        order(path)
        tried.append(path)

    monkeypatch.setattr(batch, "write_in_order", ordered)
    run(cli, tmp_path, [{"prompt": "12+30="}], "--ordered")
    assert tried == [tmp_path / "out.jsonl"]


# -- the stream into the engine


def test_a_stream_keeps_the_engine_full(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are those of `generate`; what waits is bounded; until the input ends, a slot is not empty for longer than
    its next request's admission takes; pairs give what `score` gives."""
    rng, params = random.Random(1), []
    prompts = [f"{rng.randrange(10, 99)}+{rng.randrange(10, 99)}=" for _ in range(60)]
    params = [SamplingParams(temperature=0, max_tokens=rng.randrange(4, 20), ignore_eos=True) for _ in prompts]
    direct = llm.generate(prompts, params, use_tqdm=False)
    pairs = [("12+30=", "42"), ("12+30=", "43")]
    scores = llm.score(pairs, use_tqdm=False)
    running, waiting, step, more = [], [], Engine.step, True

    def counted(self: Engine) -> Any:
        if more:
            running.append(self.running.num_running)
        waiting.append(len(self.scheduler.waiting))
        return step(self)

    monkeypatch.setattr(Engine, "step", counted)

    def work():
        nonlocal more
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            yield None
            yield llm.prepare(prompt, p, i)
        for i, pair in enumerate(pairs):
            yield llm.prepare_score(*pair, key=-1 - i)
        more = False

    found: dict[int, Any] = {}
    for item, output in llm.run_stream(work()):
        assert isinstance(item, Work)
        assert item.key not in found
        found[item.key] = output
    assert [found[i].outputs[0].token_ids for i in range(60)] == [o.outputs[0].token_ids for o in direct]
    assert [(found[-1 - i].logprob, found[-1 - i].is_greedy) for i in range(2)] == scores
    ahead = 2 * max(s.prefill_segments for s in llm.engine.scheduler.shapes)
    assert max(waiting) <= ahead
    full = np.array(running[4:])
    assert full.mean() > 7.0, full  # of 8 slots
    assert not llm.engine.has_work


def test_progress_counts_tokens_as_they_come(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a request that takes long, too: the first line comes before the first record does."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "12+30=", "max_tokens": 100, "ignore_eos": True}) + "\n")
    with journal.Journal.open(tmp_path / "out.jsonl", Manifest("batch", {})) as results:
        report = batch.run_batch(llm, source, identify(source), results, Settings("tiny"))
    lines = re.findall(r"answering: (\d)/1 requests (\d+) tokens/s", capsys.readouterr().err)
    assert report.completion_tokens == 100
    assert len([speed for done, speed in lines if done == "0" and int(speed) > 0]) > 50

    task = replace(load_task("addition"), generate={"max_tokens": 100, "ignore_eos": True})
    with journal.Journal.open(tmp_path / "samples.jsonl", Manifest("eval", {})) as results:
        run_task(llm, task, samples(task, 1), results)
    lines = re.findall(r"addition: (\d)/1 questions (\d+) tokens/s", capsys.readouterr().err)
    assert len([speed for done, speed in lines if done == "0" and int(speed) > 0]) > 50
    assert lines[-1][0] == "1"


def test_a_count_that_is_complete_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Progress(2, "answering", "requests") as bar:
        bar.advance(2, "7 tokens/s")
        bar.advance(0, "8 tokens/s")
    assert capsys.readouterr().err == "answering: 2/2 requests 7 tokens/s\n"


def test_a_closed_stream_leaves_nothing_running(llm: LLM) -> None:
    def endless():
        i = 0
        while True:
            yield llm.prepare("12+30=", SamplingParams(temperature=1.0, n=2, max_tokens=3 + i % 5), i)
            i += 1

    stream = llm.run_stream(endless())
    outputs = [next(stream)[1] for _ in range(5)]
    assert all(isinstance(o, RequestOutput) and len(o.outputs) == 2 for o in outputs)
    stream.close()
    assert not llm.engine.has_work
    assert llm.generate("12+30=", SamplingParams(temperature=0), use_tqdm=False)[0].outputs[0].text == "42"


def test_a_failing_request_is_an_error_record(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what a chat template or tokenizer raises: the others run."""
    records: list[Json] = []
    lines = [
        json.dumps({"custom_id": str(i), "prompt": f"1{i}+30=", "stop": "x", "max_tokens": 4}).encode()
        for i in range(4)
    ]
    encode, judge = llm.tokenizer.encode, Booking._finish_or_go_on

    def breaks(text: str, add_special_tokens: bool) -> list[int]:
        if text.startswith("11"):
            raise TypeError("no such text")
        return encode(text, add_special_tokens)

    def fails(self: Booking, request: Any, *rest: Any) -> None:
        if request.prompt.startswith("12"):
            raise RuntimeError("broken")
        judge(self, request, *rest)

    monkeypatch.setattr(llm.tokenizer, "encode", breaks)
    monkeypatch.setattr(Booking, "_finish_or_go_on", fails)
    items = parse_lines([Line(i + 1, line) for i, line in enumerate(lines)], ())
    answer(llm, items, Settings("tiny"), records.append)
    by_id = {r["custom_id"]: r for r in records}
    assert {i: by_id[i]["error"] and by_id[i]["error"]["message"] for i in by_id} == {
        "0": None, "1": "TypeError: no such text", "2": "RuntimeError: broken", "3": None,
    }  # fmt: skip
    assert by_id["1"]["error"]["code"] == by_id["2"]["error"]["code"] == "server_error"


def test_seeds_do_not_depend_on_what_ran_before() -> None:
    """A line's own seed comes from the run's and its number."""
    seeds: list[dict[int, str]] = []
    for lines, seed in ((range(1, 40), 0), (range(20, 40), 0), (range(1, 40), 1)):
        found: dict[int, str] = {}
        llm: Any = StandIn()
        items = parse_lines([Line(i, b'{"prompt": "x", "temperature": 1}') for i in lines], ())

        def emit(record: Json, found: dict[int, str] = found) -> None:
            found[int(record["id"].rpartition("_")[2])] = record["response"]["body"]["choices"][0]["text"]

        answer(llm, items, Settings("tiny", seed=seed), emit)
        seeds.append(found)
    assert len(set(seeds[0].values())) == 39
    assert {i: seeds[0][i] for i in range(20, 40)} == seeds[1]
    assert not set(seeds[0].values()) & set(seeds[2].values())


# -- size


def test_memory_per_line_is_bounded(tmp_path: Path) -> None:
    """More lines take less than 20 bytes more for each: a digest of the id, and a bit. (An id by itself takes 60.)"""
    peaks, counts = [], (4096, 16384)
    for count in counts:
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(f'{{"custom_id": "request-{i}", "prompt": "x"}}\n' for i in range(count)))
        tracemalloc.start()
        records = longest_first(parse_lines(read_lines(path), (), NumberSet()), lambda r: r.line % 100, window=256)
        assert sum(isinstance(r, Record) for r in records) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (counts[1] - counts[0]) < 20, peaks


def test_order_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    numbers = list(range(500))
    random.Random(2).shuffle(numbers)
    lines = {n: f'{{"id": "batch_req_{n}", "error": null, "x": "{"y" * (n % 9)}"}}\n' for n in numbers}
    path.write_text("".join(lines[n] for n in numbers))
    write_in_order(path)
    assert path.read_text() == "".join(lines[n] for n in range(500))
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
