"""Sampling on vocabulary shards: no device ever sees another's logits, only a few numbers per row.

The order is vLLM's: masks, bias, penalties (these act on greedy rows too), temperature, min-p, top-k, top-p, noise.
Each part leaves the rows that do not want it bit for bit as they were, so that it may be left out when none does; sums
over the vocabulary are of integers, which are exact in any order. So a token does not depend on its row, on the
neighbours or on the mesh.

A row whose logits hold NaN or +inf, or leave nothing to choose from, gives token -1, whatever it wants.

Greedy is an argmax of argmaxes. Sampling adds Gumbel noise that is a function of (seed, position, token) alone. top-k
and top-p keep the tokens above a threshold that a radix search finds exactly, counting (or summing) over all shards;
tokens that tie with the threshold are all kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from nanoflow_jax.parallel import collectives
from nanoflow_jax.step.batch import SamplingArrays
from nanoflow_jax.step.logprobs import TokenLogprobs
from nanoflow_jax.step.slots import SlotState

BITS_PER_ROUND = 4
MIN_TEMPERATURE = 1e-30  # below it a quotient could leave float32; the choice is greedy long before
IN_PROMPT = 1 << 15  # of a token count: the token is in the prompt
MAX_COUNT = IN_PROMPT - 1  # the bits below: times it was generated
EVERYTHING = 2**32 - 1  # a weight that no search reaches


@struct.dataclass
class Masks:
    """Which tokens constrained rows may have. K masks, V vocabulary padded to the mesh, a multiple of 8 on each device.

    bits  [K, V/8] uint8, split over V: bit i of byte j stands for token 8 j + i
    rows  [B] int32: the mask of each sampled row; K: it has none
    """

    bits: Any
    rows: Any


@struct.dataclass
class Sampled:
    tokens: Any  # [B] int32; -1: none can be chosen
    logprobs: TokenLogprobs | None  # [B]; None: no row wants them


@struct.dataclass
class StepOutput:
    sampled: Sampled
    scores: TokenLogprobs | None  # [P]: of the prefill rows that have a target; None: none has


def likeliest(logits: jax.Array, first: jax.Array) -> jax.Array:
    """What greedy rows without options choose: int32 [B], the same on all devices. Arguments as `sample`'s."""
    return _argmax(logits, first, _sound(logits))


def sample(
    logits: jax.Array,
    first: jax.Array,
    params: SamplingArrays,
    slots: SlotState,
    *,
    masks: Masks | None = None,
    top_k: bool = True,
    top_p: bool = True,
) -> tuple[jax.Array, SlotState]:
    """One token per row, int32 [B], the same on all devices, and the slots with these tokens counted. -1: no token can
    be chosen, because logits are not finite, or none is allowed.

    logits        [B, V/p] float32, this device's share; padding entries are -inf
    first         int32 scalar: vocabulary index of the first column
    masks         this device's share; None: no row has one
    top_k, top_p  whether some row may want it: False saves the search

    No two rows may name the same row of the counts. Both tables have at least one row: XLA's partitioner crashes on a
    split array that has none.
    """
    greedy = params.temperature <= 0
    x = adjust(logits if masks is None else allowed(logits, masks), params, slots)
    noisy = temper(x, params, top_k=top_k, top_p=top_p) + _gumbel(first, x.shape[1], params)
    # What is chosen from may have lost a NaN (to top-k, say), so the raw logits are looked at.
    tokens = _argmax(jnp.where(greedy[:, None], x, noisy), first, _sound(logits))
    return tokens, replace(slots, counts=_count(slots.counts, params.history, tokens - first))


def allowed(logits: jax.Array, masks: Masks) -> jax.Array:
    """The logits [B, V/p], -inf where a row's mask has no bit."""
    bits = masks.bits.at[masks.rows].get(mode="clip")  # [B, V/p/8]
    has = (bits[:, :, None] >> jnp.arange(8, dtype=jnp.uint8)[None, None, :]) & jnp.uint8(1)
    free = masks.rows >= masks.bits.shape[0]
    return jnp.where((has.reshape(logits.shape) != 0) | free[:, None], logits, -jnp.inf)


def adjust(logits: jax.Array, params: SamplingArrays, slots: SlotState) -> jax.Array:
    """The logits [B, V/p] after bias and penalties; what a greedy row's token is the largest of."""
    wanted = biased(params, slots.biases.shape[0]), penalized(params, slots.counts.shape[0])

    def bias(x: jax.Array) -> jax.Array:
        return jnp.where(wanted[0][:, None], x + slots.biases.at[params.bias].get(mode="clip"), x)

    def penalize(x: jax.Array) -> jax.Array:
        counts = slots.counts.at[params.history].get(mode="clip")
        return jnp.where(wanted[1][:, None], _penalize(x, counts, params), x)

    logits = lax.cond(jnp.any(wanted[0]), bias, lambda x: x, logits)
    return lax.cond(jnp.any(wanted[1]), penalize, lambda x: x, logits)


def temper(logits: jax.Array, params: SamplingArrays, *, top_k: bool = True, top_p: bool = True) -> jax.Array:
    """Logits [B, V/p] over the temperature, the largest of each row 0; -inf for what min-p, top-k or top-p leave
    out. Rows with temperature 0 are meaningless."""
    # Relative to the largest: nothing overflows, however low the temperature. (A row may be -inf throughout.)
    top = jnp.maximum(collectives.all_reduce_max(logits.max(axis=1)), jnp.finfo(jnp.float32).min)
    scaled = (logits - top[:, None]) / jnp.maximum(params.temperature, MIN_TEMPERATURE)[:, None]
    sampled = params.temperature > 0
    by_p = sampled & (params.top_p < 1)
    by_k = sampled & (params.top_k > 0)
    scaled = jnp.where(jnp.exp(scaled) >= params.min_p[:, None], scaled, -jnp.inf)
    scaled = _keep_top_k(scaled, by_k, params.top_k) if top_k else scaled
    return _keep_top_p(scaled, by_p, params.top_p) if top_p else scaled


def biased(params: SamplingArrays, rows: int) -> Any:
    """bool [B], of NumPy or JAX arrays: which rows have a bias. rows: of the bias table."""
    return params.bias < rows


def penalized(params: SamplingArrays, rows: int) -> Any:
    """bool [B], of NumPy or JAX arrays: which rows have a penalty. rows: of the token counts."""
    some = (params.presence_penalty != 0) | (params.frequency_penalty != 0) | (params.repetition_penalty != 1)
    return some & (params.history < rows)


def _penalize(logits: jax.Array, counts: jax.Array, params: SamplingArrays) -> jax.Array:
    """Repetition: over the tokens of prompt and output; frequency and presence: of the output only."""
    generated = (counts & MAX_COUNT).astype(jnp.float32)
    repetition = params.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    x = jnp.where(counts > 0, repeated, logits)
    x = x - params.frequency_penalty[:, None] * generated
    x = x - params.presence_penalty[:, None] * (generated > 0).astype(jnp.float32)
    return jnp.minimum(x, jnp.finfo(jnp.float32).max)  # a tiny repetition penalty could make several infinite


def _count(counts: jax.Array, history: jax.Array, columns: jax.Array) -> jax.Array:
    """The token counts with one more of each row's token, on the device that owns its column."""
    width = counts.shape[1]
    columns = jnp.where((columns >= 0) & (columns < width), columns, width)  # elsewhere: dropped
    old = counts.at[history, columns].get(mode="fill", fill_value=0)
    new = jnp.where(old & MAX_COUNT < MAX_COUNT, old + jnp.uint16(1), old)
    return counts.at[history, columns].set(new, mode="drop")


def _sound(logits: jax.Array) -> jax.Array:
    """Which rows of logits [B, V/p] have neither NaN nor +inf. Not read off the largest: a maximum may lose NaN (XLA's
    on a CPU does, and over devices it is up to the network's library)."""
    return jnp.all(logits < jnp.inf, axis=1)


def _argmax(values: jax.Array, first: jax.Array, sound: jax.Array) -> jax.Array:
    """Vocabulary index of the largest value of each row [B, V/p]; the lowest index among equals. -1 where the largest
    is not finite, or where a device's share of the row is not `sound` [B]."""
    best = values.max(axis=1)
    index = jnp.argmax(values, axis=1).astype(jnp.int32) + first
    best = jnp.where(sound, best, jnp.inf)  # which no maximum loses
    winner = collectives.all_reduce_max(best)
    token = -collectives.all_reduce_max(jnp.where(best == winner, -index, jnp.iinfo(jnp.int32).min))
    return jnp.where(jnp.isfinite(winner), token, -1)


def _gumbel(first: jax.Array, columns: int, params: SamplingArrays) -> jax.Array:
    """Noise [B, columns] for vocabulary indices first, first + 1, ...: one counter-based draw each."""
    tokens = first + jnp.arange(columns, dtype=jnp.int32)

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.vmap(lambda t: jax.random.key_data(jax.random.fold_in(key, t)))(tokens)

    return _gumbel_of(jax.vmap(row)(params.seed, params.position))


def _gumbel_of(bits: jax.Array) -> jax.Array:
    """uint32 [..., 2], 64 uniform bits each, to float32 Gumbel noise; fewer would cut off the rare large values."""
    high, low = bits[..., 0].astype(jnp.float32), bits[..., 1].astype(jnp.float32)
    # In (0, 1), never its ends. The largest noise comes from near 0, where float32 resolves all bits.
    uniform = jnp.minimum((high + (low + 0.5) * 2.0**-32) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def _keep_top_k(scaled: jax.Array, wanted: jax.Array, top_k: jax.Array) -> jax.Array:
    """-inf below the top_k-th largest of the rows [B] in which it is wanted."""
    ordered = _sortable(scaled)
    count = jnp.where(wanted, top_k.astype(jnp.uint32), jnp.uint32(EVERYTHING))
    threshold = _search(ordered, jnp.ones_like(ordered), count)
    return jnp.where(ordered >= threshold[:, None], scaled, -jnp.inf)


def _keep_top_p(scaled: jax.Array, wanted: jax.Array, top_p: jax.Array) -> jax.Array:
    """-inf for all but the likeliest tokens that together reach top_p of the row's mass, never nothing, in the rows
    [B] in which it is wanted. The largest entry of a row is 0."""
    ordered = _sortable(scaled)
    mass = jnp.exp(scaled)
    # Integer weights, so that their sums are exact. Two sums of 14 bits each give the total well enough to scale the
    # weights so that the row adds up to about 2**31.
    fixed = (mass * 2.0**28).astype(jnp.uint32)
    high, low = (_sum(x).astype(jnp.float32) for x in (fixed >> 14, fixed & 0x3FFF))
    total = jnp.maximum(high * 2.0**14 + low, 1.0)
    weights = (mass * (2.0**59 / total)[:, None]).astype(jnp.uint32)
    whole = _sum(weights)
    share = jnp.ceil(top_p * whole.astype(jnp.float32)).astype(jnp.uint32)
    enough = jnp.where(wanted, jnp.clip(share, 1, whole), jnp.uint32(EVERYTHING))
    threshold = _search(ordered, weights, enough)
    return jnp.where(ordered >= threshold[:, None], scaled, -jnp.inf)


def _sum(weights: jax.Array) -> jax.Array:
    """uint32 [B, ..., V/p] -> [B, ...], over all shards."""
    return collectives.all_reduce(weights.sum(axis=-1, dtype=jnp.uint32))


def _sortable(x: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _search(ordered: jax.Array, weights: jax.Array, wanted: jax.Array) -> jax.Array:
    """Per row, the largest uint32 t such that the weights [B, V/p] of entries with ordered >= t add up to at least
    `wanted` [B]; 0 when none does.

    Finds the bits of t from the top, BITS_PER_ROUND at a time: one small all-reduce per round.
    """
    steps = jnp.arange(1, 1 << BITS_PER_ROUND, dtype=jnp.uint32)

    def round_(i: jax.Array, found: jax.Array) -> jax.Array:
        shift = jnp.uint32(32 - BITS_PER_ROUND) - i.astype(jnp.uint32) * jnp.uint32(BITS_PER_ROUND)
        candidates = found[:, None] + (steps << shift)[None, :]  # [B, 15], ascending
        at_or_above = ordered[:, None, :] >= candidates[:, :, None]
        enough = _sum(jnp.where(at_or_above, weights[:, None, :], jnp.uint32(0))) >= wanted[:, None]
        return found + (enough.sum(axis=1).astype(jnp.uint32) << shift)  # true up to some candidate, then false

    return lax.fori_loop(0, 32 // BITS_PER_ROUND, round_, jnp.zeros(ordered.shape[0], jnp.uint32))
