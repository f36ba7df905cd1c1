"""The GPU session: parts that fail or hang lose nothing else, finished ones are kept, and what it will compile
compiles."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoflow_jax.bench import gpu_session
from nanoflow_jax.bench.attention_check import agreement
from nanoflow_jax.bench.session_parts import Part, parts
from nanoflow_jax.bench.session_report import summary
from nanoflow_jax.engine.request import Request
from nanoflow_jax.engine.sampling_params import SamplingParams

FAST = Part("fast", ("-c", 'print(\'{"host_ms_median": 0.5, "host_ms_p99": 0.9}\')'), 60)
FAILS = Part("fails", ("-c", "raise SystemExit('no such | kernel')"), 60)
HANGS = Part("hangs", ("-c", "import time; time.sleep(60)"), 1)
SILENT = Part("silent", ("-c", "pass"), 60)


def session(monkeypatch: pytest.MonkeyPatch, folder: Path, chosen: list[Part], *arguments: str) -> int:
    monkeypatch.setattr(gpu_session, "parts", lambda *_: chosen)
    monkeypatch.setattr(gpu_session, "commit", lambda: "abc")
    return gpu_session.main([str(folder), "--tiny", *arguments])


def test_failures_lose_nothing_else_and_done_parts_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = tmp_path / "out"
    assert session(monkeypatch, folder, [FAILS, HANGS, SILENT, FAST]) == 1
    state = json.loads((folder / "session.json").read_text())["parts"]
    assert {name: part["status"] for name, part in state.items()} == {
        "fails": "no such / kernel",
        "hangs": "stopped after 1 s",
        "silent": "printed no JSON",
        "fast": "done",
    }
    page = (folder / "summary.md").read_text()
    assert "- commit: abc" in page
    assert "- fast: host work per step, median 0.500 ms" in page
    assert "| fails | no such / kernel |" in page
    assert not list(folder.glob("*.part"))
    capfd.readouterr()

    # Again: the failed one, which has another command now, runs; the done one does not.
    repaired = Part("fails", FAST.arguments, 60)
    assert session(monkeypatch, folder, [repaired, FAST]) == 0
    assert capfd.readouterr().err.splitlines()[1] == "fast: done before"
    assert session(monkeypatch, folder, [replace(FAST, name="late")], "--minutes", "0") == 1
    assert "| late | no time was left | 0 |" in (folder / "summary.md").read_text()


def test_wrong_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    with pytest.raises(SystemExit) as ended:
        gpu_session.main([str(tmp_path), "--only", "nothing"])
    assert ended.value.code == 2
    assert "'nothing' is no part" in capsys.readouterr().err
    if not os.path.exists("/dev/nvidiactl"):
        assert gpu_session.main([str(tmp_path / "new")]) == 2
        assert "no NVIDIA GPU on this machine" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


def test_every_part_has_a_name_of_its_own_and_a_command_that_parses(capsys: pytest.CaptureFixture[str]):
    for tiny in (False, True):
        chosen = parts("python", tiny)
        assert len({p.name for p in chosen}) == len(chosen)
    assert gpu_session.main(["--list", "anywhere"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(parts("python"))


def test_a_summary_of_throughput():
    result: dict[str, Any] = {
        "model": "m", "layers": 2, "model_layers": 4, "dtype": "bfloat16", "rank_of": 8, "plan": "p", "workload": "w",
        "options": {"attention_backend": "mosaic"}, "lost": {}, "tokens_per_second_per_gpu": 1234.0,
        "served_tokens_per_second_per_gpu": 2345.0, "share_of_optimum": 0.5, "window": {"seconds": 61.0},
        "network": {"tokens_per_second_per_gpu_exposed": 900.0, "tokens_per_second_per_gpu_hidden": 1100.0},
        "ratio": 1.25, "compared": ["p", "q"],
    }  # fmt: skip
    page = summary({"GPU": "H"}, {"one": {"status": "done", "seconds": 1, "result": result}})
    assert "| one | m, 2 of 4 layers, bfloat16, rank of 8 | p, attention mosaic | w | 1,234 [900 to 1,100] |" in page
    assert "| 50.0% | 2,345 | 1.250 (p / q) | 61 |" in page


def request(tokens: list[int], top: list[tuple[int, int]], gap: float) -> Request:
    made = Request(0, "0", None, [9], SamplingParams(), 0, frozenset(), 9)
    made.tokens = np.array([9, *tokens], np.int32)
    count = len(tokens)
    logprobs = np.tile(np.array([0.0, -gap], np.float32), (count, 1))
    made.logprobs.add(np.zeros(count), np.ones(count), np.array(top), logprobs)
    return made


def test_near_ties_are_told_from_mismatches():
    a = request([1, 2, 3], [(1, 5), (2, 6), (3, 7)], gap=0.01)
    agree = partial(agreement, near=0.1)
    found = agree([a, a, a], [request(t, [(0, 0)] * 3, 1) for t in ([1, 2, 3], [1, 6, 0], [1, 8, 3])])
    assert (found.tokens, found.near_ties, found.mismatches) == (5, 1, 1)
    clear = request([1, 2, 3], [(1, 5), (2, 6), (3, 7)], gap=0.5)
    assert agree([clear], [request([1, 6, 0], [(0, 0)] * 3, 1)]).mismatches == 1


def test_parts_run_at_tiny_size(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """From end to end, three of them: `--tiny` without `--only` runs all, which takes minutes of processor time."""
    status = gpu_session.main([str(tmp_path), "--tiny", "--only", "correctness", "host", "profile"])
    assert status == 0, capfd.readouterr().err
    assert json.loads((tmp_path / "correctness.json").read_text())["mismatches"] == 0
    page = (tmp_path / "summary.md").read_text()
    assert "0 mismatches" in page
    assert "points measured now" in page and (tmp_path / "profile-tiny.jsonl").exists()
    assert "| 70b_rank_512_512 | not run | 0 |" in page
