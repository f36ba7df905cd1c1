"""The GPU session: its parts fit its calls, failures lose nothing else, and what was done outlives any end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.gpu_session import __main__ as gpu_session
from tools.gpu_session.parts import Part

ROOT = Path(gpu_session.__file__).parents[2]


def python(name: str, code: str, seconds: int = 60, **more: Any) -> Part:
    return Part(name, ("-c", code), seconds, **more)


FAST = python("fast", 'print(\'{"host_ms_median": 0.5, "host_ms_p99": 0.9}\')')
FAILS = python("fails", "raise SystemExit('no such | kernel')")
HANGS = python("hangs", "import time; print('{\"n\": 1}', flush=True); time.sleep(60)", 1)
SILENT = python("silent", "pass")


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
    status, state, _ = session([python("late", "print('{}')")], "--seconds", "1e-9")
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
from tools.gpu_session import __main__ as gpu_session
from tools.gpu_session import archive as session_archive
from tools.gpu_session.parts import Part
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
        [sys.executable, "-m", "tools.gpu_session.child", str(tmp_path / "t"), "compiles", "--a", "b"],
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


# -- the command


def test_wrong_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, message in (
        (["--tiny", "--call", "a", "--only", "nothing"], "'nothing' is no part of call a"),
        ([], "--call: a, b or later is needed"),
        (["--tiny", "--call", "b", "--from", "/nowhere"], "/nowhere is not a folder"),
        (["--tiny", "--call", "a", "--seconds", "-3"], "--seconds: -3 is not accepted; it must be above 0"),
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
