"""Logprobs, ranks and lists of the likeliest tokens against float64 NumPy, and the scoring of prompt rows in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nanoflow_jax.parallel import collectives
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.step.logprobs import (
    MAX_LOGPROBS,
    SCORE_CHUNK,
    Scores,
    TokenLogprobs,
    no_scores,
    score_chunk,
    token_logprobs,
)
from tests.step.sampler_driver import MESHES, VOCAB, Case, make_mesh, pad, sample_on, settings

TOLERANCE = 3e-6  # of a logprob, relative to its size or to 1: float32 sums against float64
ROWS = 64

Run = Callable[[np.ndarray, np.ndarray, np.ndarray], TokenLogprobs]


def make_logprobs(devices: int) -> Run:
    def local(logits: jax.Array, tokens: jax.Array, tops: jax.Array) -> TokenLogprobs:
        return token_logprobs(logits, collectives.device_index() * logits.shape[1], tokens, tops)

    run = jax.jit(
        jax.shard_map(
            local, mesh=make_mesh(devices), in_specs=(P(None, AXIS), P(), P()), out_specs=P(), check_vma=False
        )
    )

    def call(logits: np.ndarray, tokens: np.ndarray, tops: np.ndarray) -> TokenLogprobs:
        assert len(logits) >= ROWS
        arrays = tokens.astype(np.int32), tops.astype(np.int32)
        return jax.tree.map(np.asarray, run(pad(logits.astype(np.float32), -np.inf), *arrays))

    return call


logprobs_on = cache(make_logprobs)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    with np.errstate(invalid="ignore"):
        same = np.abs(found - expected) <= TOLERANCE * np.maximum(1, np.abs(expected))
    return bool((same | (found == expected)).all())


def wrong_rows(found: TokenLogprobs, logits: np.ndarray, tokens: np.ndarray, tops: np.ndarray) -> list[int]:
    """Rows in which anything differs from float64: ids, ranks and zeros exactly."""
    expected = log_softmax(logits)
    vocab = logits.shape[1]
    wrong = []
    for i in range(len(tokens)):
        if tops[i] < 0:
            right = not any(np.any(x[i]) for x in jax.tree.leaves(found))
        else:
            listed = min(tops[i], vocab)
            order = np.lexsort((np.arange(vocab), -logits[i]))[:listed]  # the lowest id first among equals
            right = (
                close(found.logprob[i], expected[i, tokens[i]])
                and found.rank[i] == 1 + (logits[i] > logits[i, tokens[i]]).sum()
                and np.array_equal(found.top_tokens[i, :listed], order)
                and close(found.top_logprobs[i, :listed], expected[i, order])
                and (found.top_tokens[i, listed : tops[i]] == -1).all()
                and (found.top_logprobs[i, listed : tops[i]] == -np.inf).all()
                and not found.top_tokens[i, tops[i] :].any()
                and not found.top_logprobs[i, tops[i] :].any()
            )
        if not right:
            wrong.append(i)
    return wrong


def rows_of(seed: int, ties: bool, vocab: int = VOCAB) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, tokens on all shards, and every number of listed tokens."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (ROWS, vocab)).astype(np.float32)
    if ties:
        logits = np.round(logits / 4) * 4
        logits[0] = 7.0
    logits[1] -= 3000.0  # no overflow, no loss, however large
    logits[2] += 3000.0
    logits[3, 5] = 500.0  # all others have no mass at all in float32
    tokens = (np.arange(ROWS) * 7 + np.arange(ROWS) // 19) % vocab
    tokens[4:12] = logits[4:12].argmax(axis=1)
    tokens[12:20] = logits[12:20].argmin(axis=1)
    tops = np.resize([-1, 0, 1, 2, 5, 19, MAX_LOGPROBS], ROWS)
    tops[:4] = MAX_LOGPROBS
    return logits, tokens, tops


@pytest.mark.parametrize("devices", MESHES)
@pytest.mark.parametrize("ties", [True, False])
def test_logprobs_ranks_and_lists(devices: int, ties: bool) -> None:
    arrays = rows_of(1, ties)
    assert wrong_rows(logprobs_on(devices)(*arrays), *arrays) == []


@pytest.mark.parametrize(("devices", "vocab"), [(1, 12), (2, 12), (8, 24), (8, 160), (2, 32768)])
def test_vocabularies_smaller_than_the_list_and_large(devices: int, vocab: int) -> None:
    arrays = rows_of(2, False, vocab)
    assert wrong_rows(logprobs_on(devices)(*arrays), *arrays) == []


def test_a_forbidden_raw_logit() -> None:
    """A token whose raw logit is -inf has logprob -inf and comes last; the others are not disturbed."""
    logits, tokens, tops = rows_of(3, False)
    logits[:, 9:] = -np.inf
    tokens[20:40], tokens[40:] = 3, 50
    found = logprobs_on(8)(logits, tokens, tops)
    expected = log_softmax(logits)
    wanted = tops >= 0
    assert close(found.logprob[wanted], expected[np.arange(ROWS), tokens][wanted])
    assert (found.rank[wanted & (tokens >= 9)] == 10).all()
    full = tops == MAX_LOGPROBS
    np.testing.assert_array_equal(found.top_tokens[full][:, 9:], -1)
    np.testing.assert_array_equal(np.sort(found.top_tokens[full][:, :9]), np.tile(np.arange(9), (full.sum(), 1)))


@pytest.mark.parametrize("tops", [[-1], [0], [-1, 0], [3], [-1, 3]])
def test_only_what_some_row_wants(tops: list[int]) -> None:
    """Each of the branches, alone and mixed."""
    logits, tokens, _ = rows_of(4, False)
    arrays = logits, tokens, np.resize(tops, ROWS)
    assert wrong_rows(logprobs_on(2)(*arrays), *arrays) == []


@pytest.mark.parametrize("devices", [1, 8])
def test_bitwise_the_same_in_another_place_and_with_other_neighbours(devices: int) -> None:
    logits, tokens, tops = rows_of(5, False)
    together = logprobs_on(devices)(logits, tokens, tops)
    order = np.random.default_rng(0).permutation(ROWS)
    moved = logprobs_on(devices)(logits[order], tokens[order], tops[order])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), moved, together)
    for row in range(0, ROWS, 5):
        lone_tops = np.where(np.arange(ROWS) == row, tops, -1)
        lone = logprobs_on(devices)(np.where(lone_tops[:, None] == -1, -1.0, logits), tokens, lone_tops)
        if tops[row] >= 0:
            jax.tree.map(lambda a, b, row=row: np.testing.assert_array_equal(a[row], b[row]), lone, together)


@pytest.mark.parametrize("forgotten", ["all_gather", "all_reduce", "all_reduce_max"])
def test_a_forgotten_shard_is_found(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one device there is nothing to forget; on two, one mass, count or logit is missing."""
    arrays = rows_of(6, False)
    broken = {"all_gather": lambda x: x[None]}.get(forgotten, lambda x: x)
    monkeypatch.setattr(collectives, forgotten, broken)
    assert wrong_rows(make_logprobs(1)(*arrays), *arrays) == []
    assert len(wrong_rows(make_logprobs(2)(*arrays), *arrays)) > 10


def test_the_test_finds_logprobs_of_changed_logits() -> None:
    logits, tokens, tops = rows_of(7, False)
    for changed in (logits / 1.001, logits + np.eye(ROWS, VOCAB, dtype=np.float32) * 0.01, logits[::-1]):
        assert wrong_rows(logprobs_on(2)(changed, tokens, tops), logits, tokens, tops)
    other = np.where(tops > 0, tops - 1, tops)
    assert wrong_rows(logprobs_on(2)(logits, tokens, other), logits, tokens, tops)


@pytest.mark.parametrize("devices", [1, 8])
def test_logprobs_of_sampled_tokens_are_those_of_the_raw_logits(devices: int) -> None:
    """Whatever bias, penalties, temperature and filters made of them."""
    logits, _, tops = rows_of(8, False)
    rng = np.random.default_rng(0)
    params = settings(
        ROWS, temperature=np.arange(ROWS) % 3, top_k=5, top_p=0.9, min_p=0.05, seed=np.arange(ROWS),
        history=np.arange(ROWS), bias=np.arange(ROWS), repetition_penalty=1.5, frequency_penalty=1, top_logprobs=tops,
    )  # fmt: skip
    counts = rng.integers(0, 3, (ROWS, VOCAB))
    sampled, _ = sample_on(devices, Case(logits, params, counts, rng.normal(0, 9, (ROWS, VOCAB))))
    assert wrong_rows(sampled.logprobs, logits, sampled.tokens, tops) == []
    assert (sampled.tokens != logits.argmax(axis=1)).mean() > 0.5


# -- scoring


HIDDEN = 16


def build_chunk(devices: int) -> Callable[..., Scores]:
    """`(weights [V, H], hidden, targets, top, scores) -> scores`, the weights split over V."""

    def local(weights: jax.Array, hidden: jax.Array, targets: jax.Array, top: jax.Array, scores: Scores) -> Scores:
        def head(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
            first = collectives.device_index() * weights.shape[0]
            columns = (first + jnp.arange(weights.shape[0]))[None, :]
            return jnp.where(columns < VOCAB, rows @ weights.T, -jnp.inf), first

        return score_chunk(head, hidden, targets, top, scores)

    return jax.jit(
        jax.shard_map(
            local, mesh=make_mesh(devices), in_specs=(P(AXIS), P(), P(), P(), P()), out_specs=P(), check_vma=False
        )
    )


chunk_on = cache(build_chunk)


def scored(devices: int, weights: np.ndarray, hidden: np.ndarray, targets: np.ndarray, top: int) -> TokenLogprobs:
    """As the runner does it."""
    scores = no_scores(len(targets))
    for _ in range(-(-int((targets >= 0).sum()) // SCORE_CHUNK)):
        scores = chunk_on(devices)(weights, hidden, targets, np.int32(top), scores)
    return jax.tree.map(np.asarray, scores.logprobs)


def score_arrays(rows: int, wanted: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights [V, H], hidden [rows, H] and targets; small integers, so that the logits are exact."""
    rng = np.random.default_rng(rows)
    weights = rng.integers(-3, 4, (VOCAB, HIDDEN)).astype(np.float32)
    hidden = rng.integers(-2, 3, (rows, HIDDEN)).astype(np.float32) / 2
    targets = rng.integers(0, VOCAB, rows).astype(np.int32)
    if wanted == "some":
        targets[rng.random(rows) < 0.7] = -1
    if wanted == "last" and rows:
        targets[:-1] = -1
    if wanted == "none":
        targets[:] = -1
    return weights, hidden, targets


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("rows", [1, 40, SCORE_CHUNK, SCORE_CHUNK + 1, 2 * SCORE_CHUNK + 100])
def test_scores_of_prompt_rows(devices: int, rows: int) -> None:
    """Whole chunks, part of one, and less; all rows wanted, some, the last, none; with and without lists."""
    for wanted in ("all", "some", "last", "none"):
        weights, hidden, targets = score_arrays(rows, wanted)
        logits = hidden @ weights.T
        padded = np.pad(weights, ((0, -VOCAB % 8), (0, 0)))
        for top in (0, 4) if rows < SCORE_CHUNK else (4,):
            scores = scored(devices, padded, hidden, targets, top)
            assert scores.logprob.shape == (rows,) and scores.top_tokens.shape == (rows, MAX_LOGPROBS)
            assert wrong_rows(scores, logits, targets, np.where(targets >= 0, top, -1)) == []


def arrays_of(jaxpr: Any) -> Iterator[Any]:
    """Shapes of everything that a program computes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from arrays_of(inner)


def test_the_logits_of_all_rows_never_exist_together() -> None:
    rows = 8 * SCORE_CHUNK
    weights, hidden, targets = score_arrays(rows, "all")
    weights = np.pad(weights, ((0, -VOCAB % 8), (0, 0)))
    args = weights, hidden, targets, np.int32(5), no_scores(rows)
    shapes = [a.shape for a in arrays_of(jax.make_jaxpr(chunk_on(1))(*args).jaxpr)]
    vocab = len(weights)
    assert (SCORE_CHUNK, vocab) in shapes
    assert not any(rows in shape and vocab in shape for shape in shapes)
    used = chunk_on(1).lower(*args).compile().memory_analysis().temp_size_in_bytes  # pyright: ignore
    assert used < rows * vocab * 4
