"""Messages between the processes of a replica, agreement, and the watchdog."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from nanoflow_jax.config import ConfigError
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.parallel import processes
from nanoflow_jax.parallel.mesh import make_mesh
from nanoflow_jax.parallel.processes import Processes, Watchdog
from nanoflow_jax.weights.hub import EMBEDDED
from tests.parallel.fake_service import FakeService


def member(service: FakeService, rank: int, count: int = 2) -> Processes:
    """A process without its watchdog."""
    found = Processes.__new__(Processes)
    found._client, found.rank, found.count, found.peer_timeout = service, rank, count, 1
    found._sent = found._forgotten = found._received = found._exchanges = 0
    found._watchdog = Watchdog(service, rank, count, 1)
    return found


def test_messages_arrive_in_order_whole_and_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PART", 10)  # characters
    service = FakeService()
    leader, follower = member(service, 0), member(service, 1)
    wanted = [{"step": list(range(n)), "text": "ü" * n} for n in (0, 1, 40)]
    for i, message in enumerate(wanted):
        assert leader.send(message) == i
    assert [follower.receive() for _ in wanted] == wanted
    leader.forget(1)
    assert {key.split("/")[2] for key in service.values} == {"2"}
    leader.forget(1)
    leader.forget(2)
    assert not service.values


def test_receiving_waits_for_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "POLL_MS", 20)
    service = FakeService()
    leader, follower = member(service, 0), member(service, 1)
    later = threading.Timer(0.1, leader.send, [{"end": 0}])
    later.start()
    assert follower.receive() == {"end": 0}
    later.join()


def test_agreement_names_the_process_that_differs() -> None:
    service = FakeService()
    members = [member(service, rank, 3) for rank in range(3)]
    errors: dict[int, str] = {}

    def agree(which: Processes) -> None:
        which.agree("jax", "1")  # all alike
        try:
            which.agree("model", "b" if which.rank == 2 else "a")
        except ConfigError as error:
            errors[which.rank] = str(error)

    threads = [threading.Thread(target=agree, args=[m]) for m in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    line = "model: process 2 has b and process 0 has a; all processes must have the same"
    assert errors == dict.fromkeys(range(3), line)


class Clock:
    """A watchdog's looks, one by one, at times that the test says."""

    def __init__(self, service: FakeService, rank: int = 0, count: int = 2, timeout: float = 10):
        self.dog = Watchdog(service, rank, count, timeout)

    def look(self, now: float) -> str | None:
        return self.dog._look(now)


def test_a_process_without_sign_of_life_is_gone_after_the_timeout() -> None:
    service = FakeService()
    first, second = Clock(service), Clock(service, rank=1)
    for now in (0, 9, 18, 27):
        assert second.look(now) is None and first.look(now) is None
    assert first.look(36) is None
    assert first.look(38) == "process 1 of 2 has given no sign of life for 10 s: it is gone"


def test_a_process_that_never_came_up_is_gone_too() -> None:
    clock = Clock(FakeService(), count=3)
    assert clock.look(0) is None
    assert clock.look(11) == "process 1 of 3 has given no sign of life for 10 s: it is gone"


def test_the_reason_of_a_process_that_ended_is_told_at_once() -> None:
    service = FakeService()
    first, second = Clock(service), Clock(service, rank=1)
    assert first.look(0) is None and second.look(0) is None
    second.dog.announce("model: no such folder")
    assert first.look(1) == "process 1 of 2 has ended: model: no such folder"


def test_a_step_that_does_not_end_is_told_though_all_live() -> None:
    service = FakeService()
    first, second = Clock(service), Clock(service, rank=1)
    first.dog.waiting_since = 0
    for now in range(0, 105, 5):
        second.look(now)
        reason = first.look(now)
        assert reason is None
    second.look(105)
    assert first.look(105) == "a step has not ended for 100 s, though all 2 processes live"


def test_the_thread_ends_the_process_when_the_service_is_lost() -> None:
    service, told = FakeService(), []
    dog = Watchdog(service, 1, 2, 0.4, told.append)
    dog.start()
    time.sleep(0.2)
    assert not told
    service.reachable = False
    dog.join(5)
    assert told == ["process 0 of 2 could not be reached for 0.4 s"]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("host:1", 2, None), "go together"),
        (("host", 2, 0), "must be HOST:PORT"),
        (("host:1", 2, 2), "process_id: 2 of 2 processes; accepted: 0 to 1"),
        ((None, None, None), "no SLURM, Kubernetes or Open MPI job was found"),
    ],
)
def test_joining_with_wrong_arguments_is_one_line(
    given: tuple[str | None, int | None, int | None], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def initialize(*_: object, **__: object) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    with pytest.raises(ConfigError, match=line) as caught:
        processes.join(*given)
    assert "\n" not in str(caught.value)
    assert processes.joined() is None


def test_no_process_is_left_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(EMBEDDED["tiny"] / "config.json")
    devices = [SimpleNamespace(process_index=i // 2) for i in range(4)]
    monkeypatch.setattr("jax.devices", lambda: devices)
    with pytest.raises(
        ConfigError, match=r"^tensor_parallel_size: 2 of 4 devices leave process 1 without one; accepted"
    ):
        make_mesh(config, 2)
