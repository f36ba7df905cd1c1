"""Results survive what stops a run; what does not belong together is refused, and nothing written is lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nanoflow_jax.config import ConfigError
from nanoflow_jax.evaluate import journal as journals
from nanoflow_jax.evaluate.journal import Journal, JournalError, manifest_path, record_number
from nanoflow_jax.evaluate.manifest import Manifest
from nanoflow_jax.weights.fingerprint import model_fingerprint

MANIFEST = Manifest("batch", {"model": "abc", "input": "123"}, {"path": "here"})


def record(number: int, error: bool = False) -> bytes:
    told = {"message": "no"} if error else None
    return json.dumps({"id": f"batch_req_{number}", "error": told, "text": "x" * number}).encode() + b"\n"


def run(path: Path, *numbers: int, manifest: Manifest = MANIFEST, **options: Any) -> list[int]:
    """Writes records; returns the numbers that were there before."""
    with Journal.open(path, manifest, **options) as journal:
        before = [n for n in range(1000) if n in journal.done]
        for number in numbers:
            journal.write(record(number))
    return before


def refused(path: Path, *words: str, manifest: Manifest = MANIFEST) -> None:
    before = path.read_bytes()
    with pytest.raises(ConfigError) as found:
        Journal.open(path, manifest)
    message = str(found.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message, message
    assert path.read_bytes() == before, "what was written before is touched"


def test_a_second_run_continues(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert run(path, 3, 1) == []
    assert Manifest.read(manifest_path(path)) == MANIFEST
    assert run(path, 2) == [1, 3]
    assert path.read_bytes() == record(3) + record(1) + record(2)


@pytest.mark.parametrize("keep", [1, 20, -1])
@pytest.mark.parametrize("junk", [b"", b"\0" * 5000])
def test_an_unfinished_end_is_cut_off(tmp_path: Path, keep: int, junk: bytes) -> None:
    """A torn record, and the zeros that a power cut leaves behind one."""
    path = tmp_path / "out.jsonl"
    run(path, 1, 2)
    with open(path, "ab") as file:
        file.write(record(3)[:keep] + junk)
    assert run(path, 3) == [1, 2]
    assert path.read_bytes() == record(1) + record(2) + record(3)


def test_damage_in_the_middle_is_told(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run(path, 1)
    with open(path, "ab") as file:
        file.write(b"what?\n" + record(2))
    refused(path, "line 2", "--restart")
    assert run(path, restart=True) == []
    aside = tmp_path / "out.jsonl.old-1"
    assert aside.read_bytes() == record(1) + b"what?\n" + record(2)
    assert Manifest.read(manifest_path(aside)) == MANIFEST
    assert path.read_bytes() == b""


def test_a_record_twice_is_told(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run(path, 1, 2)
    with open(path, "ab") as file:
        file.write(record(1))
    refused(path, "line 3", "request 1")
    with Journal.open(tmp_path / "new.jsonl", MANIFEST) as journal:
        journal.write(record(1))
        with pytest.raises(ValueError, match="record 1 is written twice"):
            journal.write(record(1))


def test_another_run_is_refused_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run(path, 1)
    changed = Manifest("batch", {"model": "other", "input": "123"}, {"path": "elsewhere"})
    refused(path, 'model was "abc" and is "other"', "--allow-changed", manifest=changed)
    assert run(path, 2, manifest=changed, allow_changed=True) == [1]
    assert run(path, manifest=changed) == [1, 2], "from now on it is the changed run"
    refused(path, "kind", manifest=Manifest("eval", changed.identity))
    for restart in (1, 2):
        assert run(path, 1, restart=True) == []
        assert (tmp_path / f"out.jsonl.old-{restart}").exists()


def test_files_that_are_no_run(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine\n")
    refused(path, "no manifest")
    path.unlink()
    run(path, 1)
    for text in ("[]", "{", '{"format": 2}', '{"format": 1, "colour": 2}'):
        manifest_path(path).write_text(text)
        with pytest.raises(ConfigError, match=r"manifest"):
            Journal.open(path, MANIFEST)
    with pytest.raises(ConfigError, match="folder does not exist"):
        Journal.open(tmp_path / "no" / "such", MANIFEST)
    with pytest.raises(ConfigError, match="is a folder"):
        Journal.open(tmp_path, MANIFEST)
    (tmp_path / "empty").touch()
    assert run(tmp_path / "empty", 1) == [], "an empty file is none"


def test_two_processes_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Journal.open(path, MANIFEST):
        for restart in (False, True):
            with pytest.raises(ConfigError, match="being written by another process"):
                Journal.open(path, MANIFEST, restart=restart)
    run(path, 1)


def test_a_file_that_is_replaced_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another process, which puts it in order or aside: the lock is one of the file that has the name then, and no
    record goes to one that has none."""
    path, lock, replaced = tmp_path / "out.jsonl", fcntl.flock, []
    run(path, 1)

    def late(*arguments: Any) -> None:
        if not replaced:
            replaced.append(path.with_name("other"))
            replaced[0].write_bytes(record(1) + record(3))
            replaced[0].replace(path)
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    assert run(path, 2) == [1, 3]
    assert path.read_bytes() == record(1) + record(3) + record(2)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was acknowledged is safe, no torn line stays, the error says so in one line, and the run can go on."""
    path = tmp_path / "out.jsonl"
    monkeypatch.setattr(journals, "SYNC_SECONDS", 0.0)
    run(path, 1)
    journal = Journal.open(path, MANIFEST)

    class Full:
        """Takes 10 bytes more, then none."""

        def __init__(self, file: Any):
            self.file, self.room = file, 10

        def write(self, data: Any) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = self.file.write(data[: self.room])
            self.room -= count
            return count

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    journal._file = Full(journal._file)
    with pytest.raises(JournalError) as found:
        for number in range(2, 5000):
            journal.write(record(number))
        journal.close()
    assert "No space left on device; 1 results are safe" in str(found.value)
    with pytest.raises(JournalError):
        journal.close()
    journal._file.close()
    assert path.read_bytes() == record(1)
    assert run(path, 2) == [1]


def test_large_records_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who writes faster than the disk waits, by bytes as by records."""
    path, held = tmp_path / "out.jsonl", []
    monkeypatch.setattr(journals, "QUEUE_BYTES", 20_000)
    monkeypatch.setattr(journals, "SYNC_SECONDS", 0.0)
    append = Journal._append

    def slow(self: Journal, batch: list[bytes]) -> None:
        held.append(self._given - self._written)
        time.sleep(0.001)
        append(self, batch)

    monkeypatch.setattr(Journal, "_append", slow)
    run(path, *range(1, 400))
    assert max(held) <= 20_000 + 2 * len(record(399))
    assert path.read_bytes() == b"".join(record(i) for i in range(1, 400))


def test_a_limit_of_the_system_on_the_file(tmp_path: Path) -> None:
    """The same from a real limit, in a process of its own; then without it."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'{{"prompt": "question {i}", "max_tokens": 40}}\n' for i in range(300)))

    command = [
        sys.executable,
        str(Path(__file__).parent / "stand_in.py"),
        str(source),
        str(output),
        "--pause",
        "0.0005",
    ]
    limited = ["bash", "-c", 'ulimit -S -f 20; exec "$@"', "bash", *command]  # KiB; a fork here would warn of threads
    stopped = subprocess.run(limited, capture_output=True, text=True, check=False, timeout=60)
    assert stopped.returncode == 1
    assert "File too large" in stopped.stderr.splitlines()[-1]
    data = output.read_bytes()
    assert 0 < len(data) <= 20 * 1024
    assert data.endswith(b"}\n")
    assert f"{data.count(b'}' + bytes([10]))} results are safe" in stopped.stderr.splitlines()[-1]
    subprocess.run(command, check=True, timeout=60)
    assert output.read_bytes().startswith(data)
    assert {record_number(line) for line in output.read_bytes().splitlines(keepends=True)} == set(range(1, 301))


def test_a_fingerprint_sees_what_matters(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    weights = bytearray(5 * 2**20)
    (folder / "sub" / "w.safetensors").write_bytes(weights)
    found = {model_fingerprint(folder)}
    (folder / "README.md").write_text("notes")
    (folder / ".cache").write_text("x")
    assert model_fingerprint(folder) in found
    for at in (0, 2**20 - 1, 5 * 2**20 - 1):
        weights[at] ^= 1
        (folder / "sub" / "w.safetensors").write_bytes(weights)
        found.add(model_fingerprint(folder))
    (folder / "config.json").write_text("{ }")
    found.add(model_fingerprint(folder))
    (folder / "tokenizer.json").write_text("{}")
    found.add(model_fingerprint(folder))
    assert len(found) == 6
