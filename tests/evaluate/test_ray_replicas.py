"""Replicas on this machine, by the real Ray, which is started once: what they give is what one `LLM` gives, also when
one of them is killed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.bench.replicas import measure_scaling
from nanoflow_jax.evaluate.batch import Settings, run_batch
from nanoflow_jax.evaluate.journal import Journal
from nanoflow_jax.evaluate.lines import identify
from nanoflow_jax.evaluate.manifest import Manifest
from nanoflow_jax.evaluate.prompts import samples
from nanoflow_jax.evaluate.run_task import run_task
from nanoflow_jax.evaluate.tasks import load_task
from nanoflow_jax.replicas.front import Replicas
from nanoflow_jax.workload import load_workload
from tests.evaluate.flags import FLAGS, OPTIONS

pytest.importorskip("ray", reason="Ray is not installed (the ray extra)")

ROOT = Path(__file__).parents[2]
LINES = 120
SETTINGS = Settings("tiny")
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """Ray's sockets lie in it, whose paths may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def several(short_folder: Path) -> Iterator[LLM]:
    """Two replicas of the `llm` of these tests, each on CPU devices of its own."""
    options: dict[str, Any] = OPTIONS
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("JAX_NUM_CPU_DEVICES", "8")  # as here: XLA cuts products by its threads
        patch.setenv("RAY_TMPDIR", str(short_folder))
        found = LLM("tiny", data_parallel_size=2, progress=False, **options)
        yield found
        found.close()
    assert gone(short_folder), "a process is left"


def replicas(llm: LLM) -> Replicas:
    assert llm.replicas is not None
    return llm.replicas


def pids(llm: LLM) -> list[int]:
    return [m.about.process for m in replicas(llm).members if m.about is not None]


def processes(folder: Path) -> list[int]:
    """Those of the Ray whose files are in `folder`, and of a command that has started it."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                given = (entry / "environ").read_bytes().split(b"\0")
                ours = b"limited_worker" in (entry / "cmdline").read_bytes()  # templates of these tests
                if f"RAY_TMPDIR={folder}".encode() in given and not ours:
                    found.append(int(entry.name))
    return found


def gone(folder: Path) -> bool:
    """Whether they are, after a moment."""
    end = time.monotonic() + 20
    while processes(folder):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def write_input(path: Path, lines: int = LINES) -> None:
    """Requests of all lengths, some broken, one id twice, a byte order mark, Windows' line ends."""
    rng = random.Random(3)
    found = []
    for i in range(lines):
        wanted: dict[str, Any] = {"custom_id": f"r{i if i != 40 else 7}", "prompt": f"{rng.randrange(99)}+{i}="}
        wanted |= {"max_tokens": rng.randrange(2, 80), "ignore_eos": True, "temperature": rng.choice([0, 1.5])}
        found.append(json.dumps(wanted) if i % 17 else "{broken")
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(found).encode())


def answered(llm: LLM, source: Path, out: Path) -> list[bytes]:
    """The lines of a run, sorted."""
    with Journal.open(out, Manifest("batch", {})) as journal:
        run_batch(llm, source, identify(source), journal, SETTINGS, progress=False)
    return sorted(out.read_bytes().splitlines())


def test_replicas_answer_as_one(llm: LLM, several: LLM) -> None:
    """Each in a process of its own, with devices of its own."""
    about = [m.about for m in replicas(several).members]
    assert len(set(pids(several))) == 2 and os.getpid() not in pids(several)
    assert [a and a.devices for a in about] == [8, 8]
    prompts = [f"{i}+{i * 7 % 50}=" for i in range(60)]
    texts = [[o.outputs[0].text for o in one.generate(prompts, GREEDY, use_tqdm=False)] for one in (llm, several)]
    assert texts[0] == texts[1]
    sampled = SamplingParams(temperature=1.3, max_tokens=12, n=5, seed=4, logprobs=1)
    found = [one.generate(prompts[:9], sampled, use_tqdm=False) for one in (llm, several)]
    assert [o.outputs for o in found[0]] == [o.outputs for o in found[1]]
    pairs = [("12+30=", "42"), ("12+30=", "43"), ("reverse abc=", "cba")]
    assert llm.score(pairs, use_tqdm=False) == several.score(pairs, use_tqdm=False)
    chat = [{"role": "user", "content": "What is 25+17?"}]
    assert several.chat(chat, GREEDY, use_tqdm=False)[0].outputs[0].content == "25+17=42"


def test_unseeded_samples_differ_between_replicas(several: LLM) -> None:
    """Were the seeds each replica's own, the second half would be the first."""
    sampled = SamplingParams(temperature=2.0, max_tokens=24, ignore_eos=True)
    outputs = several.generate(["7"] * 16, sampled, use_tqdm=False)
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 16


def test_an_evaluation_gives_the_records_of_one(llm: LLM, several: LLM, tmp_path: Path) -> None:
    for name in ("addition", "addition_choice"):
        found = []
        for who, one in (("one", llm), ("several", several)):
            task, path = load_task(name), tmp_path / f"{name}-{who}.jsonl"
            with Journal.open(path, Manifest("eval", {})) as journal:
                run_task(one, task, samples(task, 20), journal, progress=False)
            found.append(sorted(path.read_bytes().splitlines()))
        assert found[0] == found[1] and len(found[0]) == 20


def test_lm_eval_takes_replicas(llm: LLM, several: LLM) -> None:
    adapter = pytest.importorskip("nanoflow_jax.evaluate.lm_eval")
    from tests.evaluate.test_lm_eval import instances

    asked = [("reverse abcdef=", {"until": ["c"], "max_gen_toks": 20}), ("12+30=", {"max_gen_toks": 8})]
    for one in (llm, several):
        lm = adapter.NanoflowLM(llm=one)
        assert lm.generate_until(instances("generate_until", *asked), disable_tqdm=True) == ["fed", "42"]


def test_replicas_that_are_killed_or_hang_are_named_and_started_again(
    llm: LLM, several: LLM, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGSTOP of one and SIGKILL of the other in the middle of a batch: each line is answered once, as by one LLM."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_input(source)
    before, harmed = pids(several), []

    def harm() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:  # until both have begun
            if out.exists() and out.read_bytes().count(b'"error": null') > 3:
                os.kill(before[0], signal.SIGSTOP)
                os.kill(before[1], signal.SIGKILL)
                harmed.append(out.read_bytes().count(b'"error": null'))
                return
            time.sleep(0.01)

    thread = threading.Thread(target=harm)
    thread.start()
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "nanoflow_jax"):
        patch.setattr("nanoflow_jax.evaluate.journal.SYNC_SECONDS", 0.01)
        patch.setattr("nanoflow_jax.replicas.members.SILENT_SECONDS", 8.0)  # a busy machine is silent, too
        found = answered(several, source, out)
        thread.join()
        assert harmed and harmed[0] < LINES * 3 // 4, "it came too late to say anything"
        end = time.monotonic() + 90
        while any(pid in before for pid in pids(several)):  # they are there again, and answer
            assert time.monotonic() < end
            several.generate(["12+30="] * 2, GREEDY, use_tqdm=False)
        told = sorted(r.getMessage() for r in caplog.records if "is started again" in r.getMessage())
        names = [f"replica {i + 1} of 2 (process {before[i]})" for i in (0, 1)]
        assert len(told) == 2, told
        assert told[0].startswith(f"{names[0]} hangs (no answer for 8 s) and is ended") and "\n" not in told[0]
        assert told[1].startswith(f"{names[1]} has died")
        assert found == answered(llm, source, tmp_path / "plain.jsonl")
    assert not Path(f"/proc/{before[0]}").exists(), "the stopped one is left"
    assert capfd.readouterr().out == "", "Ray's messages are not results"


def test_an_interrupted_call_ends_what_it_had(several: LLM) -> None:
    """Ctrl-C; the next call has the replicas for itself."""
    long = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    work = [several.prepare([1, 2, 3 + i % 50], long, i) for i in range(400)]
    stream = several.run_stream(work)
    next(stream)
    stream.close()
    started = time.monotonic()
    assert several.generate("12+30=", GREEDY, use_tqdm=False)[0].outputs[0].text == "42"
    assert time.monotonic() - started < 4, "it waited for the others"


def test_one_is_measured_against_all(several: LLM) -> None:
    found = measure_scaling(several, load_workload("constant:8:8"), 40, 1)
    assert (found.replicas, found.devices, found.requests) == (2, 8, 40)
    assert found.ratio == found.all[0] / found.one[0] > 0


def test_streams_grow_to_what_one_gives(llm: LLM, several: LLM) -> None:
    """Each part goes on where the one before ended."""
    params = SamplingParams(temperature=1.5, max_tokens=60, n=2, seed=3, ignore_eos=True, logprobs=1, stop="zz")
    prompts = ["12+30=", "reverse abcdef="]
    seen: dict[str | None, list[Any]] = {}
    for output in several.stream(prompts, params):
        before = seen.setdefault(output.prompt, [])
        if before:
            for old, new in zip(before[-1].outputs, output.outputs, strict=True):
                assert new.text.startswith(old.text) and new.token_ids[: len(old.token_ids)] == old.token_ids
                assert len(new.logprobs or ()) == len(new.token_ids)
        before.append(output)
    whole = llm.generate(prompts, params, use_tqdm=False)
    assert [seen[prompt][-1].outputs for prompt in prompts] == [output.outputs for output in whole]
    assert all(len(parts) > 2 for parts in seen.values())
    stream = several.stream(prompts, params)
    next(stream)
    stream.close()
    assert replicas(several).counts()["slots"] == 16


def test_wrong_prompts_are_refused_before_any_is_sent(several: LLM) -> None:
    with pytest.raises(ValueError, match=r"^prompt: 200 tokens; accepted: at most 127"):
        several.generate([[1, 2], [3] * 200], GREEDY, use_tqdm=False)


# A shell's background jobs are started without a handler for SIGINT.
INTERRUPTIBLE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from nanoflow_jax.cli import main; sys.exit(main())"
)


def test_ended_commands_leave_no_process(tmp_path: Path) -> None:
    """SIGTERM of one and Ctrl-C of another, both begun together."""
    runs: dict[signal.Signals, tuple[subprocess.Popen[str], Path, Path]] = {}
    layout = ["--data-parallel-size", "auto", "--cpu-devices", "2", "--tensor-parallel-size", "2"]  # of two cores, one
    for number in (signal.SIGTERM, signal.SIGINT):
        source, out = tmp_path / f"{number.name}.in", tmp_path / f"{number.name}.out"
        write_input(source, 4000)
        folder = Path(tempfile.mkdtemp(prefix="ray"))
        command = [sys.executable, "-c", INTERRUPTIBLE, "batch", "-i", str(source), "-o", str(out), *FLAGS, *layout]
        environment = {**os.environ, "RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        runs[number] = run, out, folder
    try:
        for number, (run, out, folder) in runs.items():
            end = time.monotonic() + 150
            while not out.exists() or out.read_bytes().count(b'"error": null') < 3:
                assert run.poll() is None, run.communicate()
                assert time.monotonic() < end, "no result in time"
                time.sleep(0.02)
            assert len(processes(folder)) > 3, "Ray is there"
            run.send_signal(number)
            _, told = run.communicate(timeout=60)
            assert run.returncode != 0 and "Traceback" not in told, told
            assert gone(folder), f"{number.name} has left a process"
            assert 0 < len(out.read_bytes().splitlines()) < 4000
    finally:
        for run, _, folder in runs.values():
            run.kill()
            run.communicate()
            shutil.rmtree(folder, ignore_errors=True)
