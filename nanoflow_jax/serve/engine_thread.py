"""The engine in a thread of its own, for the requests of an event loop.

    event loop      submit | cancel            deliver: texts, JSON, sockets | pause | deliver ...
    engine thread          add, step, step, step | hand over | step, step, step      | hand over

The engine thread runs steps, and between two of them takes in what was submitted and cancelled. What tokens mean (text,
logprobs, JSON) is the event loop's work. It is handed all that has come since the last time at once, and only when it
has dealt with that and has rested for as long as it took: with many clients a chunk then holds several tokens, and the
engine thread, which shares Python's lock with it, keeps its pace.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.calls import Call, Calls
from nanoflow_jax.engine.feed import Work, add_work
from nanoflow_jax.engine.request import CompletionOutput, Logprob, Request, RequestMetrics, RequestOutput, error_line
from nanoflow_jax.replicas.process import engine_counts
from nanoflow_jax.sampling_params import SamplingParams

logger = logging.getLogger("nanoflow_jax")

REST = 1.0  # the event loop's, in multiples of what a delivery took
LONGEST_REST = 0.25  # seconds


@dataclass(eq=False)
class Distant:
    """A completion that a replica makes, as far as it is looked at here. last: its last part, when it has ended."""

    index: int
    params: SamplingParams
    prompt_token_ids: list[int]
    metrics: RequestMetrics
    finish_reason: str | None = None
    error: str | None = None
    num_generated: int = 0
    last: CompletionOutput | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.prompt_token_ids)


# A completion, and tokens that it has got, or the part that a replica has made of them. None: it has ended.
News = tuple[Request | Distant, list[int] | CompletionOutput | None]


class Exchange:
    """Some prompts on their way through the engine. Used on the event loop; the engine thread fills in `requests`.

    watched   its tokens are wanted as they come
    requests  the completions of each prompt
    outputs   of the prompts, where replicas make them
    left      of them, those whose end has not been taken in
    failure   why the engine has lost it
    """

    def __init__(self, work: Sequence[Work], watched: bool):
        self.work, self.watched = work, watched
        self.requests: Sequence[Sequence[Request | Distant]] = []
        self.outputs: list[RequestOutput] = []
        self.failure: str | None = None
        self.gone = False  # nobody waits for it any more
        self.left = self.size = sum(item.params.n for item in work)
        self._news: deque[News] = deque()
        self._waiter: asyncio.Future[None] | None = None

    async def news(self) -> list[News]:
        """What has come since the last time: waits for it. Empty when its client is gone."""
        if not self._news and not self.gone:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        found = [] if self.gone else list(self._news)
        self._news.clear()
        self.left -= sum(tokens is None for _, tokens in found)
        return found

    def tell(self, news: News) -> None:
        self._news.append(news)
        self._wake()

    def leave(self) -> None:
        """Its client is gone."""
        self.gone = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Worker:
    """A thread that answers the requests of an event loop, from which all methods are called.

    on_death  called on the event loop when the thread has ended by an error, which no request can cause
    """

    def __init__(self, on_death: Callable[[], None] = lambda: None):
        self._loop = asyncio.get_running_loop()
        self._on_death = on_death
        self._wanted = threading.Condition()  # of what follows, up to the next empty line
        self._new: list[Exchange] = []
        self._cancelled: list[Exchange] = []
        self._ready = True  # the event loop can take in what has come
        self._stopping = False
        self.load = 0  # completions that have been submitted and have not ended
        self.is_alive = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, exchange: Exchange) -> None:
        with self._wanted:
            self._new.append(exchange)
            self.load += exchange.size
            self._wanted.notify()

    def cancel(self, exchange: Exchange) -> None:
        """Ends what of it has not ended; nothing is told of it any more."""
        exchange.leave()
        with self._wanted:
            self._cancelled.append(exchange)
            self._wanted.notify()

    def stop(self) -> None:
        """Ends everything, and waits for that. A step that runs is waited for."""
        with self._wanted:
            self._stopping = True
            self._wanted.notify()
        self._thread.join()

    def counts(self) -> dict[str, int]:
        """`engine_counts` of what answers. May wait: called off the event loop."""
        raise NotImplementedError

    # -- on the event loop

    def _deliver(self, news: list[tuple[Exchange, News]], failure: str | None) -> None:
        begun = time.perf_counter()
        for exchange, item in news:
            exchange.failure = failure or exchange.failure
            exchange.tell(item)
        self._loop.call_soon(self._delivered, begun)  # behind those that have been woken

    def _delivered(self, begun: float) -> None:
        took = time.perf_counter() - begun
        self._loop.call_later(min(REST * took, LONGEST_REST), self._rested)

    def _rested(self) -> None:
        with self._wanted:
            self._ready = True
            self._wanted.notify()

    # -- on the thread

    def _run(self) -> None:
        try:
            self._work()
        except ConfigError as error:  # one line
            self._died("%s", error)
        except BaseException as error:
            self._died("the engine has stopped: %s", error_line(error), exc_info=True)

    def _died(self, told: str, why: object, exc_info: bool = False) -> None:
        logger.error(told, why, exc_info=exc_info)
        self.is_alive = False
        self._call_loop(self._on_death)

    def _work(self) -> None:
        """Runs until it is stopping."""
        raise NotImplementedError

    def _forget(self, completions: int) -> None:
        with self._wanted:
            self.load -= completions

    def _call_loop(self, what: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(what, *arguments)
        except RuntimeError:  # it is closed: nobody waits any more
            logger.debug("nobody to tell")


class EngineThread(Worker):
    """Runs an engine in this process."""

    def __init__(self, calls: Calls, on_death: Callable[[], None] = lambda: None):
        self._calls, self._call = calls, Call(calls)
        self._exchange_of: dict[Request, Exchange] = {}
        self._seen: dict[Request, int] = {}  # of watched requests: length of prompt and tokens that were handed over
        self._ended: list[Request] = []
        super().__init__(on_death)

    def counts(self) -> dict[str, int]:
        return engine_counts(self._calls.engine)

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            self._call.close()
            with self._calls.alone():
                pass  # it is done with

    def _turn(self) -> bool:
        """What has been wanted, then a step, then what has come of it. False: the end."""
        with self._wanted:
            while not (
                self._new or self._cancelled or self._call.unfinished or self._stopping or (self._ready and self._ended)
            ):
                self._wanted.wait()
            new, self._new = self._new, []
            cancelled, self._cancelled = self._cancelled, []
            if self._stopping:
                return False
        if new or cancelled:
            self._change(new, cancelled)
        failure = None
        try:
            if self._call.unfinished:
                self._calls.step()
        except Exception as error:  # that of requests failing one by one: all have been ended
            failure = error_line(error)
            logger.warning("the engine has failed, and what was running is lost: %s", failure)
        self._ended += self._call.ended
        self._call.ended.clear()
        if self._call.failure is not None:
            failure, self._call = failure or error_line(self._call.failure), Call(self._calls)
        if self._ready or failure:
            self._hand_over(failure)
        return True

    def _change(self, new: list[Exchange], cancelled: list[Exchange]) -> None:
        with self._calls.alone():
            for exchange in new:
                if exchange.gone:
                    self._forget(exchange.size)
                    continue
                groups = [[add_work(self._call, w, i) for i in range(w.completions)] for w in exchange.work]
                exchange.requests = groups
                for request in (r for group in groups for r in group):
                    self._exchange_of[request] = exchange
                    if exchange.watched:
                        self._seen[request] = request.prompt_length
            for exchange in cancelled:
                gone = [r for r, other in self._exchange_of.items() if other is exchange]
                self._call.end(gone)
                for request in gone:
                    del self._exchange_of[request]
                    self._seen.pop(request, None)
                if gone:
                    self._ended = [r for r in self._ended if r in self._exchange_of]
                    self._forget(len(gone))

    def _hand_over(self, failure: str | None) -> None:
        """Gives the event loop what has come since the last time."""
        ended, self._ended = self._ended, []
        news: list[tuple[Exchange, News]] = [(self._exchange_of.pop(r), (r, None)) for r in ended]
        for request in ended:
            self._seen.pop(request, None)
        if self._seen:
            with self._calls.alone():
                news += self._grown()
        if not news:
            return
        with self._wanted:
            self.load -= len(ended)
            self._ready = False
        self._call_loop(self._deliver, news, failure)

    def _grown(self) -> list[tuple[Exchange, News]]:
        """Tokens that watched requests have got and that have not been handed over."""
        running = self._calls.engine.running
        requests = [r for r in self._seen if r.slot is not None]
        slots = np.array([r.slot for r in requests], np.intp)
        seen = np.array([self._seen[r] for r in requests], np.intp)
        known = running.known[slots]
        found = []
        for i in np.flatnonzero(known > seen).tolist():
            request = requests[i]
            tokens = running.tokens[slots[i], seen[i] : known[i]].tolist()
            self._seen[request] = int(known[i])
            found.append((self._exchange_of[request], (request, tokens)))
        return found
