"""The runner: weights, pages, slots and compiled steps on the devices."""

from __future__ import annotations

import atexit
import contextlib
import logging
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanoflow_jax.models.layout import ModelParams, page_tables
from nanoflow_jax.parallel.mesh import AXIS, replicated
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.compile import Program, compile_step
from nanoflow_jax.step.extras import MASK_SPECS, Extra, Logprobs, Sample, Score, room_for_masks, wanted
from nanoflow_jax.step.kernel_inputs import NO_PAGE
from nanoflow_jax.step.logprobs import no_scores
from nanoflow_jax.step.sampler import Masks, Sampled, StepOutput
from nanoflow_jax.step.slots import KVCache, StepInputs, StepState, pack
from nanoflow_jax.step.trace import StepEnd
from nanoflow_jax.system.progress import Progress

logger = logging.getLogger("nanoflow_jax")

COMPILE_THREADS = 4  # XLA compiles without the interpreter's lock
PAGES_PER_COPY = 8  # pages that one call of the copy programs moves

_RUNNERS: weakref.WeakSet[Runner] = weakref.WeakSet()
# What the latest steps give, of runners that are gone, too: small, and ready when the step has run.
_LATEST: deque[StepOutput] = deque(maxlen=4)


@atexit.register
def _wait_for_steps() -> None:
    """A process that ends while a step runs (one that nobody waits for any more) would abort in XLA's threads."""
    for runner in list(_RUNNERS):
        with contextlib.suppress(Exception):  # it failed, or was donated to one that failed
            jax.block_until_ready(runner.state)
    for output in list(_LATEST):
        with contextlib.suppress(Exception):
            jax.block_until_ready(output)
            np.asarray(output.sampled.tokens)  # their copy to the host ends later still


@dataclass(frozen=True)
class Begun:
    """A step whose layers have been dispatched."""

    shape: StepShape
    inputs: StepInputs
    packed: np.ndarray
    end: StepEnd


class Runner:
    """Runs steps of a few shapes, all compiled before the first one runs; what some rows want beyond the likeliest
    token (`step.extras`) is compiled when first wanted. Nothing here waits for the device."""

    def __init__(
        self,
        program: Program,
        params: ModelParams,
        shapes: Sequence[StepShape],
        progress: bool,
    ):
        mesh, num_pages = program.mesh, program.num_pages
        self._program, self._extras = program, {}
        self.mesh, self.sizes, self.num_pages, self.page_size = mesh, program.sizes, num_pages, program.page_size
        self._params = tuple(jax.tree.leaves(params))
        self._replicated = replicated(mesh)
        self.on_dispatch: Callable[[np.ndarray], None] | None = None  # is shown each step's packed inputs
        self._steps = compile_steps(program, shapes, progress)
        abstract = program.state
        self._zeros = jax.jit(
            lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract),
            out_shardings=jax.tree.map(lambda a: a.sharding, abstract),
        )
        self.state: StepState = self._zeros()
        self._no_scores = jax.jit(no_scores, static_argnums=(0,), out_shardings=self._replicated)
        _RUNNERS.add(self)
        # One page: [depth, 2 (K, V), KV groups, page_size, d], of as many layers as share one.
        self.page_sharding = NamedSharding(mesh, P(None, None, AXIS))
        first = np.arange(page_tables(program.spec.config).depth, dtype=np.int32) * num_pages  # page of each layer
        self._extract = jax.jit(partial(_extract, first), out_shardings=(self.page_sharding,) * PAGES_PER_COPY)
        self._insert = jax.jit(partial(_insert, first), donate_argnums=(0,))

    def dispatch(self, shape: StepShape, inputs: StepInputs) -> StepOutput:
        """Starts one step. Returns its output, whose tokens are on their way to the host."""
        return self.finish(self.begin(shape, inputs))

    def begin(self, shape: StepShape, inputs: StepInputs) -> Begun:
        """Starts a step's layers alone. `finish` must come next."""
        packed = pack(inputs)
        if self.on_dispatch is not None:
            self.on_dispatch(packed)
        self.state, end = self._steps[shape](self._params, self.state, packed)
        return Begun(shape, inputs, packed, end)

    def finish(self, begun: Begun, allowed: Mapping[int, np.ndarray] | None = None) -> StepOutput:
        """Starts what comes after the layers. allowed: of constrained rows, the tokens that they may have, as bits of
        uint8 (`Masks`); what is beyond their end is not allowed."""
        shape, packed, end = begun.shape, begun.packed, begun.end
        tokens, logprobs, scores = end.tokens, None, None
        rows = wanted(begun.inputs, self.sizes)
        sample, masks = rows.sample, list[Masks]()
        if allowed:
            masks.append(self._masks(shape.sampled_rows, end.logits.shape[1], allowed))
            sample = replace(sample or Sample(False, False), masks=masks[0].bits.shape[0])
        if sample is not None:
            slots, tokens = self._extra(sample, shape)(self.state.slots, packed, end.logits, *masks)
            self.state = replace(self.state, slots=slots)
        tokens.copy_to_host_async()
        if rows.logprobs:
            logprobs = self._extra(Logprobs(), shape)(packed, end.logits, tokens)
        if rows.chunks:
            so_far = self._no_scores(shape.prefill_rows)
            for _ in range(rows.chunks):
                so_far = self._extra(Score(), shape)(self._params, packed, end.hidden, so_far)
            scores = so_far.logprobs
        output = StepOutput(Sampled(tokens, logprobs), scores)
        _LATEST.append(output)
        return output

    def _masks(self, count: int, vocab: int, allowed: Mapping[int, np.ndarray]) -> Masks:
        room = room_for_masks(len(allowed), count)
        bits, rows = np.zeros((room, vocab // 8), np.uint8), np.full(count, room, np.int32)
        for number, (row, mask) in enumerate(allowed.items()):
            rows[row] = number
            bits[number, : len(mask)] = mask[: vocab // 8]
        if self.on_dispatch is not None:
            self.on_dispatch(bits)
        sharding = NamedSharding(self.mesh, MASK_SPECS.bits)  # each process has the whole, and gives its devices theirs
        return Masks(jax.make_array_from_callback(bits.shape, sharding, bits.__getitem__), rows)

    def _extra(self, extra: Extra, shape: StepShape) -> Any:
        key = extra, shape
        if key not in self._extras:
            logger.info("compiling %s for %d + %d rows", extra, shape.decode_rows, shape.prefill_rows)
            self._extras[key] = compile_extra(self._program, extra, shape)
        return self._extras[key]

    def reset(self) -> None:
        """Fresh pages and slots: what was in them is lost. After a step that failed or was interrupted."""
        for array in jax.tree.leaves(self.state):  # first: there is not room for both
            if not array.is_deleted():
                array.delete()
        self.state = self._zeros()

    def extract(self, pages: Sequence[int]) -> list[jax.Array]:
        """Copies of pages, each [layers, 2, KV groups, page_size, d], as they are after the steps dispatched so far."""
        out: list[jax.Array] = []
        for at in range(0, len(pages), PAGES_PER_COPY):
            some = np.zeros(PAGES_PER_COPY, np.int32)
            count = len(pages[at : at + PAGES_PER_COPY])
            some[:count] = pages[at : at + PAGES_PER_COPY]
            out += self._extract(self.state.cache, jax.device_put(some, self._replicated))[:count]
        return out

    def insert(self, pages: Sequence[int], contents: Sequence[Any]) -> None:
        """Writes what `extract` gave into pages."""
        for at in range(0, len(pages), PAGES_PER_COPY):
            some = np.full(PAGES_PER_COPY, NO_PAGE, np.int32)
            here = list(contents[at : at + PAGES_PER_COPY])
            some[: len(here)] = pages[at : at + PAGES_PER_COPY]
            here += here[:1] * (PAGES_PER_COPY - len(here))  # dropped
            on_device = tuple(jax.device_put(x, self.page_sharding) for x in here)
            cache = self._insert(self.state.cache, jax.device_put(some, self._replicated), on_device)
            self.state = replace(self.state, cache=cache)


def compile_steps(program: Program, shapes: Sequence[StepShape], progress: bool) -> dict[StepShape, Any]:
    """The step of each shape, compiled."""
    mesh, spec = program.mesh, program.spec
    platform = mesh.devices.flat[0].platform
    # One device has no collectives to order, but may have a lane.
    ordered = platform == "gpu" and (mesh.size > 1 or spec.rank_of is not None or bool(spec.plan.lanes))

    def compile_for(shape: StepShape) -> Any:
        lowered = program.lower(shape, enforce_order=ordered)
        return compile_step(lowered, platform, spec.plan, pin_starts=ordered)

    steps: dict[StepShape, Any] = {}
    with (
        Progress(len(shapes), "compiling steps", "shapes", progress) as bar,
        ThreadPoolExecutor(COMPILE_THREADS) as pool,
    ):
        for shape, compiled in zip(shapes, pool.map(compile_for, shapes), strict=True):
            steps[shape] = compiled
            bar.advance(note=f"{shape.decode_rows} decode + {shape.prefill_rows} prefill rows")
    return steps


def compile_extra(program: Program, extra: Extra, shape: StepShape) -> Any:
    return compile_step(program.lower_extra(extra, shape), program.mesh.devices.flat[0].platform, None)


def _extract(first: np.ndarray, cache: KVCache, pages: jax.Array) -> tuple[jax.Array, ...]:
    """first [layers]: page of each layer in the pool."""
    at = first[:, None] + pages[None, :]  # [layers, n]
    both = jnp.stack([cache.k[at], cache.v[at]], axis=1)  # [layers, 2, n, g, page_size, d]
    return tuple(both[:, :, i] for i in range(PAGES_PER_COPY))


def _insert(first: np.ndarray, cache: KVCache, pages: jax.Array, contents: tuple[jax.Array, ...]) -> KVCache:
    at = (first[None, :] + pages[:, None]).reshape(-1)  # [n * layers]
    new = jnp.stack(contents)  # [n, layers, 2, g, page_size, d]

    def write(which: int, old: jax.Array) -> jax.Array:
        return old.at[at].set(new[:, :, which].reshape(-1, *old.shape[1:]), mode="drop")

    return KVCache(write(0, cache.k), write(1, cache.v))
