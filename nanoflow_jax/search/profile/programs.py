"""From kernels to programs that can be timed: many calls in one dispatch, one after another, none optimized away.

On a GPU the calls are unrolled, in an order that `IssueOrder` keeps; decode attention beside a GEMM is on a stream of
its own, as in a step. XLA's CPU compiler drops barriers and would merge equal calls, so there the calls are a loop in
which every turn depends on the one before, and a pair is two loops that XLA may run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.compute_on import compute_on
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanoflow_jax.schedule.compile import Option, compile_step
from nanoflow_jax.schedule.order import IssueOrder
from nanoflow_jax.schedule.plan import Lane, NanoBatch, SchedulePlan
from nanoflow_jax.search.profile.kernels import Kernel

STREAM = 1
STREAMS = SchedulePlan("pair", (NanoBatch(None, "reduce"),), lanes={"GEMV": Lane(STREAM)})  # names the options
ROUNDS = 4  # of a pair, in one program
COLD_L2S = 4  # bytes that pass through memory between two uses of a set, in sizes of the L2


@dataclass(frozen=True)
class Bench:
    """Where programs run. mesh: all devices; ops that are no collectives run on its first. l2_bytes 0: inputs need not
    be rotated. gpu: unrolled programs, streams and XLA's GPU options; else loops."""

    mesh: Mesh
    gpu: bool
    l2_bytes: int = 0
    most_bytes: int = 2**32  # of rotated inputs

    def sets(self, kernel: Kernel, calls: int) -> int:
        """How many sets of inputs the calls use in turn, so that none finds its own in the L2."""
        if not self.l2_bytes:
            return 1
        wanted = -(-COLD_L2S * self.l2_bytes // kernel.set_bytes) + 1
        return max(1, min(wanted, calls, self.most_bytes // kernel.set_bytes))


@dataclass
class Program:
    """A compiled program and its inputs. `run(times)` runs it and waits; each time is `calls` calls of each kernel."""

    run: Callable[[int], None]
    calls: tuple[int, ...]


def single(bench: Bench, kernel: Kernel, calls: int) -> Program:
    """`calls` calls of one kernel per run on a GPU; on a CPU each is a turn of a loop."""
    if not bench.gpu:
        loop = _Loops(bench, (kernel,))
        return Program(lambda times: loop.run(times), (1,))
    sets = bench.sets(kernel, calls)
    shared, own = _inputs(bench, kernel, sets, kernel.network)
    compiled = compile_for_gpu(bench, partial(chained, kernel, calls), (shared, own), kernel.network, kernel.in_place)

    def run(times: int) -> None:
        nonlocal shared
        out = None
        for _ in range(times):
            out = compiled(shared, own)
            if kernel.in_place:
                shared, out = out
        jax.block_until_ready(out)

    return Program(run, (calls,))


def pair(bench: Bench, first: Kernel, second: Kernel) -> Callable[[int, int], Program]:
    """(calls of the first, calls of the second) -> a program in which they run at once; 0 calls: the other alone."""
    network = first.network or second.network
    if not bench.gpu:
        loop = _Loops(bench, (first, second))
        return lambda a, b: Program(lambda times: loop.run(times * a, times * b), (a, b))

    def build(a: int, b: int) -> Program:
        inputs = [_inputs(bench, k, bench.sets(k, max(n, 1)), network) for k, n in ((first, a), (second, b))]
        compiled = compile_for_gpu(bench, partial(side_by_side, first, second, a, b), inputs, network)

        def run(times: int) -> None:
            out = None
            for _ in range(times):
                out = compiled(*inputs)
            jax.block_until_ready(out)

        return Program(run, (a * ROUNDS, b * ROUNDS))

    return build


def chained(kernel: Kernel, calls: int, shared: Any, own: list[Any]) -> Any:
    """`calls` calls in order, their inputs in turn. All results, after the shared inputs when those are updated: XLA
    drops what no result depends on, barrier or not."""
    order, results = IssueOrder(True), []
    once = jax.jit(kernel.call, inline=True)  # traced once: a Mosaic kernel takes half a second
    for i in range(calls):
        out = order.run(once, shared, own[i % len(own)])
        if kernel.in_place:
            shared, out = out
        results.append(out)
    return (shared, results) if kernel.in_place else results


def side_by_side(first: Kernel, second: Kernel, a: int, b: int, one: Any, two: Any) -> Any:
    """ROUNDS rounds of `a` calls of the first on the main stream beside `b` of the second: a collective, or a kernel
    on a stream of its own. A round ends when both have. All results."""
    order, results = IssueOrder(True), []
    calls = [jax.jit(kernel.call, inline=True) for kernel in (first, second)]

    def beside(shared: Any, own: list[Any]) -> Any:
        return _in_turn(calls[1], b, shared, own)

    streamed = compute_on(beside, compute_type=f"gpu_stream:{STREAM}", out_memory_spaces=jax.memory.Space.Device)
    start = beside if second.network else streamed
    for _ in range(ROUNDS):
        started = order.start(start, *two) if b else None
        for i in range(a):
            results.append(order.run(calls[0], one[0], one[1][i % len(one[1])]))  # noqa: PERF401
        results.append(order.wait(started) if b else None)
    return results


def _in_turn(call: Callable[[Any, Any], Any], count: int, shared: Any, own: list[Any]) -> list[Any]:
    results = [call(shared, own[0])]
    for i in range(1, count):
        ready, results[-1] = lax.optimization_barrier((own[i % len(own)], results[-1]))
        results.append(call(shared, ready))
    return results


def compile_for_gpu(
    bench: Bench, program: Callable[..., Any], inputs: Any, network: bool, donate_first: bool = False,
    options: Mapping[str, Option] | None = None,
) -> Any:  # fmt: skip
    """Compiles as a step is, for the mesh's first device, or with collectives for all of them; what runs on another
    stream starts where it is issued. `inputs` may be abstract."""
    if network:
        # Local arrays, the same on every device: collectives see what they would in a step.
        program = jax.shard_map(program, mesh=bench.mesh, in_specs=P(), out_specs=P(), check_vma=False)
    jitted = jax.jit(program, donate_argnums=(0,) if donate_first else ())
    return compile_step(jitted.lower(*inputs), "gpu", STREAMS, pin_starts=True, options=options)


def _inputs(bench: Bench, kernel: Kernel, sets: int, network: bool) -> Any:
    make = partial(kernel.make, sets)
    return jax.jit(make, out_shardings=placement(bench, network))()


def placement(bench: Bench, network: bool) -> NamedSharding:
    """On every device, or on the first alone."""
    mesh = bench.mesh if network else Mesh(bench.mesh.devices.flat[:1], bench.mesh.axis_names)
    return NamedSharding(mesh, P())


class _Loops:
    """One loop per kernel in one program, with turns given at run time: compiled once for all numbers of calls."""

    def __init__(self, bench: Bench, kernels: tuple[Kernel, ...]):
        self.kernels, network = kernels, any(kernel.network for kernel in kernels)
        self.inputs = [_inputs(bench, kernel, 1, network) for kernel in kernels]
        self.turns = placement(bench, network)
        program = self._program
        if network:
            program = jax.shard_map(program, mesh=bench.mesh, in_specs=P(), out_specs=P(), check_vma=False)
        self.donate = kernels[0].in_place and len(kernels) == 1
        jitted = jax.jit(program, donate_argnums=(1,) if self.donate else ())
        self.compiled = jitted.lower(self._counts(1), *self._arguments()).compile()

    def run(self, *turns: int) -> None:
        out = jax.block_until_ready(self.compiled(self._counts(*turns), *self._arguments()))
        if self.donate:
            self.inputs = [(out[0], self.inputs[0][1])]

    def _counts(self, *turns: int) -> jax.Array:
        return jax.device_put(jnp.asarray(list(turns) * (len(self.kernels) // len(turns)), jnp.int32), self.turns)

    def _arguments(self) -> list[Any]:
        return [part for pair in self.inputs for part in pair]

    def _program(self, turns: jax.Array, *inputs: Any) -> Any:
        if self.donate:
            kernel, (shared, own) = self.kernels[0], inputs
            return lax.fori_loop(0, turns[0], lambda _, pool: kernel.call(pool, own[0])[0], shared), turns
        pairs = zip(inputs[::2], inputs[1::2], strict=True)
        return [_loop(k, turns[i], *pair) for i, (k, pair) in enumerate(zip(self.kernels, pairs, strict=True))]


def _loop(kernel: Kernel, turns: jax.Array, shared: Any, own: list[Any]) -> jax.Array:
    """The first number of the last result. Each turn runs under a condition on that number of the turn before, which
    no compiler can move out of the loop."""
    result = jax.eval_shape(kernel.call, shared, own[0])

    def turn(_: jax.Array, last: jax.Array) -> jax.Array:
        out = lax.cond(
            last < jnp.inf,
            kernel.call,
            lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result),
            shared,
            own[0],
        )
        return jax.tree.leaves(out)[0].reshape(-1)[0].astype(jnp.float32)

    return lax.fori_loop(0, turns, turn, jnp.float32(0))
