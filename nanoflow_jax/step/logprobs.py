"""Logprobs of given tokens and lists of the likeliest ones, on vocabulary shards: each device sends a few numbers per
row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from nanoflow_jax.parallel import collectives
from nanoflow_jax.sampling_params import MAX_LOGPROBS

SCORE_CHUNK = 256  # prefill rows whose logits exist at the same time

Head = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


@struct.dataclass
class TokenLogprobs:
    """Natural logarithms of the softmax of the raw logits: before bias, penalties and temperature.

    A row that wants none is zeros; so is each list past the number that the row wants, and past the vocabulary
    token -1 with logprob -inf.
    """

    logprob: Any  # [n] float32: of the row's token
    rank: Any  # [n] int32: 1 + how many raw logits are larger; 1 is the likeliest
    top_tokens: Any  # [n, MAX_LOGPROBS] int32, likeliest first; the lowest id first among equals
    top_logprobs: Any  # [n, MAX_LOGPROBS] float32


def no_logprobs(rows: int) -> TokenLogprobs:
    return TokenLogprobs(
        logprob=jnp.zeros(rows, jnp.float32),
        rank=jnp.zeros(rows, jnp.int32),
        top_tokens=jnp.zeros((rows, MAX_LOGPROBS), jnp.int32),
        top_logprobs=jnp.zeros((rows, MAX_LOGPROBS), jnp.float32),
    )


@struct.dataclass
class Scores:
    """Logprobs of prefill rows [P], of which the first `done` that have a target are there."""

    done: Any  # int32 scalar
    logprobs: TokenLogprobs


def no_scores(rows: int) -> Scores:
    return Scores(jnp.int32(0), no_logprobs(rows))


def score_chunk(head: Head, hidden: jax.Array, targets: jax.Array, top: jax.Array, scores: Scores) -> Scores:
    """The scores with the logprobs of the next SCORE_CHUNK rows that have a target: all rows' logits never exist
    together.

    head     hidden [n, H] -> (this device's logits [n, V/p] float32, vocabulary index of its first column)
    hidden   [P, H]; P is at least 1
    targets  [P] int32; -1: none, the row is zeros
    top      int32 scalar: how many of the likeliest to list in each row that has a target, 0 to MAX_LOGPROBS
    """
    rows = targets.size
    chunk = min(SCORE_CHUNK, rows)
    place = jnp.cumsum(targets >= 0, dtype=jnp.int32) - 1 - scores.done  # of each row that has a target, in the chunk
    mine = (targets >= 0) & (place >= 0) & (place < chunk)
    chosen = jnp.full(chunk, rows).at[jnp.where(mine, place, chunk)].set(jnp.arange(rows), mode="drop")
    tokens = targets.at[chosen].get(mode="fill", fill_value=-1)
    logits, first = head(hidden.at[chosen].get(mode="clip"))
    part = token_logprobs(logits, first, tokens, jnp.where(tokens >= 0, top, -1))
    logprobs = jax.tree.map(lambda whole, x: whole.at[chosen].set(x, mode="drop"), scores.logprobs, part)
    return Scores(scores.done + chunk, logprobs)


def token_logprobs(logits: jax.Array, first: jax.Array, tokens: jax.Array, tops: jax.Array) -> TokenLogprobs:
    """The logprobs of one token per row, the same on all devices.

    logits  [n, V/p] float32, this device's share of the raw logits; padding entries are -inf
    first   int32 scalar: vocabulary index of the first column
    tokens  [n] int32
    tops    [n] int32: how many of the likeliest to list, at most MAX_LOGPROBS; negative: no logprobs at all
    """
    columns = logits.shape[1]
    largest = collectives.all_reduce_max(logits.max(axis=1))
    # Gathered and added in the order of the devices: a reduction's order may depend on where the row stands.
    masses = collectives.all_gather(jnp.exp(logits - largest[:, None]).sum(axis=1))  # [p, n]
    mass = masses[0]
    for i in range(1, masses.shape[0]):
        mass = mass + masses[i]
    log_mass = jnp.log(mass)

    def relative(logit: jax.Array) -> jax.Array:
        wide = (slice(None),) + (None,) * (logit.ndim - 1)
        return (logit - largest[wide]) - log_mass[wide]

    local = tokens - first
    mine = (local >= 0) & (local < columns)
    own = jnp.take_along_axis(logits, jnp.where(mine, local, 0)[:, None], axis=1)[:, 0]
    logit = collectives.all_reduce_max(jnp.where(mine, own, -jnp.inf))
    larger = collectives.all_reduce((logits > logit[:, None]).sum(axis=1, dtype=jnp.int32))

    wanted = tops >= 0
    listed = jnp.arange(MAX_LOGPROBS)[None, :] < tops[:, None]
    values, ids = _likeliest(logits, first, jnp.max(tops))
    return TokenLogprobs(
        logprob=jnp.where(wanted, relative(logit), 0.0),
        rank=jnp.where(wanted, 1 + larger, 0),
        top_tokens=jnp.where(listed, ids, 0),
        top_logprobs=jnp.where(listed, relative(values), 0.0),
    )


def _likeliest(logits: jax.Array, first: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The `count` largest logits of each row, in order, and their vocabulary indices, both [n, MAX_LOGPROBS]; past
    `count` and past the vocabulary -inf and -1.

    Each device lists its own largest, one pass over its share for each, and the lists are merged.
    """
    n, columns = logits.shape
    column = jnp.arange(columns, dtype=jnp.int32)[None, :]

    def step(i: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        values, ids, value, last = found
        after = (logits < value[:, None]) | ((logits == value[:, None]) & (column > last[:, None]))
        rest = jnp.where(after, logits, -jnp.inf)
        value, last = rest.max(axis=1), jnp.argmax(rest, axis=1).astype(jnp.int32)
        token = jnp.where(value > -jnp.inf, last + first, -1)
        return values.at[:, i].set(value), ids.at[:, i].set(token), value, last

    empty = jnp.full((n, MAX_LOGPROBS), -jnp.inf, jnp.float32), jnp.full((n, MAX_LOGPROBS), -1, jnp.int32)
    start = jnp.full(n, jnp.inf, jnp.float32), jnp.full(n, -1, jnp.int32)
    values, ids, *_ = lax.fori_loop(0, jnp.clip(count, 0, MAX_LOGPROBS), step, (*empty, *start))
    # Side by side in the order of the devices: among equals the merge keeps the first, so the lowest vocabulary index.
    values, ids = (collectives.all_gather(x).transpose(1, 0, 2).reshape(n, -1) for x in (values, ids))
    values, places = lax.top_k(values, MAX_LOGPROBS)
    return values, jnp.take_along_axis(ids, places, axis=1)
