"""How it is measured: medians over runs of several milliseconds, beside a device copy and a GEMM of the same call."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = 2e-2  # relative error of a row
COPY_SECONDS, GEMM_SECONDS = 0.5e-3, 1.3e-3  # of one copy and one GEMM of FULL, about: how many fill a run


INTERPRETER_DEVICES = 8


def interpret_on_cpu() -> None:
    """Takes the CPU, before JAX starts, for kernels under the interpreter. That blocks a thread of JAX's for each
    warpgroup that waits, and JAX has two at least, else as many as devices: a kernel of three would never end."""
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", INTERPRETER_DEVICES)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is done for one figure.

    run_seconds  of a run, at least: what starting one takes, some tens of microseconds, is shared by all of its calls
    most_calls   in one program, of which a run then takes several: compiling it grows faster than their number
    runs         at most; the median counts
    seconds      of runs, about: long ones are fewer, but five
    cold_bytes   of inputs, at least, between two uses of one, as far as the calls reach: many times the L2
    copy_bytes   of the copy that is the bound
    gemm         its three sizes
    """

    run_seconds: float = 5e-3
    most_calls: int = 128
    runs: int = 15
    seconds: float = 0.3
    cold_bytes: int = 512 * 2**20
    copy_bytes: int = 2**30
    gemm: int = 8192

    def calls(self, expected: float) -> int:
        """In one program, of something that should take so many seconds."""
        return max(1, min(self.most_calls, math.ceil(self.run_seconds / expected)))

    def sets(self, size: int, calls: int) -> int:
        """How many sets of inputs of so many bytes the calls of a program use in turn."""
        return min(calls, -(-self.cold_bytes // size))


FULL = Effort()
TINY_EFFORT = Effort(run_seconds=1e-9, most_calls=1, runs=1, seconds=0.0, cold_bytes=1, copy_bytes=4096, gemm=64)


def seconds(run: Callable[[], Any], effort: Effort) -> float:
    """Time of one program: the median of several runs, in each of which it is started as often as makes it last;
    `run` starts it and returns what is to be waited for."""
    jax.block_until_ready(run())  # compiles

    def timed(times: int) -> float:
        out = None
        start = time.perf_counter()
        for _ in range(times):
            out = run()
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / times

    first = timed(1)
    if effort.runs == 1:
        return first
    times = max(1, math.ceil(effort.run_seconds / first))
    if times > 1:  # one alone was mostly its start
        times = max(1, math.ceil(effort.run_seconds / timed(times)))
    taken = [timed(times) for _ in range(min(effort.runs, max(5, int(effort.seconds / (times * first)))))]
    return statistics.median(taken)


def chained(call: Callable[..., Any], sets: int, calls: int) -> Callable[..., Any]:
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
        for i in range(calls):
            x, shared, _ = jax.lax.optimization_barrier((x, shared, outs[-1]))
            outs.append(once(x, shared, own[i % sets]))
        return outs[1:]

    return program


def copies(calls: int) -> Callable[[jax.Array], jax.Array]:
    """A program of `calls` copies, each of the one before."""

    @jax.jit
    def program(x: jax.Array) -> jax.Array:
        for _ in range(calls):
            x = jax.lax.optimization_barrier(x ^ jnp.uint32(1))
        return x

    return program


def copy_bandwidth(effort: Effort) -> float:
    """Bytes read and written per second by a copy."""
    calls = effort.calls(COPY_SECONDS)
    program = copies(calls)
    x = jnp.zeros(effort.copy_bytes // 4, jnp.uint32)
    return 2 * effort.copy_bytes * calls / seconds(lambda: program(x), effort)


def gemm_program(calls: int) -> Callable[..., Any]:
    return chained(lambda a, b, _: jnp.dot(a, b), 1, calls)


def gemm_rate(effort: Effort) -> float:
    """FLOP/s of a bfloat16 GEMM of random data."""
    names = jax.random.split(jax.random.key(0, impl="rbg"), 2)
    a, b = (jax.random.normal(name, (effort.gemm, effort.gemm), jnp.bfloat16) for name in names)
    calls = effort.calls(GEMM_SECONDS)
    program = gemm_program(calls)
    return 2 * effort.gemm**3 * calls / seconds(lambda: program(a, b, [()]), effort)


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
