"""The sampler under shard_map: greedy, the kept sets of top-k and top-p, the distribution, and independence of mesh
and row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import stats

from nanoflow_jax.parallel import collectives
from nanoflow_jax.step import sampler
from nanoflow_jax.step.batch import SamplingArrays
from nanoflow_jax.step.extras import Sample
from tests.step.sampler_driver import (
    MESHES,
    PADDED,
    ROWS,
    VOCAB,
    Case,
    Scores,
    kept_set,
    make_sample,
    make_scores,
    margin,
    scores_on,
    settings,
    tokens_on,
    wanted_by,
)


def random_logits(seed: int, rows: int = ROWS, vocab: int = VOCAB, ties: bool = True) -> np.ndarray:
    """Quarters, so that many entries of a row are equal, or all different."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 3, (rows, vocab)).astype(np.float32)
    return np.round(values * 4) / 4 if ties else values


# -- greedy


@pytest.mark.parametrize("devices", MESHES)
def test_greedy_is_argmax_and_the_lowest_of_equals(devices: int) -> None:
    """Also when the equals lie on both sides of a shard's border; top-k, top-p, seed and position change nothing."""
    logits = random_logits(0)
    share = PADDED // 8
    for row, columns in enumerate([(share - 1, share), (share, 2 * share), (0, VOCAB - 1), (6 * share, VOCAB - 1)]):
        logits[row, list(columns)] = 50.0
    logits[4] = -1.0  # all equal
    logits[5] = -1e30
    noise = settings(ROWS, top_p=0.3, top_k=3, seed=np.arange(ROWS), position=np.arange(ROWS))
    expected = logits.argmax(axis=1)
    assert expected[:6].tolist() == [share - 1, share, 0, 6 * share, 0, 0]
    np.testing.assert_array_equal(tokens_on(devices, logits, settings(ROWS)), expected)
    np.testing.assert_array_equal(tokens_on(devices, logits, noise), expected)


@pytest.mark.parametrize("devices", MESHES)
def test_greedy_rows_stay_greedy_beside_sampled_ones(devices: int) -> None:
    logits = random_logits(1)
    hot = np.arange(ROWS) % 2 * 100.0
    tokens = tokens_on(devices, logits, settings(ROWS, temperature=hot, top_p=0.9, seed=np.arange(ROWS)))
    np.testing.assert_array_equal(tokens[::2], logits.argmax(axis=1)[::2])
    assert (tokens[1::2] != logits.argmax(axis=1)[1::2]).sum() > ROWS // 4


@pytest.mark.parametrize(("devices", "lost"), [(1, False), (2, False), (8, False), (8, True)])
def test_rows_that_are_not_finite_give_no_token(devices: int, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever device has the bad number, whatever the row wants, and also where a maximum over devices loses NaN.
    Their neighbours' tokens stay."""
    sample: Callable[[int, np.ndarray, SamplingArrays], np.ndarray] = tokens_on
    if lost:
        real = collectives.all_reduce_max
        monkeypatch.setattr(collectives, "all_reduce_max", lambda x: real(_without_nan(x)))
        traced_anew = {how: make_sample(devices, how) for how in (None, Sample(True, False))}

        def anew(_: int, logits: np.ndarray, params: SamplingArrays) -> np.ndarray:
            case = Case(logits, params)
            return traced_anew[wanted_by(case)](case)[0][0][:ROWS]

        sample = anew
    logits, rng = random_logits(8), np.random.default_rng(3)
    params = settings(ROWS, temperature=np.arange(ROWS) % 4 / 2, top_k=np.arange(ROWS) % 3, seed=np.arange(ROWS))
    calm = tokens_on(devices, logits, params)
    bad = np.arange(ROWS) % 5 == 2
    for row in np.flatnonzero(bad):
        logits[row, rng.integers(VOCAB)] = (np.nan, np.inf)[row % 2]
    logits[2] = -np.inf
    np.testing.assert_array_equal(sample(devices, logits, params), np.where(bad, -1, calm))
    np.testing.assert_array_equal(sample(devices, logits, settings(ROWS)) < 0, bad)


def _without_nan(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(x), -jnp.inf, x) if jnp.issubdtype(x.dtype, jnp.floating) else x


@pytest.mark.parametrize("devices", MESHES)
def test_padding_is_never_sampled(devices: int) -> None:
    """At a temperature at which every token is as likely, and with a top_k that reaches into the padding."""
    for top_k in (0, VOCAB - 1, VOCAB + 5, PADDED, 10_000):
        for seed in range(4):
            params = settings(ROWS, temperature=1e30, top_k=top_k, seed=seed * ROWS + np.arange(ROWS))
            tokens = tokens_on(devices, random_logits(seed), params)
            assert tokens.min() >= 0 and tokens.max() < VOCAB


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1.2e-38, 1e-44])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    """Nothing overflows: neither infinities nor their ties decide."""
    logits = random_logits(2, ties=False)
    params = settings(ROWS, temperature=temperature, top_p=0.9, top_k=20, seed=np.arange(ROWS))
    np.testing.assert_array_equal(tokens_on(2, logits, params), logits.argmax(axis=1))


# -- the kept set


def filter_cases(ties: bool) -> tuple[np.ndarray, list[int], list[float]]:
    rng = np.random.default_rng(5)
    logits = random_logits(3, ties=ties)
    logits -= logits.max(axis=1, keepdims=True)
    top_k = [[0, 1, 2, 5, 40, VOCAB, VOCAB + 1, 10_000][i % 8] for i in range(ROWS)]
    top_p = []
    for row in range(ROWS):
        wanted = [1.0, 0.5, 1e-12, 0.9, 0.1, 0.99, 1.0, float(rng.uniform(0.01, 0.99))][(row // 8) % 8]
        while wanted < 1 and margin(logits[row], top_k[row], wanted) < 1e-5:
            wanted += 3e-5
        top_p.append(wanted)
    return logits, top_k, top_p


def wrong_rows(scores: Scores, ties: bool) -> list[int]:
    logits, top_k, top_p = filter_cases(ties)
    found = scores(Case(logits, settings(ROWS, temperature=1.0, top_p=top_p, top_k=top_k))) > -np.inf
    return [i for i in range(ROWS) if not np.array_equal(found[i], kept_set(logits[i], top_k[i], top_p[i]))]


@pytest.mark.parametrize("devices", MESHES)
@pytest.mark.parametrize("ties", [True, False])
def test_kept_set_is_that_of_the_definition(devices: int, ties: bool) -> None:
    """top_k (1, small, the vocabulary, beyond it) times top_p (tiny to 1), with and without ties."""
    assert wrong_rows(scores_on(devices), ties) == []


def test_edges_of_top_k_and_top_p() -> None:
    """What the settings mean, by hand."""
    logits = np.log(np.array([[0.4, 0.2, 0.2, 0.1, 0.1]], np.float32))
    logits -= logits.max()

    def kept(**params: Any) -> list[int]:
        scores = scores_on(2)(Case(logits, settings(1, temperature=1.0, **params)))
        return np.flatnonzero(scores[0] > -np.inf).tolist()

    assert kept(top_k=1) == [0]
    assert kept(top_k=2) == [0, 1, 2]  # a tie with the second
    assert kept(top_k=3) == [0, 1, 2]
    assert kept(top_k=4) == kept(top_k=5) == kept(top_k=99) == kept() == [0, 1, 2, 3, 4]
    assert kept(top_p=0.39) == [0]
    assert kept(top_p=0.41) == [0, 1, 2]
    assert kept(top_p=0.81) == [0, 1, 2, 3, 4]
    assert kept(top_k=2, top_p=0.49) == [0]  # 0.4 / 0.8 of what top_k left
    assert kept(top_k=2, top_p=0.51) == [0, 1, 2]
    for tiny in (1e-6, 1e-30, 1e-40, 5e-324):
        assert kept(top_p=tiny) == [0]
    assert kept(top_p=np.nextafter(np.float32(1), np.float32(0))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("devices", MESHES)
def test_only_kept_tokens_are_sampled_and_all_of_them(devices: int) -> None:
    """Through `sample`: the temperature acts before top-p, both filters act, and what is kept does come up."""
    rows = 2048
    logits = np.broadcast_to(np.log(np.array([0.30, 0.25, 0.2, 0.15, 0.1] + [1e-4] * 3, np.float32)), (rows, 8))
    for temperature, top_k, top_p in ((1.0, 0, 0.7), (1.0, 3, 1.0), (2.0, 4, 0.6), (0.25, 0, 0.7), (1.0, 4, 0.99)):
        params = settings(rows, temperature=temperature, top_p=top_p, top_k=top_k, seed=np.arange(rows))
        tokens = tokens_on(devices, logits, params)
        expected = np.flatnonzero(kept_set(logits[0] / temperature, top_k, top_p))
        assert np.unique(tokens).tolist() == expected.tolist(), (temperature, top_k, top_p)


def _top_p_of_all(logits: jax.Array, params: SamplingArrays) -> jax.Array:
    """Broken: top-p over the whole vocabulary, not over what top-k leaves."""
    by_k = sampler.temper(logits, replace(params, top_p=jnp.ones_like(params.top_p)))
    by_p = sampler.temper(logits, replace(params, top_k=jnp.zeros_like(params.top_k)))
    return jnp.minimum(by_k, by_p)


def _one_less(logits: jax.Array, params: SamplingArrays) -> jax.Array:
    """Broken: the token that reaches top_p is left out, and one of top_k."""
    kept = sampler.temper(logits, params)
    last = -collectives.all_reduce_max(jnp.where(kept > -jnp.inf, -kept, -jnp.inf).max(axis=1))
    return jnp.where(kept > last[:, None], kept, -jnp.inf)


@pytest.mark.parametrize("broken", [_top_p_of_all, _one_less])
def test_broken_filters_are_found(broken: Callable[..., jax.Array]) -> None:
    assert wrong_rows(make_scores(2, broken), ties=False)


def test_a_filter_that_counts_its_own_shard_only_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one device there is nothing to forget; on two the kept set is another."""
    monkeypatch.setattr(collectives, "all_reduce", lambda x: x)
    assert wrong_rows(make_scores(1), ties=True) == []
    assert wrong_rows(make_scores(2), ties=True)


# -- the distribution


def p_value(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """Of Pearson's chi-square test; a token of probability 0 must not be there at all."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    some = probabilities > 0
    return float(stats.chisquare(counts[some], len(tokens) * probabilities[some]).pvalue)


def softmax(logits: np.ndarray) -> np.ndarray:
    mass = np.exp(logits.astype(np.float64) - logits.max())
    return mass / mass.sum()


DRAWS = 16384
WEIGHTS = np.log(np.array([0.3, 0.05, 0.1, 0.02, 0.08, 0.15, 0.1, 0.01, 0.09, 0.02, 0.06, 0.02], np.float32))


@cache
def draws(devices: int, temperature: float, top_k: int, top_p: float, over: str) -> np.ndarray:
    where = {over: np.arange(DRAWS), ("seed" if over == "position" else "position"): 77}
    logits = np.broadcast_to(WEIGHTS, (DRAWS, len(WEIGHTS)))
    return tokens_on(devices, logits, settings(DRAWS, temperature=temperature, top_p=top_p, top_k=top_k, **where))


@pytest.mark.parametrize("over", ["seed", "position"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (3.0, 0, 1.0), (1.0, 5, 1.0), (1.5, 0, 0.8)]
)
def test_distribution(over: str, temperature: float, top_k: int, top_p: float) -> None:
    """Over seeds, and over the positions of one request: the softmax at that temperature, restricted to the kept
    set."""
    scaled = WEIGHTS / np.float32(temperature)
    expected = np.where(kept_set(scaled, top_k, top_p), softmax(scaled), 0.0)
    assert p_value(draws(2, temperature, top_k, top_p, over), expected / expected.sum()) > 1e-3


def test_the_distribution_test_can_fail() -> None:
    """A temperature that is off by a fifth is found with the same draws."""
    tokens = draws(2, 1.0, 0, 1.0, "seed")
    for wrong in (0.8, 1.2):
        assert p_value(tokens, softmax(WEIGHTS / np.float32(wrong))) < 1e-6


# -- what a token depends on


def mixed() -> tuple[np.ndarray, SamplingArrays]:
    rng = np.random.default_rng(9)
    return random_logits(10, ties=False), settings(
        ROWS,
        temperature=rng.choice([0.0, 0.5, 1.0, 2.0], ROWS),
        top_p=rng.choice([1.0, 0.9, 0.5], ROWS),
        top_k=rng.choice([0, 3, 50], ROWS),
        seed=rng.integers(0, 2**32, ROWS),
        position=rng.integers(0, 5000, ROWS),
    )


def test_the_mesh_does_not_matter() -> None:
    logits, params = mixed()
    tokens = [tokens_on(devices, logits, params) for devices in MESHES]
    np.testing.assert_array_equal(tokens[0], tokens[1])
    np.testing.assert_array_equal(tokens[0], tokens[2])


@pytest.mark.parametrize("devices", MESHES)
def test_the_row_does_not_matter(devices: int) -> None:
    """The same request in another row, with other neighbours, gets the same token."""
    logits, params = mixed()
    tokens = tokens_on(devices, logits, params)
    order = np.random.default_rng(1).permutation(ROWS)
    moved = jax.tree.map(lambda x: x[order], params)
    np.testing.assert_array_equal(tokens_on(devices, logits[order], moved), tokens[order])
    lone = jax.tree.map(lambda x: np.where(np.arange(ROWS) == 3, x, 0).astype(x.dtype), params)
    lone = lone.replace(top_p=np.where(np.arange(ROWS) == 3, params.top_p, 1).astype(np.float32))
    assert tokens_on(devices, logits, lone)[3] == tokens[3]


def test_seed_and_position_give_other_noise() -> None:
    """Of 64 seeds at 32 positions no two rows or columns of tokens are alike, and neighbours agree no more than by
    chance."""
    logits = np.zeros((ROWS, VOCAB), np.float32)
    tokens = np.stack(
        [tokens_on(2, logits, settings(ROWS, temperature=1.0, seed=np.arange(ROWS), position=p)) for p in range(32)]
    )  # [position, seed]
    assert len({tuple(column) for column in tokens.T}) == ROWS
    assert len({tuple(row) for row in tokens}) == 32
    for a, b in ((tokens[1:], tokens[:-1]), (tokens[:, 1:], tokens[:, :-1]), (tokens[1:, 1:], tokens[:-1, :-1])):
        assert (a == b).mean() < 3 / VOCAB


def test_the_same_seed_and_position_give_the_same_noise() -> None:
    logits = np.zeros((ROWS, VOCAB), np.float32)
    tokens = tokens_on(2, logits, settings(ROWS, temperature=1.0, seed=5, position=6))
    assert len(set(tokens.tolist())) == 1


def test_sortable_keeps_the_order() -> None:
    values = np.array([-np.inf, -3e38, -1.5, -1e-30, 0.0, 1e-30, 1.5, 3e38, np.inf], np.float32)
    ordered = np.asarray(sampler._sortable(lax.convert_element_type(values, jnp.float32)))
    assert (np.diff(ordered.astype(np.int64)) > 0).all()


def test_noise_is_gumbel_to_the_last_bit() -> None:
    """Against float64, from the largest value that 64 bits give to the smallest; never infinite, and in order."""
    words = np.array([0, 1, 2, 1000, 2**20, 2**24 + 1, 2**31, 2**32 - 2**20, 2**32 - 1], np.uint64)
    bits = np.concatenate([[(0, 0), (0, 1), (0, 2**16), (0, 2**31), (0, 2**32 - 1)], [(w, 2**31) for w in words[1:]]])
    noise = np.asarray(sampler._gumbel_of(jnp.asarray(bits.astype(np.uint32))))
    uniform = (bits[:, 0].astype(np.float64) * 2.0**32 + bits[:, 1] + 0.5) * 2.0**-64
    expected = -np.log(-np.log1p(-np.minimum(uniform, 1 - 2.0**-24)))
    np.testing.assert_allclose(noise, expected, rtol=3e-6, atol=3e-6)
    assert (np.diff(noise) < 0).all() and noise[0] > 45
