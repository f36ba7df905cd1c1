"""Pages of KV in files, one each, in a private folder: written in the background, checked in full when read.

Only the process that wrote a file reads it, and knows what must be there: so many bytes with that CRC-32.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from nanoflow_jax.engine.pages import Key

PAGES_TO_WRITE = 16  # that wait in memory; the next ones are refused
READERS = 4  # threads that read and check files at the same time

PREFIX = "nanoflow-kv-"  # of the folders' names

logger = logging.getLogger("nanoflow_jax")

Contents = np.ndarray | jax.Array
COPY_ERRORS = (RuntimeError, MemoryError)  # computing the page failed, or there is no memory for its copy


@dataclass
class OffloadStats:
    """Counts since the store was made."""

    put_pages: int = 0
    from_host_pages: int = 0  # restored, and from disk
    from_disk_pages: int = 0
    dropped_pages: int = 0  # for lack of room, on the host, on the disk or on the way there
    failed_copies: int = 0  # pages that never arrived at the host
    damaged_files: int = 0  # found damaged, truncated or missing
    write_errors: int = 0


@dataclass(frozen=True)
class _File:
    checksum: int
    dtype: np.dtype
    shape: tuple[int, ...]
    size: int  # bytes

    def read(self, path: Path) -> np.ndarray | None:
        """The contents, or None when the file is not exactly what was written."""
        bits = np.empty(self.size, np.uint8)
        try:
            with open(path, "rb") as file:
                if file.readinto(bits) != self.size or file.read(1):
                    return None
        except OSError:
            return None
        if zlib.crc32(bits) != self.checksum:
            return None
        bits.flags.writeable = False
        return bits.view(self.dtype).reshape(self.shape)


class PageFiles:
    """Pages by key, in at most `max_bytes` of files (0: it takes none); the one not written or read for longest goes
    first.

    folder       where the private folder is made, and those of killed processes are removed; None: among the system's
                 temporary files
    lock         must be held by callers, except of `close`; its thread waits on it too
    on_evict     called, with the lock held, for a page that goes for lack of room
    on_failure   called, with the lock held, for a page whose contents never arrived at the host

    Raises ValueError when the folder cannot be used.
    """

    def __init__(
        self,
        max_bytes: int,
        folder: str | Path | None,
        stats: OffloadStats,
        lock: threading.Condition,
        on_evict: Callable[[Key], None],
        on_failure: Callable[[Key], None],
    ) -> None:
        self._max, self._stats, self._lock = max_bytes, stats, lock
        self._on_evict, self._on_failure = on_evict, on_failure
        self._queue: OrderedDict[Key, Contents] = OrderedDict()
        self._files: OrderedDict[Key, _File] = OrderedDict()  # the first goes first
        self._used = 0  # bytes of these, and of the one being written
        self._closed = self._warned = False
        if not max_bytes:
            return
        try:
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
            remove_leftovers(Path(folder or tempfile.gettempdir()))
            self._folder, self._owned = _make_folder(folder)
        except OSError as error:
            raise ValueError(f"folder: {str(folder)!r} cannot be used ({error}); accepted: one to write in") from error
        self._readers = ThreadPoolExecutor(READERS, "kv-page-reader")
        self._writer = threading.Thread(target=self._write_queued, name="kv-page-writer", daemon=True)
        self._writer.start()

    def __contains__(self, key: Key) -> bool:
        return key in self._queue or key in self._files

    def touch(self, key: Key) -> None:
        if key in self._files:
            self._files.move_to_end(key)

    def queued(self, key: Key) -> Contents | None:
        """Contents of a page that waits to be written."""
        return self._queue.get(key)

    def offer(self, key: Key, contents: Contents) -> bool:
        """True: the page is here, or will be unless writing fails. False: there is no room for it."""
        if key in self:
            return True
        if len(self._queue) >= PAGES_TO_WRITE or contents.nbytes > self._max:
            return False
        self._queue[key] = contents
        self._lock.notify_all()
        return True

    def withdraw(self, key: Key) -> None:
        """A page is not to be written after all."""
        self._queue.pop(key, None)
        self._lock.notify_all()

    def read(self, keys: Iterable[Key]) -> dict[Key, np.ndarray]:
        """Contents, read-only, of those written pages whose files are whole; the others are forgotten."""
        files = {key: self._files[key] for key in keys}
        if not files:
            return {}
        found = {}
        pages = self._readers.map(lambda key: files[key].read(self._path(key)), files)
        for key, page in zip(files, pages, strict=True):
            if page is None:
                self._stats.damaged_files += 1
                self._used -= self._files.pop(key).size
                _unlink(self._path(key))
            else:
                found[key] = page
        return found

    def clear(self) -> None:
        self._queue.clear()
        for key, file in self._files.items():
            self._used -= file.size
            _unlink(self._path(key))
        self._files.clear()
        self._lock.notify_all()

    def close(self) -> None:
        """After `clear`, once: waits for the threads and removes the folder."""
        if not self._max:
            return
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._writer.join()
        self._readers.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._owned)

    def _path(self, key: Key) -> Path:
        return self._folder / key.hex()

    # -- the writer's thread

    def _write_queued(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                key, contents = next(iter(self._queue.items()))  # stays there, to be found, while it is written
            self._write(key, contents)

    def _write(self, key: Key, contents: Contents) -> None:
        try:
            bits = np.ascontiguousarray(np.asarray(contents)).reshape(-1).view(np.uint8)
        except COPY_ERRORS:
            with self._lock:
                if self._finish(key, contents):
                    self._on_failure(key)
            return
        file = _File(zlib.crc32(bits), contents.dtype, contents.shape, contents.nbytes)
        for path in self._make_room(file.size):
            _unlink(path)
        unfinished = self._path(key).with_suffix(".tmp")
        error: OSError | None = None
        try:
            with open(unfinished, "wb") as out:
                out.write(bits)
        except OSError as caught:
            error = caught
            _unlink(unfinished)  # before the page leaves the queue: then nothing is under way
        with self._lock:
            wanted = self._finish(key, contents)  # it may have been cleared away in the meantime
            if wanted and error is None:
                try:
                    unfinished.replace(self._path(key))
                    self._files[key] = file
                    return
                except OSError as caught:
                    error = caught
            self._used -= file.size
            if error is not None:
                self._failed(error)
            _unlink(unfinished)

    def _make_room(self, size: int) -> list[Path]:
        """Counts `size` bytes as used. Returns the files that must go for it."""
        gone = []
        with self._lock:
            self._used += size
            while self._used > self._max and self._files:
                key, file = self._files.popitem(last=False)
                self._used -= file.size
                self._on_evict(key)
                gone.append(self._path(key))
        return gone

    def _finish(self, key: Key, contents: Contents) -> bool:
        """Takes a page out of the queue. False: it was not there any more."""
        there = self._queue.get(key) is contents
        if there:
            del self._queue[key]
        self._lock.notify_all()
        return there

    def _failed(self, error: OSError) -> None:
        self._stats.write_errors += 1
        if not self._warned:
            self._warned = True
            logger.warning(
                "KV offload: a page could not be written to %s (%s); such pages are computed again. Said once.",
                self._folder,
                error,
            )


def _make_folder(parent: str | Path | None) -> tuple[Path, int]:
    """A new private folder, and the descriptor that holds its lock: the system frees it when this process ends, however
    it ends."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))
        descriptor = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks: nobody can take it for a leftover there
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.exists():
            return folder, descriptor
        os.close(descriptor)  # another process has removed it before it was locked


def remove_leftovers(parent: Path) -> None:
    """Removes the folders of processes that were killed. Those of living ones are locked."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.getuid():
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.debug("KV offload: %s stays behind (%s)", path, error)
