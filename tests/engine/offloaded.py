"""Pages whose contents tell their numbers, for the tests of the offload store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from nanoflow_jax.engine.offload import OffloadStore

SHAPE = (2, 2, 8, 4, 2)  # layers, K and V, KV groups, page_size, d
PAGE_BYTES = 4 * 2 * 2 * 8 * 4 * 2
PLENTY = 1 << 30


def key_of(number: int) -> bytes:
    return b"key" + number.to_bytes(2, "big")


def page_of(number: int) -> jax.Array:
    return jax.device_put(np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE) + np.float32(1000 * number))


def put(store: OffloadStore, numbers: Sequence[int]) -> None:
    store.put([key_of(n) for n in numbers], [page_of(n) for n in numbers])


def check_get(store: OffloadStore, numbers: Sequence[int]) -> int:
    """How many come back; each must be what was put under its key."""
    found = store.get([key_of(n) for n in numbers])
    for number, page in zip(numbers, found, strict=False):
        np.testing.assert_array_equal(page, np.asarray(page_of(number)))
    return len(found)


def flush(store: OffloadStore) -> None:
    """Waits until nothing is on its way to the disk."""
    with store._lock:
        assert store._lock.wait_for(lambda: not store._files._queue, timeout=60)


def file_of(folder: Path, number: int) -> Path:
    (path,) = folder.glob(f"*/{key_of(number).hex()}")
    return path


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
