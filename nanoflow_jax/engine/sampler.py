"""Sampling on vocabulary shards: no device ever sees another's logits, only a few numbers per row.

Greedy is an argmax of argmaxes. Temperature sampling adds Gumbel noise that is a function of (seed, position, token)
alone, so that a token does not depend on the row, the neighbours or the mesh. top-k and top-p keep the tokens above
a threshold that a radix search finds exactly, counting (or summing) over all shards; tokens that tie with the
threshold are all kept.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from nanoflow_jax.parallel import collectives
from nanoflow_jax.schedule.batch import SamplingArrays

BITS_PER_ROUND = 4
MIN_TEMPERATURE = 1e-30  # below it a quotient could leave float32; the choice is greedy long before


def sample(logits: jax.Array, first: jax.Array, params: SamplingArrays) -> jax.Array:
    """One token per row, the same on all devices.

    logits  [B, V/p] float32, this device's share; padding entries are -inf
    first   int32 scalar: vocabulary index of the first column
    Returns int32 [B].
    """
    greedy = params.temperature <= 0
    filtered = (params.top_k > 0) | (params.top_p < 1)

    def perturb(logits: jax.Array) -> jax.Array:
        # Relative to the largest: nothing overflows, however low the temperature.
        top = collectives.all_reduce_max(logits.max(axis=1))
        scaled = (logits - top[:, None]) / jnp.maximum(params.temperature, MIN_TEMPERATURE)[:, None]
        scaled = lax.cond(jnp.any(filtered & ~greedy), lambda x: _filter(x, params), lambda x: x, scaled)
        return jnp.where(greedy[:, None], logits, scaled + _gumbel(first, logits.shape[1], params))

    # The predicates are the same on all devices, so all take the same branch and its collectives meet.
    return _argmax(lax.cond(jnp.any(~greedy), perturb, lambda x: x, logits), first)


def _argmax(values: jax.Array, first: jax.Array) -> jax.Array:
    """Vocabulary index of the largest value of each row [B, V/p]; the lowest index among equals."""
    best = values.max(axis=1)
    index = jnp.argmax(values, axis=1).astype(jnp.int32) + first
    winner = collectives.all_reduce_max(best)
    return -collectives.all_reduce_max(jnp.where(best == winner, -index, jnp.iinfo(jnp.int32).min))


def _gumbel(first: jax.Array, columns: int, params: SamplingArrays) -> jax.Array:
    """Noise [B, columns] for vocabulary indices first, first + 1, ...: one counter-based draw each."""
    tokens = first + jnp.arange(columns, dtype=jnp.int32)

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.vmap(lambda t: jax.random.key_data(jax.random.fold_in(key, t))[0])(tokens)

    bits = jax.vmap(row)(params.seed, params.position)
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * (2.0**-23)  # in (0, 1), never its ends
    return -jnp.log(-jnp.log(uniform))


def _filter(scaled: jax.Array, params: SamplingArrays) -> jax.Array:
    """-inf for what top-k, then top-p among the rest, leave out. The largest entry of each row is 0."""
    ordered = _sortable(scaled)
    wanted = jnp.where(params.top_k > 0, params.top_k, jnp.iinfo(jnp.int32).max).astype(jnp.float32)

    def count(above: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return above(jnp.ones_like(scaled))

    # Largest threshold that still leaves at least k tokens at or above it.
    threshold = _search(ordered, count, wanted)
    kept = jnp.where(ordered >= threshold[:, None], scaled, -jnp.inf)
    mass = jnp.exp(kept)
    total = collectives.all_reduce(mass.sum(axis=1))
    # The smallest set of the likeliest tokens whose mass reaches top_p; never nothing, however small top_p.
    wanted = jnp.maximum(params.top_p * total, jnp.finfo(jnp.float32).tiny)
    threshold = _search(ordered, lambda above: above(mass), jnp.where(params.top_p < 1, wanted, jnp.inf))
    return jnp.where(ordered >= threshold[:, None], kept, -jnp.inf)


def _sortable(x: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _search(
    ordered: jax.Array, weigh: Callable[[Callable[[jax.Array], jax.Array]], jax.Array], wanted: jax.Array
) -> jax.Array:
    """Per row, the largest uint32 t such that the weight of entries with ordered >= t is at least `wanted`; 0 when
    none is.

    Finds the bits of t from the top, BITS_PER_ROUND at a time: one small all-reduce per round.
    """
    steps = jnp.arange(1, 1 << BITS_PER_ROUND, dtype=jnp.uint32)

    def round_(i: jax.Array, found: jax.Array) -> jax.Array:
        shift = jnp.uint32(32 - BITS_PER_ROUND) - i.astype(jnp.uint32) * jnp.uint32(BITS_PER_ROUND)
        candidates = found[:, None] + (steps << shift)[None, :]  # [B, 15], ascending

        def above(weights: jax.Array) -> jax.Array:
            at_or_above = ordered[:, None, :] >= candidates[:, :, None]
            return collectives.all_reduce(jnp.where(at_or_above, weights[:, None, :], 0.0).sum(axis=2))

        enough = weigh(above) >= wanted[:, None]  # true up to some candidate, then false
        return found + (enough.sum(axis=1).astype(jnp.uint32) << shift)

    return lax.fori_loop(0, 32 // BITS_PER_ROUND, round_, jnp.zeros(ordered.shape[0], jnp.uint32))
