"""Pieces of HTTP: what is refused, in OpenAI's form, bodies of bounded size, JSON and events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive

from nanoflow_jax.evaluate.response import Json, encode_json


class Refused(Exception):
    """A request that is not served: its status, and what is told in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None, **headers: str):
        super().__init__(message)
        kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


class Gone(Exception):
    """The client went away."""


async def read_body(headers: Headers, receive: Receive, most: int) -> bytes:
    """Raises Refused, before more than `most` bytes have been read, and Gone."""
    kind = headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise Refused(
            415, f"Content-Type: {kind[:80]!r} is not accepted; it must be application/json", "invalid_request"
        )
    length = headers.get("content-length", "0")
    too_large = Refused(
        413, f"the body has more than {most} bytes, which is the most accepted", "request_too_large", connection="close"
    )
    if not length.isdecimal() or int(length) > most:
        raise too_large
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise too_large
        more = message.get("more_body", False)
    return b"".join(parts)


async def wait_until_gone(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def http_error(request: Request, error: HTTPException) -> Response:
    told = {404: f"{request.url.path} is not here", 405: f"{request.method} is not accepted here"}
    headers = dict(error.headers or {})
    message = told.get(error.status_code, error.detail)
    if "Allow" in headers:
        headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))
        message += f"; accepted: {headers['Allow']}"
    refused = Refused(error.status_code, message, "not_found" if error.status_code == 404 else "invalid_request")
    refused.headers = headers
    return refused.response()


def bug(_: Request, error: Exception) -> Response:
    """The error itself goes to the log."""
    return Refused(500, f"the server has failed on this request: {type(error).__name__}", "server_error").response()


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode_json(content), status, headers, "application/json")


def part(data: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def event(content: Json) -> bytes:
    return b"data: " + encode_json(content) + b"\n\n"
