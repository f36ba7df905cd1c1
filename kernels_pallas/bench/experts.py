"""The kernels of experts in the benchmark: their inputs, whether they are right, how long they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.bench.expert_cases import ExpertCase
from kernels_pallas.bench.measure import Effort, chained, checked, row_error, seconds
from kernels_pallas.combine_rows import combine_rows
from kernels_pallas.group_tiles import list_tiles
from kernels_pallas.grouped_gemm import gather_rows, grouped_gemm

CHECKED_ROWS = 8


def expert_call(case: ExpertCase, options: dict[str, Any]) -> Callable[..., jax.Array]:
    """(what all share, what goes with it, what a call has alone) -> the kernel's result, as `ExpertCase.avals` has
    them; options: that choose the backend."""

    def call(first: jax.Array, shared: tuple[jax.Array, ...], own: tuple[jax.Array, ...]) -> jax.Array:
        if case.kernel == "gather_rows":
            return gather_rows(own[0], first, *shared, **options)
        if case.kernel == "combine_rows":
            return combine_rows(own[0], first, *shared, **options)
        more = {"tiles": shared[1]} if options else {}
        gate, bias = (case.model.gate if case.part == "up" else None), (own[1] if case.model.bias else None)
        return grouped_gemm(first, own[0], shared[0], bias=bias, gate=gate, **more, **options)

    return call


_normal = jax.jit(jax.random.normal, static_argnums=(1, 2))


def make_inputs(case: ExpertCase, sets: int) -> tuple[jax.Array, tuple[jax.Array, ...], list[tuple[jax.Array, ...]]]:
    """Random: rows of experts, choices in any order, each in a row of its own."""
    first, _, own = case.avals()
    rng, names = np.random.default_rng(1), iter(jax.random.split(jax.random.key(0, impl="rbg"), 1 + sets * len(own)))

    def draw(aval: jax.ShapeDtypeStruct) -> jax.Array:
        return _normal(next(names), aval.shape, aval.dtype)

    drawn = [tuple(draw(aval) for aval in own) for _ in range(sets)]
    if case.kernel == "gather_rows":
        at = rng.integers(0, case.tokens, first.shape)
        return jnp.asarray(at, jnp.int32), (jnp.int32(case.places),), drawn
    if case.kernel == "combine_rows":
        place = np.full(case.tokens * case.model.choices, -1, np.int32)
        place[rng.permutation(place.size)[: case.rows]] = rng.permutation(case.rows)
        return jnp.asarray(place.reshape(first.shape)), (jnp.asarray(rng.random(first.shape), jnp.float32),), drawn
    sizes = jnp.asarray(case.sizes)
    return draw(first), (sizes, list_tiles(case.places, sizes)), drawn


def expert_error(
    case: ExpertCase, out: jax.Array, first: jax.Array, shared: tuple[jax.Array, ...], own: tuple[jax.Array, ...]
) -> float:
    """Of some rows, against float32 on the same device."""
    some = np.unique(np.linspace(0, out.shape[0] - 1, CHECKED_ROWS).astype(np.int32))
    wide = [value.astype(jnp.float32) for value in own if value.ndim < 3]
    if case.kernel == "gather_rows":
        return row_error(out[some], wide[0][first[some]])
    if case.kernel == "combine_rows":
        some = np.flatnonzero((np.asarray(first) >= 0).any(axis=1))[:CHECKED_ROWS]
        place = first[some][..., None]
        return row_error(
            out[some], jnp.where(place >= 0, shared[0][some][..., None] * wide[0][place[..., 0]], 0).sum(1)
        )
    expert = np.searchsorted(np.cumsum(case.sizes), some, side="right")
    rows, weight = first[some].astype(jnp.float32), own[0][expert].astype(jnp.float32)
    both = jnp.einsum("sk,s...k->s...", rows, weight, precision="highest")
    if case.model.bias:
        both += own[1][expert].astype(jnp.float32)
    return row_error(out[some], case.model.gate(both[:, 0], both[:, 1]) if case.part == "up" else both)


def time_experts(case: ExpertCase, options: dict[str, Any], effort: Effort, sets: int, calls: int) -> dict[str, Any]:
    """One backend: its error, then its time. Raises RuntimeError when the error is beyond the tolerance."""
    call = expert_call(case, options)
    first, shared, own = make_inputs(case, sets)
    error = checked(expert_error(case, jax.jit(call)(first, shared, own[0]), first, shared, own[0]))
    program = chained(call, len(own), calls)
    return {"error": error, "seconds": seconds(lambda: program(first, shared, own), effort) / calls}
