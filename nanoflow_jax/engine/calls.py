"""Calls of several threads on one engine: their requests share its steps.

    thread A   add, step | step       | step (ends A's) |            |
    thread B             | add, wait  | wait            | step       | step (ends B's)

One thread at a time has the engine. A call that waits for its requests runs the next step when nobody else has it, and
otherwise waits for the end of what the other one does: so whoever waits goes on with the steps when the thread that ran
them is done. Nobody keeps the engine between two steps: a half-read stream holds up nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from nanoflow_jax.engine.engine import Engine
from nanoflow_jax.engine.request import Request, error_line


class Calls:
    """Shares an engine between threads. All that is done to the engine goes through here while there are several."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._lock = threading.Lock()  # of what follows; never held during a step
        self._turn = threading.Condition(self._lock)  # notified when the engine is free
        self._holder: int | None = None  # the thread that has the engine
        self._asking: set[int] = set()  # threads that want to have it before the next step
        self._call_of: dict[Request, Call] = {}  # of requests that have not ended
        self._closed: deque[Call] = deque()  # calls whose requests are to be ended

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within, this thread has the engine between two steps: to add requests, or to read what they have so far."""
        me = threading.get_ident()
        try:
            with self._lock:
                self._reclaim(me)
                self._asking.add(me)
                while self._holder is not None:
                    self._turn.wait()
                self._holder = me
            yield
        except Exception:
            raise
        except BaseException as error:  # an interruption, anywhere
            if self._holder == me:
                self._fail(error)
            raise
        finally:
            self._release(me)

    def step(self) -> None:
        """Runs a step, and gives each call what it brought; or, when another thread has the engine, waits until that
        is done. Raises what the step raises: all requests of all calls have then ended."""
        me = threading.get_ident()
        try:
            with self._lock:
                self._reclaim(me)
                if self._holder is not None or self._asking:
                    self._turn.wait()
                    return
                self._holder = me
            for request in self.engine.step():
                self._ended(request)
            for request in self.engine.updated:
                if (call := self._call_of.get(request)) is not None:
                    call.grown[request] = None
            if self._call_of and not self.engine.has_work:
                raise RuntimeError("the engine has lost requests")
        except BaseException as error:
            if self._holder == me:
                self._fail(error)
            raise
        finally:
            self._release(me)

    def drop(self, call: Call) -> None:
        """Ends the requests of a call, at once or after what another thread does with the engine. Never waits: it may
        be called from the garbage collector (a stream that nobody holds any more), also in the middle of a step."""
        self._closed.append(call)
        if self._lock.acquire(blocking=False):
            try:
                if self._holder is None:
                    self._end_closed()
            finally:
                self._lock.release()

    def _release(self, me: int) -> None:
        try:
            self._let_go(me)
        except BaseException:  # an interruption: nobody would have the engine until this thread comes again
            self._let_go(me)
            raise

    def _let_go(self, me: int) -> None:
        with self._lock:
            self._asking.discard(me)
            try:
                if self._holder == me:
                    self._end_closed()
            finally:
                if self._holder == me:
                    self._holder = None
                self._turn.notify_all()

    def _reclaim(self, me: int) -> None:
        """A thread that comes, and has the engine already, was interrupted where it could not let go of it."""
        if self._holder == me:
            self._fail(KeyboardInterrupt())
            self._holder = None
        self._asking.discard(me)

    def _end_closed(self) -> None:
        while self._closed:
            for request in list(self._closed.popleft().unfinished):
                self.engine.abort(request)
                self._ended(request)

    def _ended(self, request: Request) -> None:
        if (call := self._call_of.pop(request, None)) is not None:
            call.ended.append(request)  # first: a call that has nothing unfinished has all that ended
            call.grown.pop(request, None)
            call.unfinished.discard(request)

    def _fail(self, error: BaseException) -> None:
        """Empties the engine, whatever state it is in. Calls that lose a request by it raise an error."""
        for request, call in list(self._call_of.items()):
            if not request.finish_reason:
                request.finish("abort")
                call.failure = error
            self._ended(request)
        self.engine.abort_all()


class Call:
    """The requests of one call. Used by one thread.

    unfinished  those that have not ended
    ended       those that have, in that order; whoever handles one takes it out
    grown       those that are watched and have got tokens, in that order; emptied by whoever looks at them
    failure     what has ended requests of this call
    """

    def __init__(self, calls: Calls):
        self._calls = calls
        self.unfinished: set[Request] = set()
        self.ended: deque[Request] = deque()
        self.grown: dict[Request, None] = {}
        self.failure: BaseException | None = None

    def add(self, *args: Any, **options: Any) -> Request:
        """As `Engine.add`. To be called within `Calls.alone`."""
        request = self._calls.engine.add(*args, **options)
        self.unfinished.add(request)
        self._calls._call_of[request] = self
        return request

    def step(self) -> bool:
        """Takes its requests on by a step. False: there were none. Raises RuntimeError when requests of this call have
        been lost because a step that another call ran has failed."""
        had = bool(self.unfinished)
        if had:
            self._calls.step()
        if self.failure is not None:
            raise RuntimeError(
                f"another call of this LLM has failed in a step, and what was running is lost: "
                f"{error_line(self.failure)}; this call can be made again"
            ) from self.failure
        return had

    def end(self, requests: Iterable[Request]) -> None:
        """Ends those of its requests that have not ended: they do not come in `ended`. To be called within
        `Calls.alone`."""
        for request in requests:
            if request in self.unfinished:
                self._calls.engine.abort(request)
                self._calls._call_of.pop(request, None)
                self.grown.pop(request, None)
                self.unfinished.discard(request)

    def close(self) -> None:
        """Ends what is unfinished; see `Calls.drop`."""
        if self.unfinished:
            self._calls.drop(self)
