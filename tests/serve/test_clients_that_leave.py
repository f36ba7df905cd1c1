"""Clients that go away at any moment: what they had is free at once, and the others get what they asked for."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the serve extra is not installed")

from nanoflow_jax import LLM
from tests.serve.client import Client, Reply, serving

CLIENTS = 200
ANSWERS = {"12+30=": "42", "reverse abc=": "cba", "47+85=": "132"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots_at_once(llm: LLM, stream: bool) -> None:
    async def ask() -> None:
        async with serving(llm) as client:
            leave = asyncio.Event()
            fields = {"max_tokens": 120, "n": 8, "temperature": 1.0, "ignore_eos": True, "stream": stream}
            leaving = asyncio.ensure_future(client.complete("12", leave, **fields))
            while llm.engine.running.num_running < 8:
                await asyncio.sleep(0.001)
            leave.set()
            await leaving
            steps = llm.engine.num_steps
            done = await client.complete("12+30=", max_tokens=8)
            assert done.json["choices"][0]["text"] == "42"
            assert llm.engine.num_steps - steps < 20, "it had to wait for those whose client was gone"

    asyncio.run(ask())


async def soak(client: Client, clients: int, seed: int = 0) -> int:
    """Clients that leave before they are read, while they wait, or in the middle of a stream; and some that stay.
    Returns how many left."""
    rng = random.Random(seed)

    async def one(number: int) -> bool:
        await asyncio.sleep(rng.random() * clients / 400)
        prompt, wanted = rng.choice(list(ANSWERS.items()))
        stream, kind = rng.random() < 0.5, rng.random()
        if kind < 0.4:
            reply = await client.complete(prompt, max_tokens=8, stream=stream)
            assert reply.status == 200, reply
            if stream:
                found = "".join(choice["text"] for event in reply.events for choice in event["choices"])
            else:
                found = reply.json["choices"][0]["text"]
            assert found == wanted, (prompt, found)
            return False
        fields: dict[str, Any] = {"max_tokens": rng.randrange(1, 60), "ignore_eos": True, "stream": stream}
        if rng.random() < 0.2:
            fields |= {"n": 3, "temperature": 1.0}
        elif rng.random() < 0.2:
            prompt = [prompt] * 3
        leave: Any = asyncio.Event()
        if stream and kind < 0.7:
            most = rng.randrange(1, 6)
            leave = lambda parts: parts >= most  # noqa: E731
        else:
            asyncio.get_running_loop().call_later(rng.random() * clients / 400, leave.set)
        reply: Reply = await client.complete(prompt, leave, **fields)
        assert reply.status in (0, 200), reply
        return True

    return sum(await asyncio.gather(*map(one, range(clients))))


def test_two_hundred_clients_that_cancel_at_random(llm: LLM) -> None:
    async def ask() -> None:
        async with serving(llm) as client:
            left = await soak(client, CLIENTS)
            assert left > CLIENTS / 4
            while client.server.engine.load:
                await asyncio.sleep(0.01)

    asyncio.run(ask())


def test_the_event_loop_is_never_held_up_by_the_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take half a second: other requests are answered meanwhile."""
    runner, slow = llm.engine.runner, threading.Event()
    dispatch = runner.dispatch

    def wait(*arguments: Any) -> Any:
        slow.set()
        time.sleep(0.5)
        return dispatch(*arguments)

    async def ask() -> None:
        async with serving(llm) as client:
            monkeypatch.setattr(runner, "dispatch", wait)
            running = asyncio.ensure_future(client.complete("12", max_tokens=2, stream=True))
            while not slow.is_set():
                await asyncio.sleep(0.001)
            begun = time.perf_counter()
            for path in ("/health", "/metrics", "/v1/models"):
                assert (await client.get(path)).status == 200
            assert (await client.complete("12", top_p=2)).status == 400
            assert time.perf_counter() - begun < 0.3
            assert (await running).status == 200

    asyncio.run(ask())
