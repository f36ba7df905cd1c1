"""Pages on disk: a file that is not exactly what was written is never read, and no failure reaches the caller."""

from __future__ import annotations

import errno
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoflow_jax.engine import page_files
from nanoflow_jax.engine.offload import OffloadStore
from tests.engine.offloaded import PLENTY, check_get, file_of, files_in, flush, key_of, page_of, put


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[OffloadStore]:
    """A store whose host has no room for a page: all go to the disk, and are read from there."""
    with closing(OffloadStore(1, PLENTY, tmp_path)) as store:
        yield store


# -- the queue


def test_a_full_queue_drops_pages(on_disk: OffloadStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = hold_writer(monkeypatch)
    monkeypatch.setattr(page_files, "PAGES_TO_WRITE", 2)
    put(on_disk, range(5))
    assert [on_disk.count([key_of(n)]) for n in range(5)] == [1, 1, 0, 0, 0]
    assert on_disk.stats.dropped_pages == 3
    assert check_get(on_disk, [0, 1]) == 2, "pages that wait for the disk must be found"
    assert on_disk.stats.from_host_pages == 2
    go_on.set()
    flush(on_disk)
    assert len(files_in(tmp_path)) == 2
    assert check_get(on_disk, [0, 1]) == 2
    assert on_disk.stats.from_disk_pages == 2


def test_a_page_that_waits_and_never_arrives(on_disk: OffloadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = threading.Event()
    go_on = hold_writer(monkeypatch, opened)
    pages = [page_of(0), page_of(1)]
    on_disk.put([key_of(0), key_of(1)], pages)
    assert opened.wait(30)
    pages[1].delete()
    assert on_disk.count([key_of(1)]) == 1
    assert on_disk.get([key_of(1)]) == []
    assert on_disk.count([key_of(1)]) == 0
    go_on.set()
    flush(on_disk)
    assert on_disk.stats.failed_copies == 1
    assert check_get(on_disk, [0]) == 1


def test_clear_while_a_page_is_written(on_disk: OffloadStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = threading.Event()
    go_on = hold_writer(monkeypatch, opened)
    put(on_disk, [0, 1])
    assert opened.wait(30)
    on_disk.clear()
    assert on_disk.count([key_of(0)]) == 0
    put(on_disk, [2])
    go_on.set()
    flush(on_disk)
    assert [path.name for path in files_in(tmp_path)] == [key_of(2).hex()]
    assert on_disk._files._used == file_of(tmp_path, 2).stat().st_size


def hold_writer(monkeypatch: pytest.MonkeyPatch, opened: threading.Event | None = None) -> threading.Event:
    go_on = threading.Event()

    def wait_and_open(path: Path, mode: str) -> Any:
        if mode == "wb":
            if opened is not None:
                opened.set()
            assert go_on.wait(30)
        return open(path, mode)

    monkeypatch.setattr(page_files, "open", wait_and_open, raising=False)
    return go_on


# -- files that are damaged, or cannot be written


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damaged_byte(on_disk: OffloadStore, tmp_path: Path, data: st.DataObject) -> None:
    on_disk.clear()
    put(on_disk, range(3))
    flush(on_disk)
    damaged = data.draw(st.integers(0, 2))
    path = file_of(tmp_path, damaged)
    bits = bytearray(path.read_bytes())
    bits[data.draw(st.integers(0, len(bits) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bits)
    before = on_disk.stats.damaged_files
    assert check_get(on_disk, range(3)) == damaged
    assert [on_disk.count([key_of(n)]) for n in range(3)] == [int(n != damaged) for n in range(3)]
    assert [check_get(on_disk, [n]) for n in range(3)] == [int(n != damaged) for n in range(3)]
    assert on_disk.stats.damaged_files == before + 1
    assert not path.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, _: path.write_bytes(path.read_bytes()[:-1]),
        lambda path, _: path.write_bytes(path.read_bytes()[:30]),
        lambda path, _: path.write_bytes(b""),
        lambda path, _: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path, _: path.unlink(),
        lambda path, _: (path.unlink(), path.mkdir()),
        lambda path, folder: path.write_bytes(file_of(folder, 0).read_bytes()),
    ],
    ids=["one byte short", "no contents", "empty", "one byte more", "deleted", "a folder", "another page"],
)
def test_files_that_are_not_ours(on_disk: OffloadStore, tmp_path: Path, damage: Callable[[Path, Path], None]) -> None:
    put(on_disk, range(3))
    flush(on_disk)
    damage(file_of(tmp_path, 1), tmp_path)
    assert on_disk.count([key_of(n) for n in range(3)]) == 3
    assert check_get(on_disk, range(3)) == 1
    assert [on_disk.count([key_of(n)]) for n in range(3)] == [1, 0, 1]
    assert on_disk.stats.damaged_files == 1
    used = sum(file_of(tmp_path, n).stat().st_size for n in (0, 2))
    assert on_disk._files._used == used


class _FullDisk:
    """A file on a disk with room for `room` bytes more."""

    def __init__(self, path: Path, room: int) -> None:
        self.file, self.room = open(path, "wb"), room  # noqa: SIM115

    def __enter__(self) -> _FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: Any) -> None:
        self.file.write(memoryview(data)[: self.room])
        if (size := memoryview(data).nbytes) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= size


@pytest.mark.parametrize("room", [None, 0, 300, 1000])
def test_a_full_disk(
    on_disk: OffloadStore,
    tmp_path: Path,
    room: int | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(path: Path, mode: str) -> Any:
        if room is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return _FullDisk(path, room)

    monkeypatch.setattr(page_files, "open", full, raising=False)
    put(on_disk, [0, 1])
    flush(on_disk)
    monkeypatch.undo()
    assert on_disk.count([key_of(0)]) == on_disk.count([key_of(1)]) == 0
    assert on_disk.stats.write_errors == 2 and on_disk._files._used == 0
    assert not files_in(tmp_path), "no part of a file may stay"
    assert [record.name for record in caplog.records] == ["nanoflow_jax"], "one warning, once"
    assert "No space left on device" in caplog.text
    put(on_disk, [0])
    flush(on_disk)
    assert check_get(on_disk, [0]) == 1


def test_the_system_refuses_a_write(on_disk: OffloadStore, tmp_path: Path) -> None:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
        put(on_disk, [0])
        flush(on_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert on_disk.stats.write_errors == 1
    assert on_disk.count([key_of(0)]) == 0 and not files_in(tmp_path)


def test_the_folder_goes_away(on_disk: OffloadStore) -> None:
    on_disk._files._folder.rmdir()
    put(on_disk, [0])
    flush(on_disk)
    assert on_disk.stats.write_errors == 1 and on_disk.count([key_of(0)]) == 0


# -- the folder


def test_close_removes_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_files.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "not ours").touch()
    store = OffloadStore(1, PLENTY)
    (private,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    put(store, range(4))
    store.close()
    store.close()
    assert [path.name for path in tmp_path.iterdir()] == ["not ours"]
    assert not store._files._writer.is_alive()
    assert store.count([key_of(0)]) == 0 and store.get([key_of(0)]) == []
    with pytest.raises(RuntimeError, match="closed"):
        put(store, [0])


KILLED = """
import os, sys
from nanoflow_jax.engine.offload import OffloadStore
store = OffloadStore(1, 2**20, sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
"""


def test_the_next_start_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    """And nothing of a living one, nor what others have put there."""
    (tmp_path / "nanoflow-kv-notes.txt").touch()
    (tmp_path / "nanoflow-kv-elsewhere").symlink_to(tmp_path.parent)
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        (private,) = (path for path in tmp_path.iterdir() if path.is_dir() and not path.is_symlink())
        (private / "page").touch()
        with closing(OffloadStore(1, PLENTY, tmp_path)) as alive:
            assert (private / "page").exists()
            child.kill()
            child.wait()
            with closing(OffloadStore(1, PLENTY, tmp_path)):
                assert not private.exists() and alive._files._folder.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"nanoflow-kv-notes.txt", "nanoflow-kv-elsewhere"}
    assert tmp_path.parent.exists()


def test_two_stores_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "made when missing"
    with closing(OffloadStore(1, PLENTY, folder)) as one:
        with closing(OffloadStore(1, PLENTY, folder)) as other:
            one.put([key_of(0)], [page_of(0)])
            other.put([key_of(0)], [page_of(5)])
            flush(one)
            flush(other)
            np.testing.assert_array_equal(other.get([key_of(0)])[0], np.asarray(page_of(5)))
        assert check_get(one, [0]) == 1
    assert folder.exists() and not any(folder.iterdir())


def test_the_end_of_the_process_removes_the_files(tmp_path: Path) -> None:
    code = f"""
import numpy as np, jax
from nanoflow_jax.engine.offload import OffloadStore
from tests.engine.offloaded import flush
store = OffloadStore(1, 1 << 20, {str(tmp_path)!r})
store.put([b"key"], [jax.device_put(np.zeros(8, np.float32))])
flush(store)
print(len(list(next(store._files._folder.parent.iterdir()).iterdir())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"] and "Exception" not in done.stderr
    assert not any(tmp_path.iterdir())
