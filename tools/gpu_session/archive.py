"""Folders as archives of a few files, which is what a lent machine gives back: whole at every moment, and split where
they are large."""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

from nanoflow_jax.system.output_files import create

PART_BYTES = 15 * 10**6
EVERY = 15.0  # seconds


def packed(folder: Path, most: int | None = None) -> bytes:
    """The folder's files as a tar archive. most: bytes of files, the newest first; what is beyond that is left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part"]
    if most is not None:
        files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    found, size = io.BytesIO(), 0
    with tarfile.open(fileobj=found, mode="w:gz", compresslevel=3) as archive:
        for path in files:
            try:
                data = path.read_bytes()
            except FileNotFoundError:  # replaced by its writer just now
                continue
            size += len(data) + 1024
            if most is None or size <= most:
                info = tarfile.TarInfo(str(path.relative_to(folder)))
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return found.getvalue()


def replace(path: Path, data: bytes) -> None:
    """Writes a file in one step: whoever reads it finds the last one, or this."""
    draft = path.with_name(path.name + ".part")
    with create(draft) as file:
        file.write(data)
    os.replace(draft, path)


def write(data: bytes, folder: Path, name: str) -> None:
    """`NAME.tar.gz` of the folder, replaced in one step; more than PART_BYTES are NAME.GENERATION.K-of-N.

    At every moment the last data or these are there: older files go once all of the new ones are whole.
    """
    count = max(1, -(-len(data) // PART_BYTES))
    old = [path for path in folder.iterdir() if re.fullmatch(rf"{name}\.(\d+\.\d+-of-\d+|tar\.gz)", path.name)]
    new = [folder / f"{name}.tar.gz"]
    if count > 1:
        last = max((int(path.name.split(".")[1]) for path in old if path.suffix != ".gz"), default=0)
        new = [folder / f"{name}.{last + 1}.{k}-of-{count}" for k in range(1, count + 1)]
    for k, path in enumerate(new):
        replace(path, data[k * PART_BYTES : (k + 1) * PART_BYTES])
    for path in set(old) - set(new):
        path.unlink()


def read(folder: Path, name: str) -> bytes | None:
    """What `write` wrote there, or None: the newest generation that is whole."""
    sets: dict[int, dict[int, Path]] = {}
    for path in folder.iterdir():
        if match := re.fullmatch(rf"{name}\.(\d+)\.(\d+)-of-(\d+)", path.name):
            generation, k, count = map(int, match.groups())
            sets.setdefault(generation, {0: Path(str(count))})[k] = path
    for _, found in sorted(sets.items(), reverse=True):
        count = int(found.pop(0).name)
        if set(found) == set(range(1, count + 1)):
            return b"".join(found[k].read_bytes() for k in sorted(found))
    whole = folder / f"{name}.tar.gz"
    return whole.read_bytes() if whole.exists() else None


def unpack(data: bytes, folder: Path) -> None:
    """Adds the archive's files to the folder, which is made private when it is not there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        archive.extractall(folder, filter="data")


def emptied(folder: Path) -> Path:
    """The folder, private and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    return folder


class Renewed:
    """Calls `renew` every EVERY seconds and at its end, in a thread of its own, and whenever `now` asks. Use as a
    context manager."""

    def __init__(self, renew: Callable[[], None], every: float = EVERY):
        self._renew, self._every = renew, every
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def now(self) -> None:
        with self._lock:
            self._renew()

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            self.now()

    def __enter__(self) -> Renewed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.now()
