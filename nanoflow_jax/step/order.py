"""The issue order of a step, kept by the compiler.

Left alone, XLA's scheduler covers most collectives and leaves some with nothing beside them. Here every op takes its
inputs through an `optimization_barrier` together with a token, and gives the token on with its output: the issue
order becomes data dependence, which no scheduler can change. XLA's GPU pipeline removes barriers after scheduling,
so they cost nothing at run time. A collective takes the token but does not give it on: it starts where it is issued,
and its first consumer waits for it, or the next collective, since XLA lets one be in flight at a time. Whatever reads
a collective's result must therefore be part of an ordered op: outside, it could float up and end the collective
early.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from jax import lax

T = TypeVar("T")


class IssueOrder:
    """Runs functions in call order. `enforce=False` leaves the order to the compiler (one device without a lane, or the
    CPU)."""

    def __init__(self, enforce: bool):
        self._token: Any = lax.create_token() if enforce else None
        self._in_flight: Any = None

    def run(self, op: Callable[..., T], *inputs: Any) -> T:
        """Runs `op` after everything issued before it; what is issued later runs after it."""
        out = op(*self._after(inputs))
        if self._token is not None:
            self._token, out = lax.optimization_barrier((self._token, out))
        return out

    def start(self, op: Callable[..., T], *inputs: Any) -> T:
        """Issues a collective after everything before it, and after the collective before it is done: XLA lets only one
        be in flight, and would itself choose which one is early and which late. What is issued later does not wait for
        it."""
        if self._in_flight is not None:
            self.wait(self._in_flight)
        out = op(*self._after(inputs))
        if self._token is not None:
            self._in_flight = out
        return out

    def beside(self, op: Callable[..., T], *inputs: Any) -> T:
        """Issues a kernel of another stream after everything before it; what is issued later does not wait for it.

        What is issued later takes its token with the kernel's inputs, though. Without collectives XLA's scheduler for
        their latency leaves the program alone, and the one before it starts a kernel where its inputs are: else they
        could be as late as what needs the result.
        """
        inputs = self._after(inputs)
        out = op(*inputs)
        if self._token is not None:
            self._token = lax.optimization_barrier((self._token, inputs))[0]
        return out

    def wait(self, value: T) -> T:
        """What is issued later runs after `value` is there."""
        if self._token is not None:
            self._token, value = lax.optimization_barrier((self._token, value))
        return value

    def _after(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._token is None:
            return inputs
        return lax.optimization_barrier((self._token, inputs))[1]
