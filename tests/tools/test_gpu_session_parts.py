"""What a GPU session is made of: parts that fit its calls, archives that are whole at every moment, its summary."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels_pallas.bench import __main__ as kernel_bench
from kernels_pallas.bench import check
from kernels_pallas.bench.cases import CASES, TINY
from nanoflow_jax.commands import bench as command
from nanoflow_jax.commands import profile as profile_command
from nanoflow_jax.engine.request import Request
from nanoflow_jax.profile.table import these_versions
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.step.logprobs import TokenLogprobs
from nanoflow_jax.version import __version__
from tools.gpu_session import __main__ as gpu_session
from tools.gpu_session import archive as session_archive
from tools.gpu_session import attention_check
from tools.gpu_session import parts as session_parts
from tools.gpu_session.attention_check import agreement
from tools.gpu_session.parts import SECONDS, call_a, call_b, cap, failed, good, grouped, later, tiny
from tools.gpu_session.report import summary

# -- the parts


def test_calls_fit_their_time() -> None:
    """By the table of call A; and call B, whatever of A was not done."""
    parts = {part.name: part for part in call_a()}
    stages = {"machine": 40, "check": 75, "kernels": 130, "tokens": 90, "8b": 85}
    for stage, seconds in stages.items():
        assert cap([part for name, part in parts.items() if name.partition(".")[0] == stage]) == seconds, stage
    assert cap(call_a()) == sum(stages.values()) == SECONDS["a"]
    done = dict.fromkeys(parts, "done")
    assert cap(call_b(done, "h100")) == SECONDS["b"]
    for wrong in itertools.chain(itertools.combinations(parts, 1), itertools.combinations(parts, 2), [tuple(parts)]):
        assert cap(call_b(done | dict.fromkeys(wrong, "stopped"), "h100")) <= SECONDS["b"], wrong


def test_order_and_needs() -> None:
    """What says most comes first; a part needs only earlier ones; the checks share the GPU's memory at once."""
    parts = call_a()
    assert [part.name for part in parts if part.name.startswith("kernels.")] == [
        "kernels.ceilings", "kernels.decode-70b-1280x1k", "kernels.prefill-70b-8k", "kernels.decode-8b-32x4k",
        "kernels.append-70b-2048", "kernels.decode-70b-1280x1k-fp8", "kernels.decode-70b-1x32k",
        "kernels.append-8b-8192",
    ]  # fmt: skip
    every = [*parts, *good("h200"), *later("python", "h200")]
    assert len({part.name for part in every}) == len(every)
    names: set[str] = set()
    for part in parts:
        assert set(part.needs) <= names
        names.add(part.name)
    groups = [group for group in grouped([*parts, *call_b({}, None)]) if len(group) > 1]
    assert {part.name for part in groups[0]} == {f"check.{name}" for name in session_parts.CHECKED}
    for group in groups:
        shares = [float(dict(part.environment)["XLA_PYTHON_CLIENT_MEM_FRACTION"]) for part in group]
        assert sum(shares) < 0.95


def test_call_b_is_chosen_by_what_a_said() -> None:
    done = {part.name: "done" for part in call_a()}
    names = [part.name for part in call_b(done, "h200")]
    assert names == ["8b.whole", "70b.nanoflow_70b", "70b.sequential", "beside", "torch"]
    tokens = {gpu: call_b(done, gpu)[0].arguments for gpu in ("h100", "h200")}
    assert "360000" in tokens["h100"] and "760000" in tokens["h200"]
    assert failed({}) == list(done)
    slow_prefill = call_b(done | {"kernels.prefill-70b-8k": "stopped after 18 s"}, "h100")
    assert [part.name for part in slow_prefill] == [
        "bisect.prefill.no-ping-pong", "sanitize.prefill", "tokens.tiny.no-command-buffers",
        "tokens.8b.no-command-buffers",
    ]  # fmt: skip
    assert slow_prefill[1].prefix[0] == "compute-sanitizer"
    wrong_fp8 = {part.name: part for part in call_b(done | {"check.decode-fp8": "off"}, "h100")}
    assert wrong_fp8["bisect.decode-fp8.stages"].arguments[-3:] == ("--fp8", "--stages", "2")
    assert not {"bisect.decode.stages", "sanitize.decode"} & set(wrong_fp8)


@pytest.mark.parametrize("small", [False, True])
def test_every_command_parses(small: bool) -> None:
    """Of all parts that any call has, at full size and tiny, by the parsers of what they run."""
    commands = argparse.ArgumentParser(allow_abbrev=False)
    kinds = commands.add_subparsers()
    command.add(kinds)
    profile_command.add(kinds)
    parsers = {
        "kernels_pallas.bench.check": check._parser(),
        "kernels_pallas.bench": kernel_bench._parser(),
        "tools.gpu_session.attention_check": attention_check._parser(),
        "nanoflow_jax": commands,
    }
    for part in [*call_a(), *good("h100"), *call_b({}, None), *later(sys.executable, "h200")]:
        part = tiny(part) if small else part
        module, arguments = part.arguments[1], part.arguments[2:]
        if module in parsers:
            parsers[module].parse_args(arguments)
        elif module.endswith("torch_worker"):
            assert set(arguments) <= set(session_parts.MEASURED)
        else:
            assert arguments == (("--tiny",) if small else ())
        if module == "kernels_pallas.bench" and "--case" in arguments:
            assert arguments[arguments.index("--case") + 1] in (TINY if small else CASES)


# -- archives


def test_archives_are_split_and_whole_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_archive, "PART_BYTES", 1000)
    folder = tmp_path / "out"
    folder.mkdir()
    small, large, larger = b"a" * 900, bytes(range(256)) * 10, bytes(range(255, -1, -1)) * 12
    assert session_archive.read(folder, "x") is None
    session_archive.write(small, folder, "x")
    assert [path.name for path in folder.iterdir()] == ["x.tar.gz"]
    session_archive.write(large, folder, "x")
    assert sorted(path.name for path in folder.iterdir()) == [f"x.1.{k}-of-3" for k in (1, 2, 3)]
    assert max(path.stat().st_size for path in folder.iterdir()) <= 1000
    assert session_archive.read(folder, "x") == large
    assert session_archive.read(folder, "y") is None

    real, seen = os.replace, []

    def replace(source: Any, target: Any) -> None:
        """Killed before each rename in turn: what is there is whole."""
        seen.append(session_archive.read(folder, "x"))
        real(source, target)

    monkeypatch.setattr(session_archive.os, "replace", replace)
    session_archive.write(larger, folder, "x")
    session_archive.write(small, folder, "x")
    assert seen == [large] * 4 + [larger]
    assert session_archive.read(folder, "x") == small


def test_an_archive_has_the_newest_files(tmp_path: Path) -> None:
    source, into = tmp_path / "from", tmp_path / "into"
    for age, name in enumerate(["newest", "folder/older", "oldest"]):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(os.urandom(3000))
        os.utime(source / name, (1000 - age, 1000 - age))
    (source / "draft.part").touch()
    session_archive.unpack(session_archive.packed(source), into)
    assert {str(p.relative_to(into)) for p in into.rglob("*") if p.is_file()} == {"newest", "folder/older", "oldest"}
    assert (into / "oldest").read_bytes() == (source / "oldest").read_bytes()
    assert into.stat().st_mode & 0o077 == 0
    few = tmp_path / "few"
    session_archive.unpack(session_archive.packed(source, most=9000), few)
    assert {p.name for p in few.rglob("*") if p.is_file()} == {"newest", "older"}


def test_the_environment_of_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/x")
    for name in ("CUDA_ROOT", "NANOFLOW_COMPILE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu_session, "CUDA", tmp_path / "cuda")
    found = gpu_session.environment(tmp_path, on_cpu=False)
    assert found["XLA_FLAGS"] == "--xla_dump_to=/x --xla_gpu_experimental_enable_fusion_autotuner=false"
    assert found["NANOFLOW_COMPILE_CACHE"] == str(tmp_path / "cache")
    assert "CUDA_ROOT" not in found  # it is not there
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    (tmp_path / "cuda" / "bin" / "ptxas").touch()
    found = gpu_session.environment(tmp_path, on_cpu=False)
    assert found["CUDA_ROOT"] == str(tmp_path / "cuda")
    assert found["PATH"].endswith(f"{os.pathsep}{tmp_path}/cuda/bin")
    monkeypatch.setenv("CUDA_ROOT", "/mine")
    assert gpu_session.environment(tmp_path, on_cpu=False)["CUDA_ROOT"] == "/mine"


def test_a_summary_of_throughput_and_kernels() -> None:
    result: dict[str, Any] = {
        "model": "m", "layers": 2, "model_layers": 4, "dtype": "bfloat16", "rank_of": 8, "plan": "p", "workload": "w",
        "options": {"attention_backend": "mosaic"}, "lost": {}, "tokens_per_second_per_gpu": 1234.0, "steady": False,
        "served_tokens_per_second_per_gpu": 2345.0, "share_of_optimum": 0.5,
        "window": {"seconds": 61.0, "step_ms_median": 9.0, "layer_ms": 4.5, "gap_ms_median": 0.25,
                   "dispatch_ms_median": 0.5},
        "network": {"tokens_per_second_per_gpu_exposed": 900.0, "tokens_per_second_per_gpu_hidden": 1100.0},
        "ratio": 1.25, "compared": ["p", "q"],
    }  # fmt: skip
    ours = {"us": 230.0, "bytes_per_second": 2.8e12, "percent_of_copy": 93.0, "error": 2e-3}
    case = {"case": "d/c", "results": {"mosaic": ours}, "expected_us": 248.0, "goal": "92 % of a copy", "met": True}
    ceilings = {"tuning": "h100", "copy_bytes_per_second": 3e12, "gemm_flops_per_second": 798e12}
    known = {"status": "done", "seconds": 61, "compile_seconds": 12.0, "programs": 9, "cached": 3}
    table = {
        "run": {**known, "result": result},
        "kernel": {**known, "result": {"lines": [ceilings, case]}},
        "bad": {"status": "off", "seconds": 1, "result": None, "sanitizer": "no error"},
    }
    page = summary([{"GPU": "H"}], table)
    assert "| run | m, 2 of 4 layers, bfloat16, rank of 8 | p, attention mosaic | w | 1,234 [900 to 1,100] |" in page
    assert "| 50.0% | 2,345 | 1.250 (p / q) | 9.000 | 4.500 | 0.250 | 0.500 | 61, not steady |" in page
    assert "in this call: 3.00 TB/s, 798 TFLOP/s." in page
    assert "| d/c | mosaic | 230.0 | 248.0 | 2.80 TB/s | 93 % | 2.0e-03 | 92 % of a copy: met |" in page
    assert "| run | done | 61 | 12 s | 9 | 3 |  |" in page
    assert "| bad | off | 1 |  |  |  | no error |" in page


# -- greedy tokens


def request(tokens: list[int], top: list[tuple[int, int]], gap: float) -> Request:
    made = Request(0, "0", None, [9], SamplingParams(), 0, frozenset(), 9)
    made.tokens = np.array([9, *tokens], np.int32)
    count = len(tokens)
    logprobs = np.tile(np.array([0.0, -gap], np.float32), (count, 1))
    made.logprobs.add(TokenLogprobs(np.zeros(count), np.ones(count), np.array(top), logprobs), 0, count, 2)
    return made


def test_near_ties_are_told_from_mismatches() -> None:
    a = request([1, 2, 3], [(1, 5), (2, 6), (3, 7)], gap=0.01)
    agree = partial(agreement, near=0.1)
    found = agree([a, a, a], [request(t, [(0, 0)] * 3, 1) for t in ([1, 2, 3], [1, 6, 0], [1, 8, 3])])
    assert (found.tokens, found.near_ties, found.mismatches) == (5, 1, 1)
    clear = request([1, 2, 3], [(1, 5), (2, 6), (3, 7)], gap=0.5)
    assert agree([clear], [request([1, 6, 0], [(0, 0)] * 3, 1)]).mismatches == 1


def test_versions_without_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain checkout has no metadata; a run's figures are not lost for it."""
    real = importlib.metadata.Distribution.from_name

    def from_name(name: str) -> importlib.metadata.Distribution:
        if name == "nanoflow_jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", from_name)
    versions = [these_versions(), command._provenance(argparse.Namespace(arguments=[]))["versions"]]
    assert [v["nanoflow_jax"] for v in versions] == [__version__] * 2
