"""The GPU session: its parts fit its calls, failures lose nothing else, and what was done outlives any end."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels_pallas.bench import __main__ as kernel_bench
from kernels_pallas.bench import check
from kernels_pallas.bench.cases import CASES, TINY
from nanoflow_jax import __version__
from nanoflow_jax.bench import attention_check, command, gpu_session, session_archive, session_parts
from nanoflow_jax.bench.attention_check import agreement
from nanoflow_jax.bench.session_parts import SECONDS, Part, call_a, call_b, cap, failed, good, grouped, later, tiny
from nanoflow_jax.bench.session_report import summary
from nanoflow_jax.engine.request import Request
from nanoflow_jax.engine.sampling_params import SamplingParams
from nanoflow_jax.search.profile import command as profile_command
from nanoflow_jax.search.profile.table import these_versions

ROOT = Path(gpu_session.__file__).parents[2]


def python(name: str, code: str, seconds: int = 60, **more: Any) -> Part:
    return Part(name, ("-c", code), seconds, **more)


FAST = python("fast", 'print(\'{"host_ms_median": 0.5, "host_ms_p99": 0.9}\')')
FAILS = python("fails", "raise SystemExit('no such | kernel')")
HANGS = python("hangs", "import time; print('{\"n\": 1}', flush=True); time.sleep(60)", 1)
SILENT = python("silent", "pass")


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
    every = [*parts, *good("h200"), *later("python")]
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
    assert wrong_fp8["bisect.decode-fp8.step-pages"].arguments[-3:] == ("--fp8", "--step-pages", "1")
    assert not {"bisect.decode.stages", "sanitize.decode"} & set(wrong_fp8)


@pytest.mark.parametrize("small", [False, True])
def test_every_command_parses(small: bool) -> None:
    """Of all parts that any call has, at full size and tiny, by the parsers of what they run."""
    commands = argparse.ArgumentParser()
    kinds = commands.add_subparsers()
    command.add(kinds, argparse.HelpFormatter)
    profile_command.add(kinds, argparse.HelpFormatter)
    parsers = {
        "kernels_pallas.bench.check": check._parser(),
        "kernels_pallas.bench": kernel_bench._parser(),
        "nanoflow_jax.bench.attention_check": attention_check._parser(),
        "nanoflow_jax": commands,
    }
    for part in [*call_a(), *good("h100"), *call_b({}, None), *later(sys.executable)]:
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


# -- running them


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Runs a call of these parts; gives its exit status, its state and its summary, both from the archive."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_session, "tiny", lambda part: part)

    def run(parts: list[Part], *arguments: str, into: str = "out") -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr(gpu_session, "call_a", lambda: parts)
        status = gpu_session.main([into, "--tiny", "--call", "a", *arguments])
        files = archived(tmp_path / into)
        return status, json.loads(files["session.json"])["parts"], files["summary.md"]

    return run


def archived(folder: Path, name: str = "session") -> dict[str, str]:
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        return {m.name: archive.extractfile(m).read().decode() for m in archive.getmembers()}  # type: ignore[union-attr]


Run = Callable[..., tuple[int, dict[str, Any], str]]


def test_failures_lose_nothing_else_and_done_parts_are_kept(
    session: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    after = python("after", "print('{}')", needs=("fast", "hangs"))
    status, state, page = session([HANGS, FAILS, SILENT, FAST, after])
    assert status == 1
    assert {name: part["status"] for name, part in state.items()} == {
        "fails": "no such / kernel",
        "hangs": "stopped after 1 s",
        "silent": "printed no JSON",
        "fast": "done",
        "after": "skipped: hangs not done",
    }
    assert "- fast: host work per step, median 0.500 ms" in page
    assert "| fails | no such / kernel |" in page
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["session.tar.gz"]
    assert json.loads(archived(tmp_path / "out")["hangs.json"]) == {"n": 1}
    assert "fast: done (0 s)" in capfd.readouterr().err

    # Again: the failed one, which has another command now, runs; the done one does not, nor does it wait for a rerun.
    repaired = python("fails", FAST.arguments[1])
    status, state, page = session([repaired, FAST])
    assert (status, state["fails"]["status"]) == (0, "done")
    assert "fast: done before" in capfd.readouterr().err
    assert page.count("- command: ") == 2
    status, state, _ = session([python("late", "print('{}')")], "--seconds", "0")
    assert (status, state["late"]["status"]) == (1, "no time was left")


def test_done_parts_run_again_after_a_change(session: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = python("counts", "import os; print('{\"pid\": %d}' % os.getpid())")
    _, first, _ = session([counts])
    monkeypatch.setattr(gpu_session, "digest", lambda: "other")
    _, second, _ = session([counts])
    assert first["counts"]["digest"] != second["counts"]["digest"] == "other"


def test_at_once_is_at_once_and_each_has_its_limit(session: Run) -> None:
    """Three that wait for one another's files, and one that hangs beside them."""
    meet = (
        "import pathlib, time; pathlib.Path(%r).touch()\n"
        "while len(list(pathlib.Path().glob('met*'))) < 3: time.sleep(.01)\nprint('{}')"
    )
    parts = [python(f"p{i}", meet % f"met{i}", 30, at_once=True) for i in range(3)]
    began = time.monotonic()
    _, state, _ = session([*parts, python("hangs", "import time; time.sleep(60)", 2, at_once=True)])
    assert time.monotonic() - began < 20
    assert [state[f"p{i}"]["status"] for i in range(3)] == ["done"] * 3
    assert state["hangs"]["status"] == "stopped after 2 s"


def test_a_part_may_use_what_others_left(session: Run) -> None:
    """Half as much again as its own limit; with nothing left, no more than that."""
    slow = "import time; time.sleep(%g); print('{}')"
    _, state, _ = session([python("quick", "print('{}')", 4), python("slow", slow % 2.5, 2)])
    assert state["slow"]["status"] == "done"
    _, state, _ = session([python("first", slow % 2.5, 2), python("hangs", slow % 60, 2)], into="other")
    assert [part["status"] for part in state.values()] == ["stopped after 2 s"] * 2
    _, state, _ = session([python("quick", "print('{}')", 40), python("hangs", slow % 60, 2)], into="third")
    assert state["hangs"]["status"] == "stopped after 3 s"


def test_what_a_part_leaves_behind_ends_with_it(session: Run, tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('{\"pid\": %d}' % p.pid)"
    )
    session([python("parent", code)])
    pid = json.loads(archived(tmp_path / "out")["parent.json"])["pid"]
    for _ in range(100):
        if not Path(f"/proc/{pid}/status").exists() or "Z (zombie)" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.05)
    pytest.fail("it still runs")


def test_the_sanitizer_looks_at_what_failed(
    session: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\necho "ran $@" >&2\necho "========= Invalid __global__ read of size 16 bytes"\n'
        'echo "========= ERROR SUMMARY: 1 error"\nexit 9\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    parts = [python("bad", "raise SystemExit(3)", sanitize=("-c", "smallest")), FAST]
    _, state, page = session(parts)
    expected = "exit status 9; Invalid __global__ read of size 16 bytes; ERROR SUMMARY: 1 error"
    assert state["bad"]["sanitizer"] == expected
    assert expected in page
    log = archived(tmp_path / "out")["bad.sanitizer.log"]
    assert log.startswith("ran --tool memcheck --error-exitcode 9 ") and log.rstrip().endswith("-c smallest")
    assert "sanitizer" not in state["fast"]


def test_a_program_that_is_not_there(session: Run) -> None:
    _, state, _ = session([python("x", "print('{}')", prefix=("no-such-sanitizer",))])
    assert state["x"]["status"] == "skipped: no-such-sanitizer is not on this machine"


DRIVER = """
import sys
from nanoflow_jax.bench import gpu_session, session_archive
from nanoflow_jax.bench.session_parts import Part
gpu_session.tiny = lambda part: part
session_archive.Renewed.__init__.__defaults__ = (float(sys.argv[3]),)  # seconds, not 15
lines = "import os, time; print('{\\"pid\\": %d}' % os.getpid(), flush=True); time.sleep(60)"
gpu_session.call_a = lambda: [
    Part("first", ("-c", "print('{\\"n\\": 1}')"), 60), Part("second", ("-c", lines), 60)
]
sys.exit(gpu_session.main([sys.argv[1], "--tiny", "--call", "a", "--work", sys.argv[2]]))
"""


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "Z (zombie)" not in status.read_text()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_done_outlives_any_end(end: signal.Signals, tmp_path: Path) -> None:
    """Killed while its second part runs: the archive is whole, and has the first part and what the second had said."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "out"), str(tmp_path / "work"), "0.2"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    pid, deadline = 0, time.monotonic() + 60
    try:
        while not pid and time.monotonic() < deadline:
            time.sleep(0.05)
            if (tmp_path / "out" / "session.tar.gz").exists():
                said = archived(tmp_path / "out").get("second.json", "")
                pid = json.loads(said)["pid"] if said else 0
        assert pid, "it did not come so far"
        process.send_signal(end)
        process.wait(20)
        files = archived(tmp_path / "out")
        assert json.loads(files["first.json"]) == {"n": 1}
        assert json.loads(files["session.json"])["parts"]["first"]["status"] == "done"
        assert json.loads(files["second.json"])["pid"] == pid
        assert alive(pid) == (end == signal.SIGKILL)  # then nobody could end it
    finally:
        process.kill()
        if pid and alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_part_that_is_told_done_is_in_the_archive(tmp_path: Path) -> None:
    """Killed as soon as the line is there, long before the archive is due again."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "out"), str(tmp_path / "work"), "1000"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    with process.stderr as lines:
        try:
            assert next(lines).startswith("first: done (")
        finally:
            process.kill()
            process.wait()
    try:
        files = archived(tmp_path / "out")
        assert json.loads(files["first.json"]) == {"n": 1}
        assert json.loads(files["session.json"])["parts"]["first"]["status"] == "done"
    finally:  # the second part may have begun
        said = tmp_path / "work" / "results" / "second.json"
        for _ in range(40):
            if said.exists() and said.read_text():
                os.kill(json.loads(said.read_text())["pid"], signal.SIGKILL)
                break
            time.sleep(0.05)


def test_a_later_call_takes_up_results_and_programs(
    session: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what came back of the first, on a machine that has nothing else; it says what call B is."""
    monkeypatch.delenv("NANOFLOW_COMPILE_CACHE", raising=False)
    path = "os.path.join(os.environ['NANOFLOW_COMPILE_CACHE'], 'step-abc-cache')"
    compiles = python("compiles", f"import os; open({path}, 'w').write('program'); print('{{}}')")
    session([compiles, FAST], "--work", "one")
    assert archived(tmp_path / "out", "cache") == {"step-abc-cache": "program"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"session.tar.gz", "cache.tar.gz"}
    uses = python("uses", f"import os, json; print(json.dumps({{'found': open({path}).read()}}))")
    chosen: list[dict[str, str]] = []
    monkeypatch.setattr(gpu_session, "call_b", lambda state, gpu: chosen.append(dict(state)) or [uses])
    status = gpu_session.main(["second", "--tiny", "--call", "b", "--from", "out", "--work", "two"])
    assert status == 0
    assert chosen == [{"compiles": "done", "fast": "done"}]
    files = archived(tmp_path / "second")
    assert json.loads(files["uses.json"]) == {"found": "program"}
    assert set(json.loads(files["session.json"])["parts"]) == {"compiles", "fast", "uses"}
    gpu_session.main(["third", "--tiny", "--call", "b", "--from", "out", "--work", "two", "--assume", "good"])
    assert set(chosen[1].values()) == {"done"}


def test_a_part_says_what_compiling_took(tmp_path: Path) -> None:
    """Also one that is killed."""
    (tmp_path / "compiles.py").write_text(
        "import jax, sys, time\njax.jit(lambda x: x + 1)(1.0).block_until_ready()\n"
        "print(sys.argv, flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "nanoflow_jax.bench.session_child", str(tmp_path / "t"), "compiles", "--a", "b"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as lines:
        assert next(lines).endswith("'--a', 'b']\n")
        process.kill()
        process.wait()
    found = json.loads((tmp_path / "t").read_text())
    assert found["programs"] >= 1
    assert found["compile_seconds"] > 0
    assert found["lower_seconds"] > 0


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


# -- the command


def test_wrong_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, message in (
        (["--tiny", "--call", "a", "--only", "nothing"], "'nothing' is no part of call a"),
        ([], "--call: a, b or later is needed"),
        (["--tiny", "--call", "b", "--from", "/nowhere"], "/nowhere is not a folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            gpu_session.main([str(tmp_path / "out"), "--work", str(tmp_path / "work"), *arguments])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    if not os.path.exists("/dev/nvidiactl"):
        assert gpu_session.main([str(tmp_path / "new"), "--call", "a"]) == 2
        assert "no NVIDIA GPU on this machine" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    assert gpu_session.main(["--list", "anywhere"]) == 0
    listed = capsys.readouterr().out
    assert "call a: 420 s at most" in listed and "call b: 300 s at most" in listed and "  profile (" in listed


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
    made.logprobs.add(np.zeros(count), np.ones(count), np.array(top), logprobs)
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
