"""A client that calls the application without sockets, and may go away at any moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from nanoflow_jax import LLM
from nanoflow_jax.evaluate.batch import Settings
from nanoflow_jax.evaluate.records import CHAT, COMPLETIONS
from nanoflow_jax.serve.app import Limits, Server
from tests.engine.engine_driver import assert_idle

LIMIT = 60.0  # seconds after which a request counts as stuck
JSON = "application/json"


@dataclass
class Reply:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Of a stream that has ended as it should."""
        lines = self.body.decode().split("\n\n")
        assert lines.pop() == "" and lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


class Client:
    def __init__(self, server: Server):
        self.server = server

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | list[bytes] = b"",
        leaves: Callable[[int], bool] | asyncio.Event | None = None,
        **headers: str,
    ) -> Reply:
        """leaves: the client goes away when the event is set, or when this says so, given how many parts it has."""
        chunks = [body] if isinstance(body, bytes) else list(body)
        reply, gone = Reply(), leaves if isinstance(leaves, asyncio.Event) else asyncio.Event()

        async def receive() -> dict[str, Any]:
            if chunks:
                chunk = chunks.pop(0)
                return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            elif message.get("body"):
                reply.parts.append(message["body"])
                if callable(leaves) and leaves(len(reply.parts)):
                    gone.set()

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        }  # fmt: skip
        await asyncio.wait_for(self.server.app(scope, receive, send), LIMIT)
        return reply

    async def get(self, path: str, **headers: str) -> Reply:
        return await self.ask("GET", path, b"", None, **headers)

    async def post(self, path: str, body: Any, leaves: Any = None, **headers: str) -> Reply:
        data = body if isinstance(body, bytes | list) else json.dumps(body).encode()
        return await self.ask("POST", path, data, leaves, **{"content_type": JSON, **headers})

    async def chat(self, content: str, leaves: Any = None, **fields: Any) -> Reply:
        messages = [{"role": "user", "content": content}]
        return await self.post(CHAT, {"messages": messages, **fields}, leaves)

    async def complete(self, prompt: Any, leaves: Any = None, **fields: Any) -> Reply:
        return await self.post(COMPLETIONS, {"prompt": prompt, **fields}, leaves)


@asynccontextmanager
async def serving(
    llm: LLM, limits: Limits | None = None, api_key: str | None = None, **settings: Any
) -> AsyncIterator[Client]:
    """A server, from whose engine everything is gone at the end."""
    server = Server(llm, Settings("tiny", **settings), limits or Limits(), api_key)
    try:
        yield Client(server)
        assert server.engine.load == 0
        assert_idle(llm)
    finally:
        server.close()
