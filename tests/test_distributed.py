"""Two real processes of four CPU devices each: they give what one process of eight gives, and end when one is gone."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from nanoflow_jax import LLM
from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.multiprocess import options_for, options_from
from nanoflow_jax.options import LLMOptions
from nanoflow_jax.parallel import last_words
from nanoflow_jax.parallel.processes import _check_host, join
from nanoflow_jax.plan.file import load_plan
from tests.replica_process import NUM_REQUESTS, OPTIONS, answers, run_batch, write_batch

Start = Callable[[str], "Replica"]
ROOT = Path(__file__).parents[1]
PEER_TIMEOUT = 8  # seconds; threads of a busy machine may be late by some


class Replica:
    """Both processes, with what they print in files."""

    def __init__(self, folder: Path, what: str):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }  # fmt: skip
        self.members: list[subprocess.Popen[bytes]] = []
        for rank in range(2):
            command = [
                sys.executable, str(ROOT / "tests" / "replica_process.py"), str(port), str(rank), str(PEER_TIMEOUT),
                str(folder), what,
            ]  # fmt: skip
            with open(folder / f"out{rank}", "wb") as out, open(folder / f"err{rank}", "wb") as err:
                self.members.append(subprocess.Popen(command, stdout=out, stderr=err, env=environment))

    def until_ready(self, seconds: float = 200) -> None:
        end = time.monotonic() + seconds
        while not (self.folder / "ready").exists():
            assert all(m.poll() is None for m in self.members), self.told(0) + self.told(1)
            assert time.monotonic() < end, "not ready in time"
            time.sleep(0.1)

    def wait(self, rank: int, seconds: float) -> int:
        return self.members[rank].wait(seconds)

    def told(self, rank: int) -> str:
        """What it printed to standard error, without the libraries' notes."""
        lines = (self.folder / f"err{rank}").read_text(errors="replace").splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("[Gloo]"))

    def end(self) -> None:
        for member in self.members:
            if member.poll() is None:
                member.kill()
            member.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made: list[Replica] = []

    def start_one(what: str) -> Replica:
        made.append(Replica(tmp_path, what))
        return made[-1]

    yield start_one
    for replica in made:
        replica.end()


def test_two_processes_give_what_one_gives_and_a_batch_goes_on_after_a_kill(start: Start, tmp_path: Path) -> None:
    source, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    write_batch(source)
    replica = start("batch")
    llm = LLM("tiny", **OPTIONS)
    alone = json.loads(json.dumps(answers(llm)))
    run_batch(llm, source, tmp_path / "alone.jsonl")
    replica.until_ready()
    together = json.loads((tmp_path / "answers.json").read_text())
    assert together == alone  # tokens, and every bit of the logprobs
    assert len({tuple(t) for t in alone["tokens"]}) > 10

    while not results.exists() or results.read_bytes().count(b"\n") < 5:
        assert all(m.poll() is None for m in replica.members), replica.told(0) + replica.told(1)
        time.sleep(0.05)
    began = time.monotonic()
    replica.members[1].kill()
    assert replica.wait(0, 5 * PEER_TIMEOUT) == 1
    assert time.monotonic() - began < 2 * PEER_TIMEOUT + 5
    line = f"nanoflow: process 1 of 2 has given no sign of life for {PEER_TIMEOUT} s: it is gone"
    assert replica.told(0).startswith(line) and replica.told(0).count("\n") == 1
    assert (tmp_path / "out0").read_text() == ""  # Gloo's own words are not among the results

    assert 5 <= results.read_bytes().count(b"\n") < NUM_REQUESTS
    run_batch(llm, source, results)
    assert sorted(results.read_bytes().splitlines()) == sorted((tmp_path / "alone.jsonl").read_bytes().splitlines())


def listening(pid: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The addresses at which a process listens for TCP connections."""
    sockets = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(fd))
    found = []
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                words = bytes.fromhex(fields[1].partition(":")[0])  # each of four bytes, the last one first
                found.append(ipaddress.ip_address(b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))))
    return found


def test_an_interruption_of_process_0_ends_both_with_a_line(start: Start) -> None:
    """And before: with a coordinator at 127.0.0.1 no port is open to other machines."""
    replica = start("wait")
    replica.until_ready(60)
    addresses = listening(replica.members[0].pid)
    assert addresses, "the coordination service listens"
    mapped = [getattr(address, "ipv4_mapped", None) or address for address in addresses]
    assert all(address.is_loopback for address in mapped), addresses
    replica.members[1].send_signal(signal.SIGINT)  # a terminal sends it to all
    replica.members[0].send_signal(signal.SIGINT)
    assert replica.wait(0, 30) == 1 and replica.wait(1, 30) == 1
    assert replica.told(0) == "process 0: KeyboardInterrupt: \n"
    assert "nanoflow: process 0 of 2 has ended: interrupted;" in replica.told(1)


@pytest.mark.parametrize(
    ("coordinator", "words"),
    [
        ("203.0.113.77:4000", ["process 0 cannot listen at '203.0.113.77'", "JAX_COORDINATOR_BIND_ADDRESS"]),
        ("no-such-host.invalid:4000", ["process 0 cannot listen at 'no-such-host.invalid'"]),
        (":4000", ["':4000' is not accepted", "HOST:PORT"]),
    ],
)
def test_a_coordinator_that_is_not_here(monkeypatch: pytest.MonkeyPatch, coordinator: str, words: list[str]) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("it was tried"))
    with pytest.raises(ConfigError) as error:
        join(coordinator, 2, 0)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_name_that_other_machines_do_not_find_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some systems give a host's own name an address of its loopback interface."""
    own = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [own])
    _check_host("node-17")
    assert "node-17 is 127.0.0.1 on this machine" in caplog.text
    caplog.clear()
    _check_host("localhost")
    _check_host("127.0.0.1")
    assert not caplog.text


def test_what_cannot_be_is_told_in_both(start: Start) -> None:
    replica = start("refused")
    assert replica.wait(0, 60) == 1 and replica.wait(1, 60) == 1
    line = "kv_offload_gib: pages split over several processes cannot be offloaded yet; accepted: 0"
    assert line in replica.told(0) and line in replica.told(1)
    assert "Traceback" not in replica.told(0) + replica.told(1)


def test_without_process_0_the_other_one_ends_with_a_line(start: Start) -> None:
    replica = start("wait")
    replica.until_ready(60)
    replica.members[0].kill()
    assert replica.wait(1, 2 * PEER_TIMEOUT + 5) != 0
    end = time.monotonic() + 10
    while not (told := replica.told(1)) and time.monotonic() < end:
        time.sleep(0.1)
    assert told.encode() == last_words.GONE


def test_the_last_words_pass_what_is_not_the_end_of_process_0() -> None:
    trace = [
        b"E1125 15:18:05.066842   11080 coordination_service_agent.cc:288] Polled an error from coordination service\n",
        b"F1125 15:18:05.066842   11080 client.h:86] Terminating process because the JAX distributed service detected "
        b"fatal errors. This most likely indicates that another task died\n",
        b"    @     0x7f437353d7d4  absl::lts_20260526::log_internal::LogMessage::SendToLog()\n",
    ]
    said = [b"loading\n", b"Traceback (most recent call last):\n"]
    assert list(last_words.filtered([*said, *trace])) == [*said, last_words.GONE]
    harmless = [trace[0], b"and more of it\n"]
    assert list(last_words.filtered([*harmless, b"nanoflow: ours\n"])) == [b"nanoflow: ours\n", *harmless]


@pytest.mark.parametrize("plan", ["auto", "nanoflow_70b", "nanoflow_70b_streams", "two_all_reduce"])
def test_options_survive_the_way(plan: str) -> None:
    options = LLMOptions(Path("a/folder"), plan=plan if plan == "auto" else load_plan(plan), seed=3, page_size=32)
    back = LLMOptions(**options_from(json.loads(json.dumps(options_for(options)))))
    assert back == replace(options, model="a/folder")
