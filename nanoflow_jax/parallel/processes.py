"""Several processes, one per host or per GPU, as one replica: joining them, the messages from process 0 to the others,
and noticing that one is gone.

All of it goes through the coordination service of `jax.distributed`, which runs in process 0: no port of our own. Who
reaches its port can read and write all of that, so process 0 listens at the address it was given and nowhere else.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

from nanoflow_jax.config import ConfigError
from nanoflow_jax.system.platform import claim_gpu_memory

PEER_TIMEOUT = 60  # seconds without a sign of life after which a process counts as gone
GRACE = 5.0  # seconds in which the watchdogs of others see what a process has told them
PART = 1 << 20  # characters of a message that go into one entry of the service
POLL_MS = 500  # between two of them a signal is seen
JOIN_TIMEOUT = 300  # seconds that processes wait for each other at the start
BACKSTOP = 5  # JAX ends a process by itself after so many times the peer timeout: never before our own message

logger = logging.getLogger("nanoflow_jax")

_JOINED: Processes | None = None  # like jax.distributed itself, one per process


class PeerError(ConnectionError):
    """Another process of the replica cannot go on; one line."""


def joined() -> Processes | None:
    """The processes that this one has joined; None when it is alone."""
    return _JOINED


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    peer_timeout: float = PEER_TIMEOUT,
) -> Processes:
    """Makes this process one of a replica, before anything else uses JAX. Waits until all are there.

    coordinator    HOST:PORT of process 0, which listens there alone; JAX_COORDINATOR_BIND_ADDRESS names another place,
                   for a host whose own addresses are not those that the others know. With all three left out they are
                   what JAX finds: SLURM, Kubernetes, Open MPI
    peer_timeout   seconds

    Raises ConfigError, one line, when that cannot be.
    """
    global _JOINED
    if _JOINED is not None:
        raise ConfigError("distributed: this process has joined already")
    given = (coordinator, num_processes, process_id)
    if None in given and given != (None, None, None):
        raise ConfigError("distributed: --coordinator, --num-processes and --process-id go together, or none of them")
    host, _, port = (coordinator or "").rpartition(":")
    if coordinator is not None and not (host and port.isdecimal()):
        raise ConfigError(f"coordinator: {coordinator!r} is not accepted; it must be HOST:PORT of process 0")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ConfigError(f"process_id: {process_id} of {num_processes} processes; accepted: 0 to {num_processes - 1}")
    if not peer_timeout >= 1:
        raise ConfigError(f"peer_timeout: {peer_timeout!r} is not accepted; it must be at least 1 second")
    if coordinator is not None and process_id == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        _check_host(host.strip("[]"))
    claim_gpu_memory()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=JOIN_TIMEOUT,
            coordinator_bind_address=os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator),
            heartbeat_timeout_seconds=max(100, int(BACKSTOP * peer_timeout)),
            shutdown_timeout_seconds=max(10, int(peer_timeout)),
        )
    except (ValueError, RuntimeError) as error:
        what = str(error).strip().splitlines()[0]
        if coordinator is None and "should be defined" in what:
            raise ConfigError(
                "distributed: no SLURM, Kubernetes or Open MPI job was found; "
                "accepted elsewhere: --coordinator HOST:PORT --num-processes N --process-id I"
            ) from None
        raise ConfigError(f"distributed: could not join the other processes: {what}") from None
    _JOINED = Processes(peer_timeout)
    jax.devices()  # all find each other's devices now; later one could ask while the others wait for its messages
    return _JOINED


def _check_host(host: str) -> None:
    """Raises ConfigError when process 0 cannot listen at `host`; tells when other machines will not find it there."""
    try:
        family, kind, _, _, (address, *_) = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.bind((address, 0))
    except OSError as error:
        raise ConfigError(
            f"coordinator: process 0 cannot listen at {host!r} ({error.strerror or error}); accepted: an address of "
            "its host, or JAX_COORDINATOR_BIND_ADDRESS=HOST:PORT beside it"
        ) from None
    if ipaddress.ip_address(str(address)).is_loopback and host != "localhost" and host != address:
        logger.warning(
            "coordinator: %s is %s on this machine, where no other machine reaches it; give the address that they know",
            host,
            address,
        )


class Processes:
    """This process among those of the replica.

    rank, count  this process's number, and how many there are; process 0 leads
    """

    def __init__(self, peer_timeout: float):
        from jax._src import distributed  # the client has no public name

        state = distributed.global_state
        self._client: Any = state.client
        self.rank, self.count, self.peer_timeout = state.process_id, state.num_processes, peer_timeout
        self._sent = self._forgotten = self._received = self._exchanges = 0
        self._watchdog = Watchdog(self._client, self.rank, self.count, peer_timeout)
        self._watchdog.start()

    @property
    def leads(self) -> bool:
        """Whether this is process 0, which runs the program; the others follow it."""
        return self.rank == 0

    def send(self, message: dict[str, Any]) -> int:
        """Process 0 to all others, in order. Returns the message's number."""
        text = json.dumps(message, separators=(",", ":"))
        parts = [text[at : at + PART] for at in range(0, len(text), PART)]
        for i, part in enumerate(parts):
            self._client.key_value_set(_message_key(self._sent, i), f"{len(parts)} {part}")
        self._sent += 1
        return self._sent - 1

    def forget(self, number: int) -> None:
        """Removes the messages up to this one, which all have read."""
        while self._forgotten <= number:
            self._client.key_value_delete(f"nanoflow/message/{self._forgotten}/")
            self._forgotten += 1

    def receive(self) -> dict[str, Any]:
        """The next message of process 0; waits for it as long as the process lives."""
        text, parts, i = "", 1, 0
        while i < parts:
            count, _, part = self._get(_message_key(self._received, i)).partition(" ")
            text, parts, i = text + part, int(count), i + 1
        self._received += 1
        return json.loads(text)

    def exchange(self, value: str) -> list[str]:
        """The values that all processes give at this call, by rank. All must call it, in the same order."""
        number = self._exchanges
        self._exchanges += 1
        self._client.key_value_set(f"nanoflow/exchange/{number}/{self.rank}", value)
        return [self._get(f"nanoflow/exchange/{number}/{rank}") for rank in range(self.count)]

    def agree(self, name: str, value: str) -> None:
        """Raises ConfigError, in all processes, when they do not all give the same value."""
        values = self.exchange(value)
        if other := [rank for rank, theirs in enumerate(values) if theirs != values[0]]:
            raise ConfigError(
                f"{name}: process {other[0]} has {values[other[0]]} and process 0 has {values[0]}; "
                "all processes must have the same"
            )

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Tells the watchdog that the process waits for a step."""
        self._watchdog.waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._watchdog.waiting_since = None

    def explain(self, error: Exception) -> PeerError:
        """What to raise for an error of a step: processes that failed together cannot go on one by one. Does not come
        back when the watchdog finds that another process is gone."""
        time.sleep(self.peer_timeout + GRACE if "Gloo" in str(error) or "NCCL" in str(error) else GRACE)
        what = str(error).strip().splitlines()[:1]
        return PeerError(f"process {self.rank} of {self.count}: {': '.join([type(error).__name__, *what])}")

    def leave(self, status: int, reason: str = "") -> None:
        """Ends this process's part. With status 0 all wait for each other; otherwise the others are told the reason."""
        global _JOINED
        if _JOINED is None:
            return
        _JOINED = None
        if status == 0:
            self._watchdog.stop()
            self._watchdog.join(GRACE)
            jax.distributed.shutdown()
            return
        with suppress(jax.errors.JaxRuntimeError):  # process 0 may be gone
            self._watchdog.announce(reason)
        if self.leads:
            time.sleep(min(GRACE, self.peer_timeout) / 2)  # the service ends with this process: let the others read
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # JAX would wait for the others, which may wait for a step of this one

    def _get(self, key: str) -> str:
        while True:
            try:
                return self._client.blocking_key_value_get(key, POLL_MS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    time.sleep(GRACE)  # JAX may end this process first, and one line is told (last_words)
                    raise PeerError(f"process 0 cannot be reached: {str(error).splitlines()[0]}") from None


def _message_key(number: int, part: int) -> str:
    return f"nanoflow/message/{number}/{part}"


class Watchdog(threading.Thread):
    """Ends this process, with one line, when another one is gone or has ended for a reason of its own.

    A thread, and os._exit: the main thread may stand in a collective that will never end. What has been written by
    then stays.
    """

    STUCK = 10  # times the peer timeout that a step may take while all processes are alive

    def __init__(
        self, client: Any, rank: int, count: int, timeout: float, end: Callable[[str], None] | None = None
    ) -> None:
        super().__init__(name="nanoflow-watchdog", daemon=True)
        self._client, self._rank, self._count, self._timeout = client, rank, count, timeout
        self._end = end or _end_now
        self._stopped = threading.Event()
        self.waiting_since: float | None = None
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> last count, and when it changed

    def stop(self) -> None:
        self._stopped.set()

    def announce(self, reason: str) -> None:
        """Tells the others why this process ends."""
        self.stop()
        self._client.key_value_set(f"nanoflow/ended/{self._rank}", reason, allow_overwrite=True)

    def run(self) -> None:
        interval = min(1.0, self._timeout / 5)
        reached = time.monotonic()
        while not self._stopped.wait(interval):
            now = time.monotonic()
            try:
                reason = self._look(now)
                reached = now
            except jax.errors.JaxRuntimeError:
                gone = now - reached > self._timeout
                reason = f"process 0 of {self._count} could not be reached for {self._timeout:g} s" if gone else None
            if reason and not self._stopped.is_set():
                self._end(reason)
                return

    def _look(self, now: float) -> str | None:
        """Signs on, and reads the others' signs. Returns why the run cannot go on, if it cannot."""
        self._client.key_value_increment(f"nanoflow/alive/{self._rank}", 1)
        signs = {_rank(key): value for key, value in self._client.key_value_dir_get("nanoflow/alive/")}
        for key, reason in self._client.key_value_dir_get("nanoflow/ended/"):
            return f"process {_rank(key)} of {self._count} has ended: {reason}"
        for rank in range(self._count):
            count, since = self._seen.get(rank, ("", now))
            if signs.get(rank, "") != count or rank not in self._seen:
                self._seen[rank] = signs.get(rank, ""), now
            elif now - since > self._timeout:
                return f"process {rank} of {self._count} has given no sign of life for {self._timeout:g} s: it is gone"
        if self.waiting_since is not None and now - self.waiting_since > self.STUCK * self._timeout:
            return f"a step has not ended for {self.STUCK * self._timeout:g} s, though all {self._count} processes live"
        return None


def _rank(key: str) -> int:
    return int(key.rpartition("/")[2])


def _end_now(reason: str) -> None:
    sys.stdout.flush()
    print(f"nanoflow: {reason}; what was written stays, start all processes again to go on", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)
