"""The comparison with transformers: its window, its protocol with a stand-in, refusals, and the peer itself where there
is one."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanoflow_jax.bench import transformers_peer
from nanoflow_jax.bench.report import ThroughputOptions
from nanoflow_jax.bench.transformers_worker import Record, measured, record
from nanoflow_jax.cli import main
from nanoflow_jax.config import ConfigError
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.weights.hub import EMBEDDED
from nanoflow_jax.workload import load_workload

PEER = "NANOFLOW_TRANSFORMERS_PYTHON"  # a Python with torch and transformers, for the test of the real one
FIELDS = {"num_hidden_layers": 3}
OPTIONS = ThroughputOptions(
    model="tiny",
    config=replace(read_config(EMBEDDED["tiny"] / "config.json"), num_layers=1),
    model_layers=3,
    workload=load_workload("constant:8:4"),
    tokens_per_step=32,
    decode_slots=16,
    progress=False,
)


def steady_records(slots: int = 4, count: int = 40, output: int = 5) -> list[Record]:
    """`slots` at once, each request 1 second per token, the next one admitted when it ends."""
    records = []
    for i in range(count):
        at = float(i // slots * output) + (i % slots) * 0.1
        records.append(Record(at, at + output, 7, [at + 1.0 + j for j in range(output)]))
    return records


def test_the_window_ends_when_nobody_waits_and_counts_rows():
    found = measured(steady_records(), 0.0, None)
    assert found["measure"] == "steady window"
    assert found["running_median"] == 4
    # Each of 4 slots: 7 + 5 - 1 rows in 5 seconds.
    assert found["tokens"] / found["seconds"] == pytest.approx(4 * 11 / 5, rel=0.1)
    assert found["seconds"] < 50  # not the end, where slots are empty


def test_a_run_without_a_steady_state_is_measured_whole_and_says_so():
    found = measured(steady_records(count=6), 0.0, None)
    assert found["measure"] == "whole run"
    assert found["tokens"] == 6 * 11
    assert found["seconds"] == 10.1


def test_a_run_that_was_stopped_ends_there():
    waiting = [Record(30.0, 30.0, 7, [])]
    found = measured([r for r in steady_records() if r.admitted < 30] + waiting, 0.0, 30.0)
    assert found["measure"] == "steady window"
    assert found["tokens"] / found["seconds"] == pytest.approx(4 * 11 / 5, rel=0.1)
    assert measured(waiting, 0.0, 30.0)["tokens"] == 0


def test_tokens_from_before_an_eviction_count_when_the_request_comes_back():
    class Result:
        lifespan = (5.0, 9.0)
        timestamps = (8.0, 9.0)
        generated_tokens = (1, 2, 3)
        prompt_ids = (1, 2)

    assert record(Result()) == Record(5.0, 9.0, 2, [5.0, 8.0, 9.0])


# -- the protocol

STAND_IN = """
import json, sys
job = json.load(sys.stdin)
print("a library talks", file=sys.stderr)
assert job["config"]["num_hidden_layers"] == 1 and job["device"] == "cpu" and job["dtype"] == "float32", job
assert len(job["requests"]) == 5 and all(len(p) == 8 and n == 4 for p, n in job["requests"])
print(json.dumps({"progress": 3}), flush=True)
"""
RESULT = 'print(json.dumps({"result": {"tokens": 60, "seconds": 2.0, "measure": "whole run"}}))'


def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str) -> dict[str, Any]:
    worker = tmp_path / "worker.py"
    worker.write_text(program)
    monkeypatch.setattr(transformers_peer, "WORKER", worker)
    options = transformers_peer.settled(replace(OPTIONS, requests=5))
    return transformers_peer.measure_transformers(options, FIELDS, sys.executable, 20.0)


def test_a_stand_in_gets_the_job_and_its_figures_come_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert ask(monkeypatch, tmp_path, STAND_IN + RESULT)["tokens_per_second"] == 30


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (STAND_IN + "print(json.dumps({'error': 'torch is not installed'}))", "torch is not installed"),
        (STAND_IN + "sys.exit('out of memory')", "out of memory"),
        ("raise SystemExit('cannot start')", "cannot start"),
        (STAND_IN, "a library talks"),
        (STAND_IN + RESULT.replace("60", "0"), "no token within 20 s"),
    ],
)
def test_failures_of_the_worker_are_one_line(
    program: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with pytest.raises(ConfigError, match=message) as error:
        ask(monkeypatch, tmp_path, program)
    assert str(error.value).startswith("with-transformers: ")
    assert "\n" not in str(error.value)


def test_what_it_cannot_run_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]):
    for arguments, message in (
        (("--rank-of", "8"), "does not go together with rank-of"),
        (("--tensor-parallel-size", "2"), "accepted: --tensor-parallel-size 1"),
        (("--transformers-python", "/no/such/python"), "'/no/such/python' is no program"),
    ):
        assert main(["bench", "throughput", "--model", "tiny", "--workload", "constant:8:4", "--quiet",
                     "--with-transformers", *arguments]) == 1  # fmt: skip
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed here")
def test_missing_torch_is_told_by_the_worker_itself():
    options = transformers_peer.settled(replace(OPTIONS, requests=2))
    with pytest.raises(ConfigError, match="torch is not installed for "):
        transformers_peer.measure_transformers(options, FIELDS, sys.executable, 5.0)


def test_all_is_settled_without_an_engine():
    found = transformers_peer.settled(OPTIONS)
    assert found.tensor_parallel_size == 1
    assert found.max_model_len == 12
    assert (
        found.requests == 6 * 10
    )  # 16 prefill rows feed 16 * 4 / 8 requests in balance, and 16 / 8 are in their prompts


@pytest.mark.skipif(PEER not in os.environ, reason=f"{PEER} names no Python with torch and transformers")
def test_the_real_peer():
    import json

    fields = json.loads((EMBEDDED["tiny"] / "config.json").read_text())
    options = transformers_peer.settled(replace(OPTIONS, requests=40))
    found = transformers_peer.measure_transformers(options, fields, os.environ[PEER], 60.0)
    assert found["requests"] == 40
    assert found["tokens_per_second"] > 0
    assert found["tokens"] <= 40 * 11
    assert set(found["versions"]) == {"torch", "transformers"}
