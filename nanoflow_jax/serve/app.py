"""The endpoints, as an ASGI application (https://asgi.readthedocs.io/en/latest/specs/www.html).

Bodies become records, and outputs become responses, where those of batch files do (`nanoflow_jax.evaluate`).
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nanoflow_jax.engine.feed import Work
from nanoflow_jax.engine.outputs import request_output
from nanoflow_jax.engine.request import Request
from nanoflow_jax.evaluate.batch import Settings, prepare
from nanoflow_jax.evaluate.records import CHAT, COMPLETIONS, Body, Problem, parse_body
from nanoflow_jax.evaluate.response import Json, chunk_head, response_body
from nanoflow_jax.serve.chunks import Chunks
from nanoflow_jax.serve.engine_thread import Distant, EngineThread, Exchange, Worker
from nanoflow_jax.serve.http import (
    Gone,
    Refused,
    bug,
    event,
    http_error,
    json_response,
    part,
    read_body,
    wait_until_gone,
)
from nanoflow_jax.serve.metrics import CONTENT_TYPE, Metrics
from nanoflow_jax.serve.openapi import schema
from nanoflow_jax.serve.replica_thread import ReplicaThread

if TYPE_CHECKING:
    from nanoflow_jax.api import LLM

RETRY_SECONDS = (1, 60)  # bounds of what a client that is refused is told to wait
OPEN = ("/health",)  # without a key


@dataclass(frozen=True)
class Limits:
    """body_bytes   of a request
    prompts      of a request
    queue        completions that wait for a slot, of all requests
    """

    body_bytes: int = 16 * 2**20
    prompts: int = 1024
    queue: int = 8192


class Server:
    """An LLM behind endpoints. `app` is the ASGI application; made and used on one event loop.

    api_key  what clients must show; None: nothing
    """

    def __init__(
        self,
        llm: LLM,
        settings: Settings,
        limits: Limits = Limits(),
        api_key: str | None = None,
        on_death: Callable[[], None] = lambda: None,
    ):
        self._llm, self._settings, self._limits = llm, settings, limits
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self.engine: Worker
        if llm.replicas is None:
            self.engine = EngineThread(llm.calls, on_death)
        else:
            self.engine = ReplicaThread(llm.replicas, on_death)
        self.metrics = Metrics()
        self._started, self._count = int(time.time()), 0
        self._name, self._names = uuid.uuid4().hex[:24], itertools.count()  # of responses
        self._tokenizing = ThreadPoolExecutor(1, "tokenizing")
        self._open, self._draining, self._idle = 0, False, asyncio.Event()
        self._idle.set()
        self._schema = schema(settings.model, limits.prompts)
        self._rate = _Rate()
        self._most = self.engine.counts()["slots"] + limits.queue  # completions that are running or waiting
        generate = [Route(path, _Endpoint(self, path), methods=["POST"]) for path in (CHAT, COMPLETIONS)]
        routes = [
            *generate,
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/health", self._health),
            Route("/metrics", self._metrics_text),
            Route("/openapi.json", self._openapi),
        ]
        handlers: dict[Any, Any] = {
            HTTPException: http_error, Refused: lambda _, error: error.response(), Exception: bug,
        }  # fmt: skip
        self._starlette = Starlette(routes=routes, exception_handlers=handlers)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if self._key is not None and scope["path"] not in OPEN:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._key):
                told = "Authorization: accepted is `Bearer KEY` with the key of this server"
                error = Refused(401, told, "invalid_api_key", www_authenticate="Bearer")
                await error.response()(scope, receive, send)
                return
        await self._starlette(scope, receive, send)

    # -- its end

    async def drain(self) -> None:
        """Refuses what is new, and waits for what runs."""
        self._draining = True
        await self._idle.wait()

    def close(self) -> None:
        """Ends what runs."""
        self.engine.stop()
        self._tokenizing.shutdown(cancel_futures=True)

    # -- what is only told

    async def _models(self, _: HttpRequest) -> Response:
        return json_response({"object": "list", "data": [self._card()]})

    async def _model(self, request: HttpRequest) -> Response:
        if (name := request.path_params["name"]) != self._settings.model:
            told = f"model: {name!r} is not here; accepted: {self._settings.model!r}"
            raise Refused(404, told, "model_not_found", "model")
        return json_response(self._card())

    def _card(self) -> Json:
        return {
            "id": self._settings.model, "object": "model", "created": self._started, "owned_by": "nanoflow_jax",
            "max_model_len": self._llm.max_model_len,
        }  # fmt: skip

    async def _health(self, _: HttpRequest) -> Response:
        self._check_open()
        several = self._llm.replicas
        more = {} if several is None else {"replicas": len(several.members), "replicas_ready": several.num_ready}
        return json_response({"status": "ok", **more})

    async def _metrics_text(self, _: HttpRequest) -> Response:
        counts = await asyncio.get_running_loop().run_in_executor(None, self.engine.counts)
        text = self.metrics.text(counts, self.engine.load)
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    async def _openapi(self, _: HttpRequest) -> Response:
        return json_response(self._schema)

    # -- generation

    def _check_open(self) -> None:
        if not self.engine.is_alive:
            raise Refused(503, "the engine has stopped; its log says why", "engine_stopped")
        if self._draining:
            told = "the server is shutting down; another one may serve this request"
            raise Refused(503, told, "shutting_down", retry_after="1", connection="close")

    def _check_room(self, completions: int) -> None:
        self._check_open()
        if (over := self.engine.load + completions - self._most) > 0:
            told = f"{self.engine.load} completions are running or waiting; accepted: {self._most}; try again later"
            raise Refused(429, told, "queue_full", retry_after=str(self._rate.seconds(over)))

    async def generate(self, endpoint: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request to an endpoint that generates."""
        status = 200
        self._open += 1
        self._idle.clear()
        try:
            self._check_room(1)
            body = await read_body(Headers(scope=scope), receive, self._limits.body_bytes)
            asked, work = await self._prepare(endpoint, body)
            async with self._running(work, asked.stream, receive) as exchange:
                name, created = f"{self._name}{next(self._names):08x}", int(time.time())
                if asked.stream:
                    await self._stream(asked, exchange, name, created, send)
                else:
                    response = await self._whole(asked, exchange, name, created)
                    await response(scope, receive, send)
        except Refused as error:
            status = error.status
            await error.response()(scope, receive, send)
        except Gone:
            status = 499  # as proxies call it
        finally:
            self.metrics.answered(endpoint, status)
            self._open -= 1
            if not self._open:
                self._idle.set()

    async def _prepare(self, endpoint: str, data: bytes) -> tuple[Body, list[Work]]:
        """Raises Refused."""
        # Off the event loop: a long prompt takes a while to tokenize.
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, self._parse, endpoint, data)

    def _parse(self, endpoint: str, data: bytes) -> tuple[Body, list[Work]]:
        models = (self._settings.model,)
        found = parse_body(endpoint, data, self._count, models, self._limits.prompts)
        if isinstance(found, Problem):
            raise _refusal(found)
        self._count += len(found.records)
        work = []
        for record in found.records:
            item = prepare(self._llm, record, self._settings)
            if isinstance(item, Problem):
                raise _refusal(item)
            work.append(item)
        return found, work

    @asynccontextmanager
    async def _running(self, work: list[Work], watched: bool, receive: Receive) -> AsyncIterator[Exchange]:
        """The work in the engine; what has not ended when this is left is ended. Raises Refused when too much waits."""
        exchange = Exchange(work, watched)
        if exchange.size > self._most:
            param = "prompt" if len(work) > 1 else "n"
            told = f"{param}: {exchange.size} completions; accepted: at most {self._most}"
            raise Refused(400, told, "invalid_request", param)
        self._check_room(exchange.size)
        self.engine.submit(exchange)
        leaving = asyncio.ensure_future(wait_until_gone(receive))
        leaving.add_done_callback(lambda _: exchange.leave())
        try:
            yield exchange
        finally:
            leaving.cancel()
            if exchange.left:
                self.metrics.gone(exchange.left)
                self.engine.cancel(exchange)

    def _ended(self, request: Request | Distant) -> None:
        self.metrics.ended(request)
        self._rate.count()

    async def _whole(self, asked: Body, exchange: Exchange, name: str, created: int) -> Response:
        while exchange.left:
            news = await exchange.news()
            if not news:
                raise Gone
            for request, _ in news:
                self._ended(request)
        groups = exchange.requests
        for group in groups:
            for request in group:
                _check(request, exchange)
        outputs = exchange.outputs or [
            request_output([r for r in group if isinstance(r, Request)], self._llm.tokenizer, self._llm.reasoning)
            for group in groups
        ]
        model, tokenizer = self._settings.model, self._llm.tokenizer
        return json_response(response_body(asked.records, outputs, model, tokenizer, name, created))

    async def _stream(self, asked: Body, exchange: Exchange, name: str, created: int, send: Send) -> None:
        await send({
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")],
        })  # fmt: skip
        chunks = Chunks(self._llm, asked, exchange, chunk_head(asked.records[0], self._settings.model, name, created))
        try:
            while exchange.left:
                news = await exchange.news()
                if not news:
                    raise Gone
                events = []
                for request, tokens in news:
                    if tokens is None:
                        self._ended(request)
                        _check(request, exchange)
                    events.append(chunks.chunk(request, tokens))
                await send(part(b"".join(events)))
            await send(part(chunks.last(), more=False))
        except Refused as error:  # the status has been sent
            await send(part(event(error.body), more=False))


class _Endpoint:
    """As a class, because Starlette then leaves sending to it."""

    def __init__(self, server: Server, path: str):
        self._server, self._path = server, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._server.generate(self._path, scope, receive, send)


class _Rate:
    """How fast completions end, of late."""

    def __init__(self) -> None:
        self._since, self._ended, self._per_second = time.monotonic(), 0, 0.0

    def count(self) -> None:
        self._ended += 1
        if (passed := time.monotonic() - self._since) >= 5:
            self._per_second, self._since, self._ended = self._ended / passed, time.monotonic(), 0

    def seconds(self, completions: int) -> int:
        """Until so many have ended, about."""
        low, high = RETRY_SECONDS
        return low if not self._per_second else int(min(max(completions / self._per_second, low), high))


def _check(request: Request | Distant, exchange: Exchange) -> None:
    """Raises Refused for a completion that has failed."""
    if request.finish_reason == "error":
        raise Refused(500, request.error or "the request failed", "server_error")
    if request.finish_reason == "abort":
        raise Refused(500, f"the engine has lost the request: {exchange.failure}; try again", "server_error")


def _refusal(found: Problem) -> Refused:
    if found.code == "server_error":
        return Refused(500, found.message, found.code, found.param)
    if found.param == "model":
        return Refused(404, found.message, "model_not_found", found.param)
    return Refused(400, found.message, found.code, found.param)
