"""A batch on Ray: two replicas on this machine, one of them killed; the file is that of a plain run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoflow_jax import LLM
from nanoflow_jax.cli import main
from nanoflow_jax.evaluate.batch import Settings, run_batch
from nanoflow_jax.evaluate.journal import Journal, manifest_path
from nanoflow_jax.evaluate.lines import identify
from nanoflow_jax.evaluate.manifest import Manifest, model_fingerprint, plan_identity
from nanoflow_jax.evaluate.ray_data import BLOCK_BYTES, Block, Replica, blocks
from nanoflow_jax.plan.plan import load_plan
from tests.evaluate.flags import FLAGS, OPTIONS

ROOT = Path(__file__).parents[2]
LINES = 45
LLM_OPTIONS: dict[str, Any] = {"model": "tiny", **OPTIONS}
SETTINGS = Settings("tiny")


def write_input(path: Path) -> None:
    """Requests of all lengths, some broken, one id twice, a byte order mark, Windows' line ends."""
    rng = random.Random(3)
    lines = []
    for i in range(LINES):
        wanted: dict[str, Any] = {"custom_id": f"r{i if i != 40 else 7}", "prompt": f"{rng.randrange(99)}+{i}="}
        wanted |= {"max_tokens": rng.randrange(2, 40), "ignore_eos": True, "temperature": rng.choice([0, 1.5])}
        lines.append(json.dumps(wanted) if i % 17 else "{broken")
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())


def journal(path: Path) -> Journal:
    return Journal.open(path, Manifest("batch", {}))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("input") / "requests.jsonl"
    write_input(path)
    return path


@pytest.fixture(scope="session")
def plain(llm: LLM, source: Path) -> list[bytes]:
    """The lines of a plain run, sorted."""
    out = source.with_name("plain.jsonl")
    with journal(out) as results:
        run_batch(llm, source, identify(source), results, SETTINGS, progress=False)
    return sorted(out.read_bytes().splitlines())


def replica(llm: LLM, source: Path) -> Replica:
    """An actor's object, here, with an LLM that is there already."""
    found = Replica.__new__(Replica)
    found._plan, found._device = "a plan", "a device"
    found._source, found._found, found._settings, found._llm = source, identify(source), SETTINGS, llm
    return found


def encoded(block: Block) -> dict[str, list[str]]:
    return {"block": [json.dumps(block.__dict__)]}


def test_blocks_answered_one_by_one_make_the_plain_file(
    llm: LLM, source: Path, plain: list[bytes], tmp_path: Path
) -> None:
    actor, size = replica(llm, source), 4
    with journal(tmp_path / "first.jsonl") as results:  # stopped in the middle
        found = list(blocks(source, identify(source), results, SETTINGS, size))
        for block in found[: len(found) // 2]:
            for record in actor(encoded(block))["record"]:
                results.write(record)
    with journal(tmp_path / "first.jsonl") as results:
        for block in blocks(
            source, identify(source), results, SETTINGS, size + 3
        ):  # other blocks, of the lines that are left
            for record in actor(encoded(block))["record"]:
                results.write(record)
        assert not list(blocks(source, identify(source), results, SETTINGS, size))
    assert sorted((tmp_path / "first.jsonl").read_bytes().splitlines()) == plain


def test_a_block_ends_before_it_has_too_many_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoflow_jax.evaluate.ray_data.BLOCK_BYTES", 500)
    with journal(tmp_path / "out.jsonl") as results:
        counts = [block.count for block in blocks(source, identify(source), results, SETTINGS, 1000)]
    assert max(counts) < 10 and BLOCK_BYTES > 2**20


def test_options_that_cannot_be_are_one_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["batch", "-i", str(source), "-o", str(tmp_path / "out.jsonl"), "--ray"]
    assert main([*command, "--ray-block", "0"]) == 1
    assert main([*command, "--coordinator", "host:1", "--num-processes", "2"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "nanoflow batch: --ray-block: 0 is not accepted; it must be at least 1"
    assert "go together" in told[1] and len(told) == 2


class Told:
    """In the place of Ray: blocks' results as replicas on these devices give them."""

    def __init__(self, *reports: tuple[str, str]):
        self.reports = list(reports)

    def __call__(self, todo: list[dict[str, str]], *_: Any) -> Iterator[dict[str, Any]]:
        for item in todo:
            block = Block(**json.loads(item["block"]))
            plan, device = self.reports.pop(0)
            count = block.count
            numbers = range(block.first, block.first + count)
            records = [json.dumps({"id": f"batch_req_{n}", "error": None}).encode() + b"\n" for n in numbers]
            yield {
                "record": records, "plan": [plan] * count, "device": [device] * count,
                "prompt_tokens": np.ones(count, int), "completion_tokens": np.ones(count, int),
            }  # fmt: skip


def test_the_manifest_names_the_plan_that_the_replicas_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of a run that is continued; another plan is refused before a record of it is written, and told."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'{{"prompt": "{i}+1="}}\n' for i in range(4)))
    command = ["batch", "-i", str(source), "-o", str(out), "--ray", "--ray-block=1", "--ray-devices=1", "--quiet"]

    def run(*reports: tuple[str, str], options: tuple[str, ...] = ()) -> tuple[int, str, int]:
        monkeypatch.setattr("nanoflow_jax.evaluate.ray_data._answered", Told(*reports))
        status = main([*command, *options])
        return status, capsys.readouterr().err, out.read_bytes().count(b"\n")

    def plan() -> str:
        return json.loads(manifest_path(out).read_text())["identity"]["plan"]

    status, err, lines = run(("one 11", "H100"), ("two 22", "A100"))
    assert (status, lines, plan()) == (1, 1, "one 11")
    assert "replicas would mix plans: one 11 on H100, two 22 on A100" in err and err.count("\n") == 1
    status, err, lines = run(("two 22", "A100"))
    assert (status, lines, plan()) == (1, 1, "one 11")
    assert "plan was one 11 and is two 22 on A100" in err and err.count("\n") == 1
    status, err, lines = run(("one 11", "H100"), ("one 11", "H100"), ("two 22", "A100"))
    assert (status, lines, plan()) == (1, 3, "one 11")
    status, err, lines = run(("two 22", "A100"), options=("--allow-changed",))
    assert (status, lines, plan()) == (0, 4, "two 22"), err


# -- the real Ray, in a process of its own


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets lie in it, whose paths may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def workers(folder: Path) -> list[int]:
    """Processes of the actors of the Ray whose files are in `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            ours = entry.name.isdecimal() and b"ray::MapWorker" in (entry / "cmdline").read_bytes()
            if ours and f"RAY_TMPDIR={folder}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def test_one_of_two_replicas_killed(source: Path, plain: list[bytes], tmp_path: Path, short_folder: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (the ray extra)")
    out = tmp_path / "out.jsonl"
    command = [
        sys.executable, "-m", "nanoflow_jax", "batch", "-i", str(source), "-o", str(out), *FLAGS, "--cpu-devices", "1",
        "--ray", "--ray-replicas=2", "--ray-block=6",
    ]  # fmt: skip
    environment = {**os.environ, "RAY_TMPDIR": str(short_folder), "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        end = time.monotonic() + 150
        errors = sum(b'"error": {' in line for line in plain)
        while not out.exists() or out.read_bytes().count(b"\n") <= errors:  # until the first block has come
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < end, "no result in time"
            time.sleep(0.05)
        killed = workers(short_folder)[0]
        os.kill(killed, signal.SIGKILL)
        printed, told = run.communicate(timeout=200)
    finally:
        if run.poll() is None:
            run.send_signal(signal.SIGINT)  # Ray's processes end with it
            run.wait(30)
    assert run.returncode == 0, told
    assert sorted(out.read_bytes().splitlines()) == plain
    assert f"{LINES} lines: " in printed
    plan = json.loads(manifest_path(out).read_text())["identity"]["plan"]
    assert plan == plan_identity(load_plan("two_gather_one_reduce"))


def test_the_fingerprint_is_checked_where_the_replica_is(
    source: Path, monkeypatch: pytest.MonkeyPatch, llm: LLM
) -> None:
    monkeypatch.setattr("nanoflow_jax.api.LLM", lambda **_: llm)
    Replica(str(source), identify(source), LLM_OPTIONS, SETTINGS, model_fingerprint(llm.folder))
    with pytest.raises(ValueError, match="--model: tiny is another model on node"):
        Replica(str(source), identify(source), LLM_OPTIONS, SETTINGS, "0" * 64)
    with pytest.raises(ValueError, match="is not on every node"):
        Replica(str(source) + "x", identify(source), LLM_OPTIONS, SETTINGS, "")
