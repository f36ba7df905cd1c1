"""From kernels to programs that can be timed: many calls in one dispatch, one after another, none optimized away.

On a GPU the calls are unrolled, in an order that `IssueOrder` keeps; decode attention beside a GEMM is on a stream of
its own, and a collective is asynchronous, as in a step. XLA's CPU compiler drops barriers and would merge equal calls,
so there the calls are a loop in which every turn depends on the one before, and a pair is two loops that XLA may run at
once.
"""

from __future__ import annotations

import re
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

from nanoflow_jax.plan.plan import Lane, NanoBatch, SchedulePlan
from nanoflow_jax.profile.kernels import Kernel
from nanoflow_jax.step.compile import Option, compile_step
from nanoflow_jax.step.order import IssueOrder

STREAM = 1
STREAMS = SchedulePlan("pair", (NanoBatch(None, "reduce"),), lanes={"GEMV": Lane(STREAM)})  # names the options
ROUNDS = 4  # of a pair, in one program
OPCODE = re.compile(r"^\s+(?:ROOT )?%\S+ = (?:\(.*?\)|\S+) ([a-z][a-z\-]*)\(")
NOTHING_RUNS = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier")
DONATED = {"": (), "shared": (0,), "own": (1,)}  # arguments of `chained`
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
        """How many sets of inputs the calls use in turn, so that none finds its own in the L2. What is updated in place
        is one set, as in a step: the kernel before has just written it."""
        if not self.l2_bytes or kernel.in_place == "own":
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
    compiled = compile_single(bench, kernel, calls)
    inputs = _inputs(bench, kernel, bench.sets(kernel, calls), kernel.network)

    def run(times: int) -> None:
        out = None
        for _ in range(times):
            out = compiled(*inputs)
            for i in DONATED[kernel.in_place]:
                inputs[i] = out
        jax.block_until_ready(out)

    return Program(run, (calls,))


def pair(bench: Bench, first: Kernel, second: Callable[[int], Kernel]) -> Callable[[int, int], Program]:
    """(calls of the first, of the second) -> a program in which they run at once; 0 calls: the other alone.

    second  (n) -> the kernel with n times the work. On a GPU that is what n calls of it are: it starts once in a
            round, and whatever is beside it is beside all of it.
    """
    if not bench.gpu:
        loop = _Loops(bench, (first, second(1)))
        return lambda a, b: Program(lambda times: loop.run(times * a, times * b), (a, b))

    def build(a: int, b: int) -> Program:
        other = second(max(b, 1))
        compiled = compile_pair(bench, first, other, a, min(b, 1))
        if a and b:
            check_beside(compiled.as_text() or "")
        one, two = (_inputs(bench, k, bench.sets(k, ROUNDS), other.network) for k in (first, other))

        def run(times: int) -> None:
            out = None
            for _ in range(times):
                out = compiled(one, two)
                if b and other.in_place:
                    two[1] = out[1]
            jax.block_until_ready(out)

        return Program(run, (a * ROUNDS, b * ROUNDS))

    return build


def compile_single(bench: Bench, kernel: Kernel, calls: int, options: Mapping[str, Option] | None = None) -> Any:
    """(shared, sets) -> what `chained` gives."""
    avals = _avals(bench, kernel, bench.sets(kernel, calls), kernel.network)
    program, donated = partial(chained, kernel, calls), DONATED[kernel.in_place]
    return compile_for_gpu(bench, program, avals, kernel.network, donated, options)


def compile_pair(
    bench: Bench, first: Kernel, second: Kernel, a: int, b: int, options: Mapping[str, Option] | None = None
) -> Any:
    """(inputs of the first, of the second) -> what `side_by_side` gives."""
    avals = [_avals(bench, kernel, bench.sets(kernel, ROUNDS), second.network) for kernel in (first, second)]
    program, donated = partial(side_by_side, first, second, a, b), (1,) if b and second.in_place else ()
    return compile_for_gpu(bench, program, avals, second.network, donated, options)


def chained(kernel: Kernel, calls: int, shared: Any, own: list[Any]) -> Any:
    """`calls` calls in order, their inputs in turn. All results, or the inputs that they replace: XLA drops what no
    result depends on, barrier or not."""
    order, own, results = IssueOrder(True), [*own], []
    once = jax.jit(kernel.call, inline=True)  # traced once: a Mosaic kernel takes half a second
    for i in range(calls):
        out = order.run(once, shared, own[i % len(own)])
        if kernel.in_place == "shared":
            shared = out
        elif kernel.in_place == "own":
            own[i % len(own)] = out
        else:
            results.append(out)
    return {"shared": shared, "own": own, "": results}[kernel.in_place]


def side_by_side(first: Kernel, second: Kernel, a: int, b: int, one: Any, two: Any) -> Any:
    """ROUNDS rounds of `a` calls of the first on the main stream beside `b` (0 or 1) of the second: a collective, or a
    kernel on a stream of its own. A round ends when both have. All results, and the second's own inputs when they are
    replaced.

    XLA schedules collectives by their latency, and other streams not at all: it starts one of those as soon as all of
    its inputs are there, but takes them as late as it can. So they go through a barrier that the first's calls wait
    for; what reads them at the end keeps the last barrier in place.
    """
    order, results = IssueOrder(True), []
    calls = [jax.jit(kernel.call, inline=True) for kernel in (first, second)]
    streamed: Callable[..., Any] = compute_on(
        calls[1], compute_type=f"gpu_stream:{STREAM}", out_memory_spaces=jax.memory.Space.Device
    )
    pinned = bool(a and b) and not second.network
    (shared, mine), (beside, own) = one, [two[0], [*two[1]]]
    for r in range(ROUNDS if a or b else 0):
        started, k = None, r % len(own)
        if pinned:
            beside, own = order.beside(lambda *ready: ready, beside, own)
            started = streamed(beside, own[k])
            beside, own, mine = order.wait((beside, own, mine))
        elif b:
            issue = order.start if second.network else order.beside
            started = issue(calls[1] if second.network else streamed, beside, own[k])
        for i in range(a):
            results.append(order.run(calls[0], shared, mine[(r * a + i) % len(mine)]))  # noqa: PERF401
        if b and second.in_place:
            own[k] = order.wait(started)
        elif b:
            results.append(order.wait(started))
    if pinned:
        results.append(order.run(_first_numbers, beside, own))
    return results, own if b and second.in_place else None


def _first_numbers(*inputs: Any) -> jax.Array:
    return jnp.stack([leaf.reshape(-1)[0].astype(jnp.float32) for leaf in jax.tree.leaves(inputs)])


def issued(hlo: str) -> str:
    """What a scheduled program issues, in order: S and D for the start and the end of what runs beside the main stream,
    C for a copy, K for anything else that runs: a kernel, or a collective that XLA made synchronous."""
    found = []
    for line in hlo.rpartition("\nENTRY")[2].splitlines()[1:]:
        if (match := OPCODE.search(line)) and match[1] not in NOTHING_RUNS:
            end = match[1].rpartition("-")[2] if 'is_sync":true' not in line else ""
            found.append({"start": "S", "done": "D", "copy": "C"}.get(end, "K"))
    return "".join(found)


def check_beside(hlo: str) -> None:
    """Raises ValueError unless each round starts the second, runs the first and then waits for the second."""
    if not re.fullmatch(f"(SC*K[KC]*D){{{ROUNDS}}}K?", found := issued(hlo)):
        raise ValueError(f"compiled, the two do not run side by side: {found[:60]}")


def compile_for_gpu(
    bench: Bench, program: Callable[..., Any], avals: Any, network: bool, donated: tuple[int, ...],
    options: Mapping[str, Option] | None,
) -> Any:  # fmt: skip
    """Compiles as a step is, for the mesh's first device, or with collectives for all of them; a collective starts
    where it is issued."""
    if network:
        # Local arrays, the same on every device: collectives see what they would in a step.
        program = jax.shard_map(program, mesh=bench.mesh, in_specs=P(), out_specs=P(), check_vma=False)
    jitted = jax.jit(program, donate_argnums=donated)
    return compile_step(jitted.lower(*avals), "gpu", STREAMS, pin_starts=True, options=options)


def _inputs(bench: Bench, kernel: Kernel, sets: int, network: bool) -> list[Any]:
    """[shared, sets]."""
    return [*jax.device_put(kernel.make(sets), placement(bench, network))]


def _avals(bench: Bench, kernel: Kernel, sets: int, network: bool) -> list[Any]:
    where = placement(bench, network)
    made = jax.eval_shape(partial(kernel.make, sets))
    return [*jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), made)]


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
        self.donate = kernels[0].in_place == "shared" and len(kernels) == 1
        jitted = jax.jit(program, donate_argnums=(1,) if self.donate else ())
        self.compiled = jitted.lower(self._counts(1), *self._arguments()).compile()

    def run(self, *turns: int) -> None:
        out = jax.block_until_ready(self.compiled(self._counts(*turns), *self._arguments()))
        if self.donate:
            self.inputs[0][0] = out[0]

    def _counts(self, *turns: int) -> jax.Array:
        return jax.device_put(jnp.asarray(list(turns) * (len(self.kernels) // len(turns)), jnp.int32), self.turns)

    def _arguments(self) -> list[Any]:
        return [part for pair in self.inputs for part in pair]

    def _program(self, turns: jax.Array, *inputs: Any) -> Any:
        if self.donate:
            kernel, (shared, own) = self.kernels[0], inputs
            return lax.fori_loop(0, turns[0], lambda _, pool: kernel.call(pool, own[0]), shared), turns
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
