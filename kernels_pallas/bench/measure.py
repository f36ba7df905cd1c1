"""How it is measured: medians over programs of several calls, beside a device copy and a GEMM of the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = 2e-2  # relative error of a row


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is done for one figure.

    calls        in one program: what starting a program costs is shared by them
    short_calls  likewise, of a kernel of microseconds
    runs         of the program, at most; the median counts
    seconds      of runs, about: long programs run less often, but five times
    cold_bytes   of inputs, at least, between two uses of one, as far as `calls` reach: many times the L2
    copy_bytes   of the copy that is the bound
    gemm         its three sizes
    """

    calls: int = 16
    short_calls: int = 128
    runs: int = 15
    seconds: float = 0.3
    cold_bytes: int = 512 * 2**20
    copy_bytes: int = 2**30
    gemm: int = 8192

    def sets(self, size: int) -> int:
        """How many sets of inputs of so many bytes the calls of a program use in turn."""
        return min(self.calls, -(-self.cold_bytes // size))


FULL = Effort()
TINY_EFFORT = Effort(calls=1, short_calls=2, runs=1, seconds=0.0, cold_bytes=1, copy_bytes=4096, gemm=64)


def seconds(run: Callable[[], Any], effort: Effort) -> float:
    """Median time of one run; `run` returns what is to be waited for."""
    jax.block_until_ready(run())  # compiles
    start = time.perf_counter()
    jax.block_until_ready(run())
    first = time.perf_counter() - start
    times = [] if effort.runs > 1 else [first]
    for _ in range(min(effort.runs, max(5, int(effort.seconds / first))) if effort.runs > 1 else 0):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def chained(call: Callable[..., Any], sets: int, effort: Effort) -> Callable[..., Any]:
    """A program of `calls` calls, one after another, no two of them the same. It gives all their results: a call whose
    result nobody takes would be removed, barrier or not. What is shared passes the barrier too: what a call makes of it
    alone, as the tiles of prefill, would be made once for all calls.

    It takes x, what all sets share, and a list of what each has alone. `call(x, shared, own)` gives an array of x's
    shape.
    """

    @jax.jit
    def program(x: Any, shared: Any, own: list[Any]) -> list[Any]:
        once = jax.jit(call)  # lowered once
        outs = [x]
        for i in range(effort.calls):
            x, shared, _ = jax.lax.optimization_barrier((x, shared, outs[-1]))
            outs.append(once(x, shared, own[i % sets]))
        return outs[1:]

    return program


def copies(effort: Effort) -> Callable[[jax.Array], jax.Array]:
    """A program of `calls` copies, each of the one before."""

    @jax.jit
    def program(x: jax.Array) -> jax.Array:
        for _ in range(effort.calls):
            x = jax.lax.optimization_barrier(x ^ jnp.uint32(1))
        return x

    return program


def copy_bandwidth(effort: Effort) -> float:
    """Bytes read and written per second by a copy."""
    program = copies(effort)
    x = jnp.zeros(effort.copy_bytes // 4, jnp.uint32)
    return 2 * effort.copy_bytes * effort.calls / seconds(lambda: program(x), effort)


def gemm_rate(effort: Effort) -> float:
    """FLOP/s of a bfloat16 GEMM of random data."""
    names = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(name, (effort.gemm, effort.gemm), jnp.bfloat16) for name in names)

    program = chained(lambda a, b, _: jnp.dot(a, b), 1, effort)
    return 2 * effort.gemm**3 * effort.calls / seconds(lambda: program(a, b, [()]), effort)


def row_error(got: Any, want: Any) -> float:
    """Largest |got - want| / |want| of a row; infinite where a row is not finite."""
    got, want = (np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64) for x in (got, want))
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    return float(np.where(np.isfinite(got).all(axis=-1), error, np.inf).max())


def checked(error: float) -> float:
    """Raises RuntimeError when an error is beyond the tolerance."""
    if not error <= TOLERANCE:
        raise RuntimeError(f"a row is off by {error:.3g} of its norm, tolerance {TOLERANCE:g}")
    return error
