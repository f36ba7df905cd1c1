"""Append-only results that survive a kill at any moment.

A run has two files: `results.jsonl`, one record per line, and `results.jsonl.manifest.json`, written first. A record
begins with its id and its error, `{"id": "..._17", "error": null, `; the number is that of the line or sample it
answers, and which ones are done is read from there. Records are written and synced to the disk by a thread of its own,
at most SYNC_SECONDS after they were given: the device does not wait for the disk. `synced` counts those that no kill
and no power cut can take.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from nanoflow_jax.config import ConfigError
from nanoflow_jax.evaluate.lines import NumberSet
from nanoflow_jax.evaluate.manifest import Manifest, sync_folder
from nanoflow_jax.system.output_files import create, open_to_append
from nanoflow_jax.system.reading import parse_json

SYNC_SECONDS = 1.0
QUEUE_RECORDS = 4096  # given and not yet written: then the caller waits
QUEUE_BYTES = 64 * 2**20
UTF8 = ("utf-8", "backslashreplace")  # half surrogate pairs, which UTF-8 cannot hold, stay as JSON escapes
_ID = re.compile(rb'\{"id": "(?:[a-z]+_)+(\d{1,15})", "error": (n|\{)')


class JournalError(OSError):
    """Results cannot be written; those written before are safe."""


def manifest_path(output: Path) -> Path:
    return output.with_name(output.name + ".manifest.json")


def record_number(line: bytes) -> int | None:
    """The number that a record answers; None when the line is no whole record."""
    found = _ID.match(line)
    return int(found[1]) if found and line.endswith(b"}\n") and b"\0" not in line else None


def is_error(line: bytes) -> bool:
    """Whether a record tells of a request that could not be served."""
    found = _ID.match(line)
    return found is not None and found[2] == b"{"


class Journal:
    """Open with `Journal.open`; use as a context manager.

    done     numbers that have a record
    errors   how many of these are errors
    synced   records that are on the disk, those of earlier runs included
    told     one line about results of a changed run that are not kept; else None
    """

    def __init__(self, path: Path, file: Any, done: NumberSet, errors: int, told: str | None = None):
        self.path, self.done, self.errors, self.synced, self.told = path, done, errors, len(done), told
        self._file = file
        self._queue: queue.Queue[bytes | None] = queue.Queue(QUEUE_RECORDS)
        self._given = self._written = 0  # bytes; each has one thread that adds to it
        self._error: OSError | None = None
        self._finished = False
        self._thread = threading.Thread(target=self._write_all, name="journal", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        path: Path,
        manifest: Manifest,
        *,
        restart: bool = False,
        allow_changed: bool = False,
        pairing: Callable[[], Pairing] | None = None,
    ) -> Journal:
        """Begins a run or continues it. A torn last line is cut off.

        restart        puts results that are there aside (`results.jsonl.old-1`, ...) and begins anew
        allow_changed  continues although model, settings or input are others
        pairing        gives the requests of this run, to which the results of a changed one are then given by what they
                       answer; those that answer none of them are put aside. None: their numbers are kept
        Raises ConfigError, one line: the file is not of such a run, the manifest is another one's, another process is
        writing, or a record in the middle is damaged.
        """
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"--output: {path}: its folder does not exist")
        if path.is_dir():
            raise ConfigError(f"--output: {path} is a folder; a file is needed")
        if restart and (path.exists() or manifest_path(path).exists()):
            with _locked(path):
                _put_aside(path)
        file = _locked(path)
        try:
            changed = _check_manifest(path, manifest, allow_changed)
            done, errors = _scan(path, file)
            told = None
            if changed and pairing is not None:
                told = _pair(path, manifest, pairing())
                locked, file = file, _locked(path)  # it may be another one now
                locked.close()
                done, errors = _scan(path, file)
            if changed is not False:
                manifest.write(manifest_path(path))
            sync_folder(path.absolute().parent)
            return cls(path, file, done, errors, told)
        except BaseException:
            file.close()
            raise

    def write(self, record: bytes) -> None:
        """Takes one encoded record; it is durable within SYNC_SECONDS, or when `finish` returns. Raises JournalError
        when an earlier one could not be written."""
        number = record_number(record)
        assert number is not None, record[:80]
        if not self.done.add(number):
            raise ValueError(f"record {number} is written twice")
        self.errors += is_error(record)
        self._given += len(record)
        while True:
            self._raise_error()
            if self._given - self._written > QUEUE_BYTES + len(record):
                time.sleep(0.01)
                continue
            try:
                return self._queue.put(record, timeout=1.0)
            except queue.Full:
                continue

    def finish(self) -> None:
        """Writes what is left; the file stays locked. Raises JournalError when that fails."""
        if not self._finished:
            self._finished = True
            while self._thread.is_alive():
                try:
                    self._queue.put(None, timeout=1.0)
                    break
                except queue.Full:
                    continue
            self._thread.join()
        self._raise_error()

    def close(self) -> None:
        """Writes what is left, and lets go of the file. Raises JournalError when the former fails."""
        try:
            self.finish()
        finally:
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except JournalError:
            if error is None:
                raise

    def _raise_error(self) -> None:
        if (error := self._error) is not None:
            raise JournalError(
                f"{self.path}: {error.strerror or error}; {self.synced} results are safe: make room, and start the "
                "same command again"
            ) from error

    # -- the thread

    def _write_all(self) -> None:
        try:
            open_ = True
            while open_:
                batch, open_ = self._gather()
                if batch:
                    self._append(batch)
        except OSError as error:
            self._error = error

    def _gather(self) -> tuple[list[bytes], bool]:
        """What has come within SYNC_SECONDS after the first, and whether more may come."""
        first = self._queue.get()
        if first is None:
            return [], False
        batch, until, size = [first], time.monotonic() + SYNC_SECONDS, len(first)
        while len(batch) < QUEUE_RECORDS and size < QUEUE_BYTES // 2:
            try:
                item = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if item is None:
                return batch, False
            batch.append(item)
            size += len(item)
        return batch, True

    def _append(self, batch: list[bytes]) -> None:
        before = os.fstat(self._file.fileno()).st_size
        data = memoryview(b"".join(batch))
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), before)  # no torn line stays where it can be helped
            raise
        self.synced += len(batch)
        self._written += sum(map(len, batch))


def _locked(path: Path) -> Any:
    """The file, open to append; no other process has it."""
    while True:
        file = open_to_append(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise ConfigError(f"--output: {path} is being written by another process") from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # between the two lines another process has put a new file there, or none


def _check_manifest(path: Path, manifest: Manifest, allow_changed: bool) -> bool | None:
    """Whether the run that is there is another one; None when there is none. Raises ConfigError unless it may be
    continued."""
    beside, begun = manifest_path(path), path.stat().st_size > 0
    if begun and not beside.exists():
        raise ConfigError(f"--output: {path} exists and has no manifest beside it; name a new file, or use --restart")
    if begun:
        changed = Manifest.read(beside).differences(manifest)
        if changed and not allow_changed:
            raise ConfigError(
                f"--output: {path} holds results of another run: {'; '.join(changed)}; accepted: the same again, "
                "--allow-changed to keep the results of requests that are still there, or --restart to put all aside"
            )
        return bool(changed)
    return None


class Pairing(Protocol):
    """The requests of a run."""

    def number(self, record: dict[str, Any]) -> int | None:
        """Of the request that a record answers, each once; None when there is none."""
        ...

    def is_known(self, record: dict[str, Any]) -> bool:
        """Whether there is a request of the record's name, which may ask something else now."""
        ...

    def renumbered(self, record: dict[str, Any], number: int) -> dict[str, Any]: ...


def _pair(path: Path, manifest: Manifest, requests: Pairing) -> str | None:
    """Gives the results of a changed run to the requests of this one, and puts the file aside where some answer none.

    A kill at any moment leaves a manifest that is no run's, so that only --allow-changed goes on, and pairs again.
    """
    temporary, kept, changed, gone = path.with_name(path.name + ".part"), 0, 0, 0
    with open(path, "rb") as file, create(temporary) as out:
        for count, line in enumerate(file, start=1):
            try:
                record = parse_json(line.decode("utf-8"))
                number = requests.number(record)
                known = number is None and requests.is_known(record)
                renumbered = None if number is None else requests.renumbered(record, number)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(
                    f"--output: line {count} of {path} is damaged; "
                    "repair it, or use --restart, which puts the file aside"
                ) from None
            if renumbered is None:
                changed, gone = changed + known, gone + (not known)
            else:
                kept += 1
                out.write(json.dumps(renumbered, ensure_ascii=False).encode(*UTF8) + b"\n")
        out.flush()
        os.fsync(out.fileno())
    unfinished = {**manifest.identity, "results": "of another run; --allow-changed was interrupted"}
    old = None
    if changed or gone:
        old = _old_name(path)
        for source, copy in ((path, old), (manifest_path(path), manifest_path(old))):
            with open(source, "rb") as file, create(copy) as out:
                shutil.copyfileobj(file, out)
    Manifest(manifest.kind, unfinished).write(manifest_path(path))
    os.replace(temporary, path)
    if old is None:
        return None
    return (
        f"{kept} results kept; of {changed} the request has changed and is answered again, of {gone} it is gone; "
        f"the file as it was: {old}"
    )


def _scan(path: Path, file: Any) -> tuple[NumberSet, int]:
    """The numbers that have a record, and how many are errors; cuts off what a kill or a power cut left unfinished at
    the end."""
    done = NumberSet()
    good = bad_at = errors = 0
    bad_line: int | None = None
    with open(path, "rb") as reader:
        for count, line in enumerate(reader, start=1):
            number = record_number(line)
            if number is not None and bad_line is not None:
                raise ConfigError(
                    f"--output: line {bad_line} of {path} (byte {bad_at}) is no result, though results follow; "
                    "repair it, or use --restart, which puts the file aside"
                )
            if number is None:
                bad_line, bad_at = (count, good) if bad_line is None else (bad_line, bad_at)
                continue
            if not done.add(number):
                raise ConfigError(
                    f"--output: line {count} of {path} is the second result of request {number}; "
                    "remove it, or use --restart, which puts the file aside"
                )
            errors += is_error(line)
            good += len(line)
    if bad_line is not None:
        os.ftruncate(file.fileno(), good)
        os.fsync(file.fileno())
    return done, errors


def _put_aside(path: Path) -> None:
    if not path.exists() and not manifest_path(path).exists():
        return
    old = _old_name(path)
    if path.exists():
        os.rename(path, old)
    if manifest_path(path).exists():
        os.rename(manifest_path(path), manifest_path(old))


def _old_name(path: Path) -> Path:
    """The first free name for a file that is put aside with its manifest."""
    number = 1
    while any(map(os.path.lexists, (old := path.with_name(f"{path.name}.old-{number}"), manifest_path(old)))):
        number += 1
    return old
