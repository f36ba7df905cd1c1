"""Two replicas behind one port, started once by the real Ray: what they answer is what one engine answers, and one that
is killed costs its own requests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the serve extra is not installed")
pytest.importorskip("ray", reason="Ray is not installed (the ray extra)")

from nanoflow_jax import LLM
from tests.serve.test_endpoints import BODIES, joined, record
from tests.serve.test_process import KEY, LIMIT, Running

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed (the dev extra)")

LONG: dict[str, Any] = {
    "model": "tiny", "prompt": "12", "max_tokens": 120, "n": 4, "temperature": 1.0, "extra_body": {"ignore_eos": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    folder = tempfile.mkdtemp(prefix="ray")  # Ray's sockets lie in it, whose paths may have 107 characters
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        server = Running("--data-parallel-size", "2")
    yield server
    server.process.kill()
    server.process.communicate()
    shutil.rmtree(folder, ignore_errors=True)


def ask(server: Running, path: str, body: dict[str, Any] | None = None) -> str:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    wanted = urllib.request.Request(server.url.removesuffix("/v1") + path, data, headers)
    with urllib.request.urlopen(wanted, timeout=LIMIT) as reply:
        return reply.read().decode()


def counts(server: Running) -> dict[str, float]:
    lines = re.findall(r"^nanoflow_(\w+) (\S+)$", ask(server, "/metrics"), re.MULTILINE)
    return {name: float(value) for name, value in lines}


def wait(server: Running, **wanted: float) -> None:
    """Until the counts are so."""
    end = time.monotonic() + LIMIT
    while not wanted.items() <= (found := counts(server)).items():
        assert time.monotonic() < end, found
        time.sleep(0.05)


def replica_processes(server: Running) -> set[int]:
    parents, named = dict[int, int](), set[int]()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if (entry / "cmdline").read_bytes().startswith(b"ray::Replica"):
                    named.add(int(entry.name))

    def is_ours(process: int) -> bool:
        return process == server.process.pid or (process in parents and is_ours(parents[process]))

    return {process for process in named if is_ours(process)}


def test_answers_are_those_of_one_engine_whole_and_streamed(server: Running, llm: LLM) -> None:
    """Every kind of body, all at once."""
    asked = [(url, {**body, "stream": stream}) for url, body in BODIES for stream in (False, True)]
    with ThreadPoolExecutor(len(asked)) as threads:
        found = list(threads.map(lambda one: ask(server, *one), asked))
    for i, (url, body) in enumerate(BODIES):
        wanted, whole = record(llm, url, body), json.loads(found[2 * i])
        assert (whole["choices"], whole["usage"]) == (wanted["choices"], wanted["usage"])
        *lines, done, last = found[2 * i + 1].split("\n\n")
        assert (done, last) == ("data: [DONE]", "")
        parts = joined([json.loads(line.removeprefix("data: ")) for line in lines])
        for choice in wanted["choices"]:
            part, texts = parts[choice["index"]], choice.get("message") or {"text": choice["text"]}
            assert part["texts"] == {name: text for name, text in texts.items() if text is not None}
            assert part["finish_reason"] == choice["finish_reason"]
            logprobs = choice["logprobs"] and {k: v for k, v in choice["logprobs"].items() if v is not None}
            assert part["logprobs"] == logprobs
    assert json.loads(ask(server, "/health")) == {"status": "ok", "replicas": 2, "replicas_ready": 2}
    total = counts(server)
    assert total["slots"] == 16 and total["steps_total"] > 0
    assert total["completions_running"] == total["completions_waiting"] == total["kv_pages_in_use"] == 0


def test_streams_come_as_they_grow_from_both(server: Running) -> None:
    with server.client() as client:
        streams = [client.completions.create(**LONG, stream=True) for _ in range(12)]  # some of them wait
        assert next(streams[0]).choices[0].finish_reason is None
        wait(server, completions_running=16.0)  # eight slots each
        for stream in streams:
            assert sum(bool(chunk.choices[0].finish_reason) for chunk in stream) == 4


def test_a_client_that_leaves_frees_its_slots_in_the_replica(server: Running) -> None:
    with server.client() as client:
        before = counts(server)["generated_tokens_total"]
        for stream in [client.completions.create(**LONG, stream=True) for _ in range(12)]:  # some of them wait
            stream.close()
        wait(server, completions_running=0.0, completions_waiting=0.0, kv_pages_in_use=0.0)
        assert counts(server)["generated_tokens_total"] - before < 12 * 4 * 120 / 2, "they were finished"


def test_a_replica_that_is_killed_costs_the_streams_it_had_begun(server: Running) -> None:
    """They get an error; what had sent nothing is answered by the other one; and it is started again."""
    before = replica_processes(server)
    assert len(before) == 2
    with server.client() as client, ThreadPoolExecutor(8) as threads:
        streams = [client.completions.create(**LONG, stream=True, seed=i) for i in range(4)]
        for stream in streams:
            next(stream)
        whole = [threads.submit(lambda: client.completions.create(**LONG, seed=9)) for _ in range(4)]
        wait(server, completions_waiting=16.0)
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        ends = []
        for stream in streams:
            try:
                ends.append(sum(bool(chunk.choices[0].finish_reason) for chunk in stream))
            except openai.APIError as error:
                assert re.fullmatch(r"replica [12] of 2 has died while it answered; try again", error.message), error
                ends.append(0)
        assert sorted(ends) == [0, 0, 4, 4]
        assert len({tuple(c.text for c in one.result().choices) for one in whole}) == 1
    assert server.process.stderr is not None
    told = server.process.stderr.readline()
    assert re.search(rf"replica [12] of 2 \(process {killed}\) has died; it is started again", told), told
    end = time.monotonic() + LIMIT
    while len(replica_processes(server)) < 2 or json.loads(ask(server, "/health"))["replicas_ready"] < 2:
        assert time.monotonic() < end
        time.sleep(0.2)
    wait(server, slots=16.0, completions_running=0.0)


def test_a_signal_drains_both(server: Running) -> None:
    """The last test of this server."""
    with server.client() as client:
        streams = [client.completions.create(**LONG, stream=True) for _ in range(4)]
        for stream in streams:
            next(stream)
        processes = replica_processes(server)
        server.process.send_signal(signal.SIGTERM)
        assert [sum(bool(c.choices[0].finish_reason) for c in stream) for stream in streams] == [4] * 4
    assert server.process.wait(LIMIT) == 0
    end = time.monotonic() + LIMIT
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < end, "a replica is left"
        time.sleep(0.05)
