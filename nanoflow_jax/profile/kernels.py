"""How each point runs: a function of local arrays, and the arrays. They are those of the step: the same GEMM, kernels
and collectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import (
    add_rms_norm,
    append_kv,
    combine_rows,
    decode_attention,
    gather_rows,
    grouped_gemm,
    prefill_attention,
)
from kernels_pallas.gate import Gate
from kernels_pallas.group_tiles import GROUP_ROWS, list_tiles
from nanoflow_jax.models import parts
from nanoflow_jax.parallel import collectives
from nanoflow_jax.profile.points import BYTES, Point
from nanoflow_jax.step.attention import norm_fits
from nanoflow_jax.step.sampler import likeliest

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
COLLECTIVES = {
    "all-gather": collectives.all_gather_rows,
    "all-reduce": collectives.all_reduce,
    "reduce-scatter": collectives.reduce_scatter_rows,
}
COLUMNS = 1024  # of a collective's rows, at most; what counts is its bytes


@dataclass(frozen=True)
class Kernel:
    """make   (number of sets) -> (shared, sets): random inputs that all calls share, and what each call takes in turn
    call      (shared, one set) -> result
    in_place  which of its inputs the result replaces on a GPU, where they are donated: "shared", "own" (the set), or ""
    set_bytes of one set and what it reads of the shared inputs
    network   it is a collective, and runs on all devices of a mesh
    """

    make: Callable[[int], tuple[Any, list[Any]]]
    call: Callable[[Any, Any], Any]
    set_bytes: int
    in_place: Literal["", "shared", "own"] = ""
    network: bool = False


def kernel(point: Point, page_size: int, backend: str) -> Kernel:
    """The kernel of a point; `backend` of those that have two: "xla" or "mosaic"."""
    return _BUILDERS[point.op](point, page_size, backend)


@partial(jax.jit, static_argnums=(1, 2))
def _random(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """One program for all of a shape, by the generator that XLA compiles fastest."""
    return jax.random.normal(jax.random.key(seed, impl="rbg"), shape, jnp.float32).astype(dtype)


def _copy(point: Point, *_: Any) -> Kernel:
    count = point["bytes"] // 4

    def make(sets: int) -> tuple[Any, list[Any]]:
        return (), [jnp.full(count, i, jnp.uint32) for i in range(sets)]

    return Kernel(make, lambda _, x: x ^ jnp.uint32(1), 2 * count * 4)


def _gemm(point: Point, *_: Any) -> Kernel:
    m, n, k, dtype = point["m"], point["n"], point["k"], DTYPES[point["dtype"]]

    def make(sets: int) -> tuple[Any, list[Any]]:
        return (), [(_random(2 * i, (m, k), dtype), _random(2 * i + 1, (n, k), dtype)) for i in range(sets)]

    return Kernel(make, lambda _, own: parts.contract(own[0], own[1], 1), (m * k + n * k) * BYTES[point["dtype"]])


def _page_sets(sets: int, rows: int, pages: int) -> list[jax.Array]:
    """Page tables [rows, pages], in no order, no two with a page in common."""
    names = np.random.default_rng(7).permutation(sets * rows * pages).astype(np.int32)
    return [jnp.asarray(table) for table in names.reshape(sets, rows, pages)]


def _pool(point: Point, pages: int, page_size: int) -> tuple[jax.Array, jax.Array]:
    shape, dtype = (pages, point["kv_heads"], page_size, point["head_dim"]), DTYPES[point["dtype"]]
    return _random(1, shape, dtype), _random(2, shape, dtype)


def _decode(point: Point, page_size: int, backend: str) -> Kernel:
    rows, context = point["requests"], point["context"]
    pages = -(-context // page_size)
    # Only the Mosaic kernel takes a budget; 0 is all SMs.
    options = {"sm_budget": point["sms"]} if backend == "mosaic" and point["sms"] else {}
    attend = partial(decode_attention, backend=backend, **options)

    def make(sets: int) -> tuple[Any, list[Any]]:
        shape = (rows, point["q_heads"], point["head_dim"])
        lengths = jnp.full(rows, context, jnp.int32)
        own = [
            (_random(10 + i, shape, DTYPES[point["dtype"]]), table, lengths)
            for i, table in enumerate(_page_sets(sets, rows, pages))
        ]
        return _pool(point, sets * rows * pages, page_size), own

    return Kernel(make, lambda pool, own: attend(own[0], *pool, *own[1:])[0], _kv_bytes(point, rows * context))


def _prefill(point: Point, page_size: int, backend: str) -> Kernel:
    tokens, context = point["tokens"], point["context"]
    # Rows see `context` tokens on average: a segment's chunk stands at the end of its context, and is cut into more
    # segments where it is itself longer than that.
    segments = -(-tokens // (2 * context))
    while tokens % segments:
        segments += 1
    chunk = tokens // segments
    length = context + chunk // 2
    pages = -(-length // page_size)
    attend = partial(prefill_attention, backend=backend)

    def make(sets: int) -> tuple[Any, list[Any]]:
        shape = (tokens, point["q_heads"], point["head_dim"])
        starts = jnp.arange(segments + 1, dtype=jnp.int32) * chunk
        lengths = jnp.full(segments, length, jnp.int32)
        own = [
            (_random(10 + i, shape, DTYPES[point["dtype"]]), table, starts, lengths)
            for i, table in enumerate(_page_sets(sets, segments, pages))
        ]
        return _pool(point, sets * segments * pages, page_size), own

    return Kernel(make, lambda pool, own: attend(own[0], *pool, *own[1:]), _kv_bytes(point, segments * length))


def _kv_bytes(point: Point, tokens: int) -> int:
    return 2 * tokens * point["kv_heads"] * point["head_dim"] * BYTES[point["dtype"]]


def _append(point: Point, page_size: int, backend: str) -> Kernel:
    rows, dtype = point["rows"], DTYPES[point["dtype"]]
    write = partial(append_kv, backend=backend)

    def make(sets: int) -> tuple[Any, list[Any]]:
        shape = (rows, point["kv_heads"], point["head_dim"])
        slots = jnp.arange(rows, dtype=jnp.int32) % page_size
        own = [
            (_random(2 * i, shape, dtype), _random(2 * i + 1, shape, dtype), table[:, 0], slots)
            for i, table in enumerate(_page_sets(sets, rows, 1))
        ]
        return _pool(point, sets * rows, page_size), own

    return Kernel(make, lambda pool, own: write(*pool, *own), 2 * _kv_bytes(point, rows), in_place="shared")


def _norm(point: Point, _: int, backend: str) -> Kernel:
    shape, dtype = (point["rows"], point["hidden"]), DTYPES[point["dtype"]]

    def make(sets: int) -> tuple[Any, list[Any]]:
        weight = jnp.ones(point["hidden"], dtype)
        return weight, [(_random(2 * i, shape, dtype), _random(2 * i + 1, shape, dtype)) for i in range(sets)]

    takes = backend == "mosaic" and norm_fits(point["hidden"], 1)
    add = partial(add_rms_norm, eps=1e-5, backend="mosaic" if takes else "xla")

    def call(weight: jax.Array, own: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return add(*own, weight)

    return Kernel(make, call, 4 * shape[0] * shape[1] * BYTES[point["dtype"]])


def _sampling(point: Point, *_: Any) -> Kernel:
    """Greedy: what the throughput of a plan counts on."""
    rows, vocab = point["rows"], point["vocab"]

    def make(sets: int) -> tuple[Any, list[Any]]:
        return (), [_random(i, (rows, vocab), jnp.float32) for i in range(sets)]

    def call(_: Any, logits: jax.Array) -> jax.Array:
        with collectives.rank_slice(1):
            return likeliest(logits, jnp.int32(0))

    return Kernel(make, call, rows * vocab * 4)


def _aligned(rows: int) -> int:
    return -(-rows // GROUP_ROWS) * GROUP_ROWS


def _grouped(point: Point, _: int, backend: str) -> Kernel:
    """Rows fall to experts as they come. The list of tiles is there: a layer makes it once for two of these."""
    rows, experts, n, k, parts = (point[name] for name in ("rows", "experts", "n", "k", "parts"))
    dtype, mosaic = DTYPES[point["dtype"]], backend == "mosaic" and n % 64 == k % 64 == 0
    drawn = np.random.default_rng(0).multinomial(rows, [1 / experts] * experts)
    sizes = [_aligned(size) if mosaic else int(size) for size in drawn]
    places = max(_aligned(rows * point["room"]), sum(sizes))
    multiply = partial(grouped_gemm, gate=Gate() if parts == 2 else None, backend="mosaic" if mosaic else "xla")

    def make(sets: int) -> tuple[Any, list[Any]]:
        grouped = jnp.asarray(sizes, jnp.int32)
        weight = (experts, *((parts,) if parts == 2 else ()), n, k)
        own = [(_random(2 * i, (places, k), dtype), _random(2 * i + 1, weight, dtype)) for i in range(sets)]
        return (grouped, list_tiles(places, grouped) if mosaic else None), own

    def call(shared: tuple[jax.Array, jax.Array | None], own: tuple[jax.Array, jax.Array]) -> jax.Array:
        return multiply(*own, shared[0], tiles=shared[1])

    return Kernel(make, call, (experts * parts * n * k + rows * k) * BYTES[point["dtype"]])


def _gather(point: Point, _: int, backend: str) -> Kernel:
    rows, hidden, dtype = point["rows"], point["hidden"], DTYPES[point["dtype"]]
    used, mosaic = _aligned(rows), backend == "mosaic" and hidden % 64 == 0
    bring = partial(gather_rows, backend="mosaic" if mosaic else "xla")

    def make(sets: int) -> tuple[Any, list[Any]]:
        at = np.random.default_rng(7).integers(0, rows, _aligned(rows * point["room"]), np.int32)
        return (jnp.asarray(at), jnp.int32(used)), [_random(i, (rows, hidden), dtype) for i in range(sets)]

    return Kernel(make, lambda shared, x: bring(x, *shared), 2 * rows * hidden * BYTES[point["dtype"]])


def _combine(point: Point, _: int, backend: str) -> Kernel:
    """Each of a token's choices is on this device with the same chance."""
    shape, hidden, dtype = (point["rows"], point["choices"]), point["hidden"], DTYPES[point["dtype"]]
    rng, count = np.random.default_rng(0), point["rows"] * point["choices"]
    here = rng.permutation(count)[: max(1, count // point["spread"])]
    place = np.full(count, -1, np.int32)
    place[here] = rng.permutation(len(here))
    mosaic = backend == "mosaic" and hidden % 64 == 0
    add = partial(combine_rows, backend="mosaic" if mosaic else "xla")

    def make(sets: int) -> tuple[Any, list[Any]]:
        at = jnp.asarray(place.reshape(shape)), _random(1, shape, jnp.float32)
        return at, [_random(2 + i, (len(here), hidden), dtype) for i in range(sets)]

    size = (len(here) + shape[0]) * hidden * BYTES[point["dtype"]]
    return Kernel(make, lambda shared, x: add(x, *shared), size)


def _collective(point: Point, *_: Any) -> Kernel:
    elements, devices = point["bytes"] // BYTES[point["dtype"]], point["devices"]
    columns = max(c for c in range(1, COLUMNS + 1) if elements // devices % c == 0)
    rows = elements // columns  # of the whole tensor
    local = rows // devices if point["kind"] == "all-gather" else rows
    move = COLLECTIVES[point["kind"]]

    def make(sets: int) -> tuple[Any, list[Any]]:
        return (), [_random(i, (local, columns), DTYPES[point["dtype"]]) for i in range(sets)]

    # XLA sums in place: of an input that is needed again it makes a copy first. A step's is not.
    in_place = "own" if point["kind"] == "all-reduce" else ""
    return Kernel(make, lambda _, x: move(x), point["bytes"], in_place=in_place, network=True)


_BUILDERS: dict[str, Callable[..., Kernel]] = {
    "copy": _copy,
    "gemm": _gemm,
    "decode_attention": _decode,
    "prefill_attention": _prefill,
    "append": _append,
    "norm": _norm,
    "sampling": _sampling,
    "grouped_gemm": _grouped,
    "gather": _gather,
    "combine": _combine,
    "collective": _collective,
}
