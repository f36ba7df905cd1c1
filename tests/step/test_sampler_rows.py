"""A row's token depends on nothing but the row: neither on its neighbours, nor on its place, nor on the mesh; and what
is sampled is counted for the penalties of later steps."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.step import sampler
from tests.step.sampler_driver import (
    MESHES,
    NO_ROW,
    OPTIONS,
    ROWS,
    VOCAB,
    Case,
    Row,
    Scores,
    case_of,
    make_scores,
    random_rows,
    sample_on,
    scores_on,
    settings,
)

# -- a row does not depend on its neighbours


def crowd() -> list[Row]:
    """Each option alone in some rows, everything in some, nothing in some, greedy and sampled."""
    rng = np.random.default_rng(6)
    rows = []
    for temperature in (0.0, 1.0, 0.8):
        for options in ({}, *OPTIONS.values(), OPTIONS["top_p"] | OPTIONS["min_p"] | OPTIONS["repetition_penalty"]):
            fields: dict[str, Any] = {"temperature": temperature, **options}
            logits = rng.normal(0, 2, VOCAB).astype(np.float32)
            rows.append(
                Row(
                    logits,
                    SamplingParams(**fields),
                    rng.integers(0, VOCAB, 9).tolist(),
                    rng.integers(0, VOCAB, 9).tolist(),
                )
            )
    return rows


def alone(case: Case, row: int) -> Case:
    """The batch with nothing but greedy rows of other logits beside this one."""
    count = len(case.logits)
    here = np.arange(count) == row
    columns = {
        name: np.where(here, getattr(case.params, name), getattr(neutral, name))
        for neutral in [settings(count)]
        for name in neutral.__dataclass_fields__  # pyright: ignore[reportAttributeAccessIssue]
    }
    others = np.random.default_rng(row).normal(0, 5, case.logits.shape).astype(np.float32)
    return case._replace(logits=np.where(here[:, None], case.logits, others), params=settings(count, **columns))


def rows_that_depend_on_others(scores: Scores, devices: int) -> list[int]:
    """Compared bit for bit: the scores before the noise, then all that `sample` returns."""
    rows = crowd()
    count = len(rows)
    case = case_of(
        rows, seed=np.arange(count) * 7919, position=np.arange(count) + 3, top_logprobs=np.arange(count) % 4 - 1
    )
    together, (sampled, _) = scores(case), sample_on(devices, case, least=True)
    wrong = []
    for i, row in enumerate(rows):
        lone = alone(case, i)
        same = [np.array_equal(scores(lone)[i], together[i])] if row.params.temperature else []
        other, _ = sample_on(devices, lone, least=True)
        same.append(sampled.tokens[i] == other.tokens[i])
        same += [
            np.array_equal(getattr(sampled.logprobs, name)[i], getattr(other.logprobs, name)[i])
            for name in ("logprob", "rank", "top_tokens", "top_logprobs")
        ]
        if not all(same):
            wrong.append(i)
    return wrong


@pytest.mark.parametrize("devices", [1, 8])
def test_a_row_is_bitwise_the_same_alone_and_in_a_crowd(devices: int) -> None:
    assert rows_that_depend_on_others(scores_on(devices), devices) == []


def test_a_neighbour_that_leaks_is_found() -> None:
    """A temper that renormalises all rows as soon as one row wants a filter."""

    def leaky(x: Any, params: Any) -> Any:
        scores = sampler.temper(x, params)
        return jnp.where(jnp.any(params.top_p < 1), jnp.log(jnp.exp(scores)), scores)

    assert rows_that_depend_on_others(make_scores(1, leaky), 1)


def test_a_row_is_bitwise_the_same_in_another_place_and_its_token_on_another_mesh() -> None:
    rows = random_rows(12, ROWS)
    case = case_of(rows, seed=np.arange(ROWS), position=7, top_logprobs=5)
    order = np.random.default_rng(2).permutation(ROWS)
    moved = case_of([rows[i] for i in order], seed=order, position=7, top_logprobs=5)
    tokens = []
    for devices in MESHES:
        np.testing.assert_array_equal(scores_on(devices)(moved), scores_on(devices)(case)[order])
        (here, _), (there, _) = sample_on(devices, case), sample_on(devices, moved)
        np.testing.assert_array_equal(there.tokens, here.tokens[order])
        np.testing.assert_array_equal(there.logprobs.logprob, here.logprobs.logprob[order])
        tokens.append(here.tokens.tolist())
    assert tokens[0] == tokens[1] == tokens[2]


# -- the counts


@pytest.mark.parametrize("devices", MESHES)
def test_sampled_tokens_are_counted(devices: int) -> None:
    """Once, in the row's own history, up to the largest count; the prompt bit stays; rows without a history leave no
    trace."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1, (6, VOCAB)).astype(np.float32)
    tokens = logits.argmax(axis=1)
    tokens[4] = VOCAB - 1
    logits[4, VOCAB - 1] = 9.0
    counts = rng.integers(0, 4, (5, VOCAB)).astype(np.uint16)
    history = np.array([3, 0, NO_ROW, 4, 1, ROWS])  # the last is just past the table
    counts[3, tokens[0]] = 32766
    counts[0, tokens[1]] = 32767
    counts[4, tokens[3]] = 65535
    counts[1, tokens[4]] = 32768
    expected = counts.copy()
    expected[3, tokens[0]] = 32767
    expected[1, tokens[4]] = 32769
    few = {"history": history, "presence_penalty": 1e-30}  # a penalty, which moves no logit
    sampled, found = sample_on(devices, Case(logits, settings(6, **few), counts))
    assert sampled.tokens.tolist() == tokens.tolist()
    np.testing.assert_array_equal(found[:, :VOCAB], expected)
    assert not found[:, VOCAB:].any()


@pytest.mark.parametrize("devices", [1, 8])
def test_penalties_follow_the_tokens_of_earlier_steps(devices: int) -> None:
    """Greedy steps on the same logits: the tokens are those of a simulation with a list of tokens."""
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 1.5, (3, VOCAB)).astype(np.float32)
    chosen = [
        SamplingParams(temperature=0.0, frequency_penalty=0.35, presence_penalty=0.2),
        SamplingParams(temperature=0.0, repetition_penalty=1.25),
        SamplingParams(temperature=0.0),
    ]
    rows = [Row(x, p, [int(x.argmax())], []) for x, p in zip(logits, chosen, strict=True)]
    case = case_of(rows)
    seen: list[list[int]] = [[], [], []]
    for _ in range(25):
        expected = [int(row._replace(output=s).adjusted.argmax()) for row, s in zip(rows, seen, strict=True)]
        sampled, counts = sample_on(devices, case)
        assert sampled.tokens.tolist() == expected
        case = case._replace(counts=counts[:, :VOCAB])
        for s, token in zip(seen, expected, strict=True):
            s.append(token)
    assert len(set(seen[0])) > 5 and len(set(seen[1])) == 2 and len(set(seen[2])) == 1
