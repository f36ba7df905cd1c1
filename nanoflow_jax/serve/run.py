"""A server from its start to its end: sockets, signals, and what is told on standard error."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import signal
import socket
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn

from nanoflow_jax.evaluate.batch import Settings
from nanoflow_jax.serve.app import Limits, Server

if TYPE_CHECKING:
    from nanoflow_jax.api import LLM

BACKLOG = 4096  # connections that wait to be accepted
KEEP_ALIVE = 75  # seconds of an idle connection: more than clients keep theirs


class _Uvicorn(uvicorn.Server):
    """Signals are ours: on the first one everything that runs is finished."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet. Raises ValueError, one line, where that address cannot be had."""
    found = None
    if not 0 <= port < 2**16:  # getaddrinfo takes the remainder
        raise ValueError(f"--port: {port} is not accepted; it must be from 0 (a free one) to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        if found is not None:
            found.close()
        raise ValueError(f"--host, --port: {host}:{port} cannot be had ({error}); name another") from None
    return found


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(llm: LLM, at: socket.socket, settings: Settings, limits: Limits, api_key: str | None, quiet: bool) -> int:
    """Serves until a signal comes (SIGTERM, SIGINT). Returns the exit status: 0 when everything that ran was finished,
    1 when a second signal, or an engine that stopped, ended it."""
    return run_loop(_serve(llm, at, settings, limits, api_key, quiet))


def run_loop[T](main: Coroutine[Any, Any, T]) -> T:
    """On an event loop as a server has it."""
    with asyncio.Runner(loop_factory=uvicorn.Config(lambda: None, loop="auto").get_loop_factory()) as runner:
        return runner.run(main)


@contextlib.asynccontextmanager
async def listening(server: Server, at: socket.socket) -> AsyncIterator[asyncio.Future[None]]:
    """The server at a socket, until this is left; yields what ends when it can serve no longer."""
    # What is there by now stays: a collection that looks at all of it (with JAX 300,000 objects, 150 ms) stops every
    # thread, and many requests at once would bring several.
    gc.collect()
    gc.freeze()
    config = uvicorn.Config(
        server.app, lifespan="off", log_level="warning", access_log=False, server_header=False, backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=1, interface="asgi3", proxy_headers=False,
    )  # fmt: skip
    http = _Uvicorn(config)
    running = asyncio.ensure_future(http.serve(sockets=[at]))
    while not http.started and not running.done():
        await asyncio.sleep(0.01)
    try:
        yield running
    finally:
        http.should_exit = True
        await running


async def _serve(
    llm: LLM, at: socket.socket, settings: Settings, limits: Limits, api_key: str | None, quiet: bool
) -> int:
    loop, wanted, now = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    failed = False

    def on_death() -> None:
        nonlocal failed
        failed = True
        end()

    def end() -> None:
        (now if wanted.is_set() or failed else wanted).set()
        wanted.set()

    server = Server(llm, settings, limits, api_key, on_death)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    async with listening(server, at) as running:
        if not quiet:
            host, port = at.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"serving {settings.model} on http://{host}:{port}/v1", file=sys.stderr, flush=True)
        ends = {asyncio.ensure_future(wanted.wait()), running}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        drained = asyncio.ensure_future(server.drain())
        if not quiet and not failed:
            print("shutting down: what runs is finished", file=sys.stderr, flush=True)
        cut = asyncio.ensure_future(now.wait())
        await asyncio.wait({drained, cut}, return_when=asyncio.FIRST_COMPLETED)
        finished = drained.done() and not failed
        if finished:
            await asyncio.sleep(0.1)  # the last responses leave, and who comes now is told
    drained.cancel()
    cut.cancel()
    server.close()
    return 0 if finished else 1
