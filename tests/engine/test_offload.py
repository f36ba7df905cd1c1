"""Pages outside the device: what was put comes back bit for bit or not at all, within the bounds, and nobody waits."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanoflow_jax.engine import offload
from nanoflow_jax.engine.offload import OffloadStore
from tests.engine.offloaded import PAGE_BYTES, PLENTY, check_get, files_in, flush, key_of, page_of, put

# -- bounds and order


class _Against(RuleBasedStateMachine):
    """Anything in any order, against a model: two lists of page numbers, the one unused longest first."""

    store_class: type[OffloadStore] = OffloadStore
    numbers = st.lists(st.integers(0, 9), max_size=6)

    @initialize(host=st.integers(0, 4), disk=st.integers(0, 4))
    def make(self, host: int, disk: int) -> None:
        self.host_room, self.disk_room = host, disk
        file = len(_file_of_one_page())
        self.host_bytes, self.disk_bytes = host * PAGE_BYTES + 7, disk * file + 7 if disk else 0
        self.store = self.store_class(self.host_bytes, self.disk_bytes)
        self.host: list[int] = []
        self.disk: list[int] = []
        self.dropped = self.put_pages = 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()

    def _use(self, number: int) -> None:
        for place in (self.host, self.disk):
            if number in place:
                place.remove(number)
                place.append(number)

    def _shrink(self) -> None:
        cut = max(0, len(self.host) - self.host_room)
        gone, self.host = self.host[:cut], self.host[cut:]
        for number in [n for n in gone if n not in self.disk]:  # written after all of them have left the host
            self.disk.append(number)
            if len(self.disk) > self.disk_room and self.disk.pop(0) not in self.host:
                self.dropped += 1

    @rule(numbers=numbers)
    def put(self, numbers: list[int]) -> None:
        put(self.store, numbers)
        here = {*self.host, *self.disk}
        for number in numbers:
            if number in here:
                self._use(number)
        new = [n for n in dict.fromkeys(numbers) if n not in here]
        self.put_pages += len(new)
        self.host += new
        self._shrink()
        flush(self.store)

    @rule(data=st.data(), then=numbers)
    def get(self, data: st.DataObject, then: list[int]) -> None:
        here = sorted({*self.host, *self.disk})
        numbers = data.draw(st.lists(st.sampled_from(here), max_size=4)) + then[:1] if here else then
        there = [n in self.host or n in self.disk for n in numbers]
        length = (*there, False).index(False)
        assert self.store.count([key_of(n) for n in numbers]) == length
        assert check_get(self.store, numbers) == length
        for number in reversed(numbers[:length]):
            if number not in self.host:
                self.host.append(number)
            self._use(number)
        self._shrink()
        flush(self.store)

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.host, self.disk = [], []

    @invariant()
    def same_pages(self) -> None:
        here = [n for n in range(10) if self.store.count([key_of(n)])]
        assert here == sorted({*self.host, *self.disk})
        assert self.store.stats.dropped_pages == self.dropped
        assert self.store.stats.put_pages == self.put_pages

    @invariant()
    def within_bounds(self) -> None:
        assert sum(page.nbytes for page in self.store._host.values()) <= self.host_bytes
        if self.disk_bytes:
            files = files_in(self.store._files._folder)
            assert sum(path.stat().st_size for path in files) <= self.disk_bytes
            assert len(files) == len(self.disk)


def _file_of_one_page() -> bytes:
    with closing(OffloadStore(1, PLENTY)) as store:
        put(store, [0])
        flush(store)
        return files_in(store._files._folder)[0].read_bytes()


class _ForgetsUse(OffloadStore):
    def _touch(self, key: bytes) -> None:
        pass


class _OnePageTooMany(OffloadStore):
    def _shrink(self, limit: int) -> None:
        super()._shrink(limit + PAGE_BYTES)


RANDOM = settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)


def test_bounds_and_order() -> None:
    run_state_machine_as_test(_Against, settings=RANDOM)


@pytest.mark.parametrize("broken", [_ForgetsUse, _OnePageTooMany])
def test_bounds_and_order_can_fail(broken: type[OffloadStore]) -> None:
    class _Broken(_Against):
        store_class = broken

    quick = settings(RANDOM, phases=[Phase.generate], report_multiple_bugs=False, print_blob=False)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(_Broken, settings=quick)


def test_room_is_made_before_pages_come(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(OffloadStore(3 * PAGE_BYTES)) as store:
        put(store, [0, 1, 2])
        start_copy, rooms = store._start_copy, []

        def record(page: jax.Array) -> jax.Array:
            rooms.append(3 - store._host_used // PAGE_BYTES)
            return start_copy(page)

        monkeypatch.setattr(store, "_start_copy", record)
        put(store, [3, 4])
        assert rooms == [2, 1]
        assert [store.count([key_of(n)]) for n in range(5)] == [0, 0, 1, 1, 1]


# -- contents


def _force_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_pinned_sharding", lambda page: page.sharding.with_memory_kind(offload.PINNED))


@pytest.mark.parametrize("place", ["host", "settled", "pinned", "disk"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float32])
def test_bits_come_back(place: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "pinned":
        _force_pinned(monkeypatch)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec(None, None, "x"))
    rng = np.random.default_rng(0)
    pages = [rng.integers(0, 256, PAGE_BYTES, np.uint8).view(jnp.dtype(dtype)).reshape(2, 2, 8, -1, 2) for _ in "ab"]
    keys = [key_of(0), key_of(1)]
    with closing(OffloadStore(1 if place == "disk" else PLENTY, PLENTY)) as store:
        store.put(keys, [jax.device_put(page, sharding) for page in pages])
        if place == "settled":
            jax.block_until_ready(list(store._in_flight.values()))
            store.put([], [])
            assert not store._in_flight and all(isinstance(page, np.ndarray) for page in store._host.values())
        if place == "disk":
            flush(store)
        found = store.get(keys)
        assert len(found) == 2
        for page, there, back in zip(pages, found, jax.device_put(found, sharding), strict=True):
            assert isinstance(there, jax.Array) == (place == "pinned")
            host: np.ndarray = np.asarray(there)
            assert host.dtype == page.dtype and host.shape == page.shape
            assert host.tobytes() == page.tobytes() == np.asarray(back).tobytes()
            assert back.sharding == sharding
            with pytest.raises(ValueError, match="read-only"):
                host[0] = host[1]
        restored = store.stats.from_disk_pages if place == "disk" else store.stats.from_host_pages
        assert restored == 2


def test_a_page_from_disk_is_in_host_memory_then(tmp_path: Path) -> None:
    with closing(OffloadStore(PAGE_BYTES, PLENTY, tmp_path)) as store:
        put(store, [0, 1])
        flush(store)
        assert [check_get(store, [0]), check_get(store, [0])] == [1, 1]
        stats = store.stats
        assert (stats.from_disk_pages, stats.from_host_pages) == (1, 1)


def test_no_pinned_memory_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    with closing(OffloadStore(PLENTY)) as store:
        pages = [page_of(0), page_of(1)]
        _force_pinned(monkeypatch)
        monkeypatch.setattr(offload.jax, "device_put", fails)
        store.put([key_of(0), key_of(1)], pages)
        monkeypatch.undo()
        assert check_get(store, [0, 1]) == 2
    assert caplog.text.count("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB") == 1


# -- not waiting


@pytest.fixture
def unfinished() -> Iterator[tuple[list[jax.Array], threading.Event]]:
    """Pages 0 to 3, whose computation ends when the event is set."""
    finish = threading.Event()
    mesh, spec = Mesh(np.array(jax.devices()), ("x",)), PartitionSpec(None, None, "x")
    part = jax.ShapeDtypeStruct((2, 2, 1, 4, 2), jnp.float32)

    def wait(_: Any) -> np.ndarray:
        assert finish.wait(30)
        return np.zeros(part.shape, part.dtype)

    def slow(pages: list[jax.Array]) -> list[jax.Array]:
        zero = jax.pure_callback(wait, part, pages[0])
        return [page + zero for page in pages]

    inputs = [jax.device_put(page_of(n), NamedSharding(mesh, spec)) for n in range(4)]
    pages = jax.jit(jax.shard_map(slow, mesh=mesh, in_specs=spec, out_specs=spec))(inputs)
    yield pages, finish
    finish.set()
    jax.block_until_ready(pages)


@pytest.mark.parametrize("pinned", [False, True])
def test_put_does_not_wait_for_the_pages(unfinished: Any, pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pinned:
        _force_pinned(monkeypatch)
    pages, finish = unfinished
    with closing(OffloadStore(PLENTY, PLENTY)) as store:
        store.put([key_of(0)], pages[:1])
        assert not pages[0].is_ready(), "put has waited"
        assert store.count([key_of(0)]) == 1
        finish.set()
        assert check_get(store, [0]) == 1


ENDS = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from nanoflow_jax.engine.offload import OffloadStore

whole = NamedSharding(jax.make_mesh((2,), ("tp",)), PartitionSpec())
page = jax.device_put(np.full((1500, 1500), 1e-3, np.float32), whole)
double = jax.jit(lambda x: x @ x, out_shardings=whole)
for _ in range(8):
    page = double(page)
store = OffloadStore(2**30)
store.put(["a page"], [page])
"""


def test_a_process_may_end_while_pages_come() -> None:
    """XLA's thread that copies one would find no interpreter, and abort."""
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


def test_pages_in_flight_are_bounded(unfinished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PAGES_IN_FLIGHT", 2)
    pages, finish = unfinished
    with closing(OffloadStore(PLENTY)) as store:
        store.put([key_of(n) for n in range(3)], pages[:3])
        store.put([key_of(3)], pages[3:])
        assert [store.count([key_of(n)]) for n in range(4)] == [0, 1, 1, 0]
        assert store.stats.dropped_pages == 2 and store.stats.put_pages == 2
        finish.set()
        jax.block_until_ready(pages)
        store.put([key_of(3)], pages[3:])
        assert check_get(store, [1, 2, 3]) == 3
        assert len(store._in_flight) == 1, "pages that have arrived must not stay on the device"


def test_only_missing_pages_are_asked_for(unfinished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as have room on their way, the last ones; those that are here become the ones used last."""
    monkeypatch.setattr(offload, "PAGES_IN_FLIGHT", 2)
    pages, finish = unfinished
    with closing(OffloadStore(2 * PAGE_BYTES)) as store:
        put(store, [0, 1])
        jax.block_until_ready(list(store._in_flight.values()))
        assert store.missing([key_of(n) for n in (2, 0, 3, 4)]) == [2, 3]
        assert store.stats.dropped_pages == 1
        store.put([key_of(3)], pages[:1])
        assert [store.count([key_of(n)]) for n in (0, 1, 3)] == [1, 0, 1], "the page not asked for goes first"
        assert store.missing([key_of(n) for n in (4, 5)]) == [1]
        finish.set()
        jax.block_until_ready(pages)
        assert store.missing([key_of(n) for n in (4, 5)]) == [0, 1]


def test_pages_that_never_arrive() -> None:
    with closing(OffloadStore(PLENTY, PLENTY)) as store:
        pages = [page_of(0), page_of(1), page_of(2)]
        store.put([key_of(0), key_of(1), key_of(2)], pages)
        pages[1].delete()
        assert check_get(store, [0, 1, 2]) == 1
        assert [store.count([key_of(n)]) for n in range(3)] == [1, 0, 1]
        store.put([key_of(3)], pages[1:2])
        with store._lock:
            assert store._files.offer(key_of(4), pages[1])
        flush(store)
        assert store.count([key_of(3)]) == store.count([key_of(4)]) == 0
        assert store.stats.failed_copies == 3
        assert check_get(store, [2]) == 1


# -- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"host_bytes": 0}, r"host_bytes: 0; accepted: a positive"),
        ({"host_bytes": 1.5}, r"host_bytes: 1\.5; accepted"),
        ({"folder": __file__, "disk_bytes": 1}, r"folder: '.*test_offload\.py' cannot be used"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OffloadStore(**{"host_bytes": PLENTY, **arguments})
