"""Where KV pages go when the device needs their place: to host memory, and from there to disk.

A page that is found here again is copied back instead of being computed again. Both places are bounded, and in both the
page unused longest goes first: from the host to the disk, from the disk for good. What goes wrong on the way (no room,
a full disk, a damaged file) costs a page and never more: the page is not here, and is computed again.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Sharding

from nanoflow_jax.engine.page_files import COPY_ERRORS, Contents, OffloadStats, PageFiles
from nanoflow_jax.engine.pages import Key

PAGES_IN_FLIGHT = 128  # pages on their way to the host, which still take device memory; more at a time are dropped
PINNED = "pinned_host"

logger = logging.getLogger("nanoflow_jax")


def _wait_for_copies(pages: dict[Key, jax.Array]) -> None:
    """A process that ends during one would abort in XLA's threads."""
    for page in list(pages.values()):
        with contextlib.suppress(*COPY_ERRORS):
            np.asarray(page)


class OffloadStore:
    """Pages of KV outside the device, by key: in host memory first, then on disk; each bounded, the one unused longest
    goes first.

    host_bytes   at most these in host memory, where up to `page_files.PAGES_TO_WRITE` pages may wait for the disk
                 besides. On GPUs it is pinned memory while XLA has some: 64 GiB, or what
                 XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says.
    disk_bytes   at most these in files; 0: no disk
    folder       where a private folder for the files is made; None: among the system's temporary files

    For use by one thread; a second one, its own, writes files. Raises ValueError for an argument that cannot be.
    """

    def __init__(self, host_bytes: int, disk_bytes: int = 0, folder: str | Path | None = None) -> None:
        if not isinstance(host_bytes, int) or host_bytes < 1:
            raise ValueError(f"host_bytes: {host_bytes!r}; accepted: a positive number of bytes")
        self.stats = OffloadStats()
        self._host_max, self._host_used = host_bytes, 0
        self._host: OrderedDict[Key, Contents] = OrderedDict()  # the first goes first
        self._in_flight: dict[Key, jax.Array] = {}  # in the order in which their copies began
        self._lock = threading.Condition()
        self._files = PageFiles(disk_bytes, folder, self.stats, self._lock, self._left_disk, self._failed)
        self._closed = self._warned = False
        self._wait = weakref.finalize(self, _wait_for_copies, self._in_flight)  # called when the process ends, too
        if disk_bytes:
            atexit.register(self.close)

    def put(self, keys: Sequence[Key], contents: Sequence[jax.Array]) -> None:
        """Starts the copy of pages to the host and returns at once, also while they are still being computed.

        keys      a key that is here already is skipped
        contents  one array per page, [layers, 2 (K, V), KV groups, page_size, d]; not to be donated afterwards
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the offload store is closed")
            new = {keys[i]: contents[i] for i in self.missing(keys)}
            self._shrink(self._host_max - sum(page.nbytes for page in new.values()))
            for key, page in new.items():
                self.stats.put_pages += 1
                try:
                    copy = self._start_copy(page)
                except COPY_ERRORS:
                    self._failed(key)
                    continue
                self._in_flight[key] = copy
                self._insert(key, copy)
            self._shrink(self._host_max)

    def missing(self, keys: Sequence[Key]) -> list[int]:
        """Positions of the keys whose pages `put` would take now. Those that are here count as used; those for which
        there is no room on the way count as dropped, the first ones first."""
        with self._lock:
            self._settle()
            new = []
            for i, key in enumerate(keys):
                if self._has(key):
                    self._touch(key)
                else:
                    new.append(i)
            # The pool evicts the page used last as the last one: those are worth more.
            too_many = max(0, len(new) + len(self._in_flight) - PAGES_IN_FLIGHT)
            self.stats.dropped_pages += min(too_many, len(new))
            return new[too_many:]

    def count(self, keys: Sequence[Key]) -> int:
        """How many of `keys`, from the first on, are here. No I/O."""
        with self._lock:
            return next((i for i, key in enumerate(keys) if not self._has(key)), len(keys))

    def get(self, keys: Sequence[Key]) -> list[Contents]:
        """Contents, to read alone, of the longest run of `keys`, from the first on, that can be read; fewer than
        `count` said when a file is damaged or gone, or a page never arrived. A page in pinned memory is given as the
        jax.Array there, without a copy."""
        with self._lock:
            run = keys[: self.count(keys)]
            in_memory = {key: self._host.get(key, self._files.queued(key)) for key in run}
            read = self._files.read([key for key, page in in_memory.items() if page is None])
            found: list[Contents] = []
            for key in run:
                if (page := in_memory[key]) is None:
                    if (page := read.get(key)) is None:
                        break
                    self.stats.from_disk_pages += 1
                else:
                    if (page := self._arrived(key, page)) is None:
                        break
                    self.stats.from_host_pages += 1
                found.append(page)
            # The first page is made the one used last: without it the others are of no use.
            for key, page in reversed(list(zip(run, found, strict=False))):
                self._insert(key, page)
                self._touch(key)
            self._shrink(self._host_max)
            return found

    def clear(self) -> None:
        """Forgets all pages."""
        with self._lock:
            self._host.clear()
            self._host_used = 0
            self._in_flight.clear()
            self._files.clear()

    def close(self) -> None:
        """Forgets all pages, waits for the writer and removes the files. The second time it does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wait()
            self.clear()
        self._files.close()
        atexit.unregister(self.close)

    # -- all of these with the lock held

    def _has(self, key: Key) -> bool:
        return key in self._host or key in self._files

    def _touch(self, key: Key) -> None:
        if key in self._host:
            self._host.move_to_end(key)
        self._files.touch(key)

    def _insert(self, key: Key, contents: Contents) -> None:
        """As the page used last, in place of what the host has under this key."""
        self._remove(key)
        self._host[key] = contents
        self._host_used += contents.nbytes

    def _remove(self, key: Key) -> None:
        if (contents := self._host.pop(key, None)) is not None:
            self._host_used -= contents.nbytes

    def _shrink(self, limit: int) -> None:
        while self._host_used > limit and self._host:
            key, contents = self._host.popitem(last=False)
            self._host_used -= contents.nbytes
            if not self._files.offer(key, contents):
                self._in_flight.pop(key, None)
                self.stats.dropped_pages += 1

    def _left_disk(self, key: Key) -> None:
        if key not in self._host:
            self.stats.dropped_pages += 1

    def _failed(self, key: Key) -> None:
        self.stats.failed_copies += 1
        self._in_flight.pop(key, None)
        self._remove(key)
        self._files.withdraw(key)

    def _start_copy(self, page: jax.Array) -> jax.Array:
        """The page in pinned memory, or the page itself on its way to ordinary memory."""
        if (pinned := _pinned_sharding(page)) is not None:
            try:
                return jax.device_put(page, pinned)
            except COPY_ERRORS as error:
                if not self._warned:
                    self._warned = True
                    logger.warning(
                        "KV offload: no pinned host memory is left, slower memory is used "
                        "(XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB sets how much there is): %s",
                        error,
                    )
        page.copy_to_host_async()
        return page

    def _settle(self) -> None:
        """Lets go of the device's copies of pages that have arrived."""
        while self._in_flight:
            key, page = next(iter(self._in_flight.items()))
            try:
                if not page.is_ready():  # pyright: ignore[reportAttributeAccessIssue]  (not in JAX's stub)
                    return
                settled = page if _is_pinned(page) else np.asarray(page)
            except COPY_ERRORS:
                self._failed(key)
                continue
            del self._in_flight[key]
            if self._host.get(key) is page:
                self._host[key] = settled

    def _arrived(self, key: Key, page: Contents) -> Contents | None:
        """The page once its copy has arrived; waits for it. None, and the page is gone, when that failed."""
        if isinstance(page, np.ndarray):
            return page
        try:
            page.block_until_ready()
            return page if _is_pinned(page) else np.asarray(page)
        except COPY_ERRORS:
            self._failed(key)
            return None


def _pinned_sharding(page: jax.Array) -> Sharding | None:
    """Pinned host memory beside the devices of `page`, where they are GPUs that have it."""
    device = next(iter(page.sharding.device_set))
    if device.platform == "gpu" and any(memory.kind == PINNED for memory in device.addressable_memories()):
        return page.sharding.with_memory_kind(PINNED)
    return None


def _is_pinned(page: jax.Array) -> bool:
    return page.sharding.memory_kind == PINNED
