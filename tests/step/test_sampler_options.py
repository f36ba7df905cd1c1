"""Every option of `SamplingParams` that changes probabilities: against `transformers`, against its definition in
float64, and without effect on other rows."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import stats

from nanoflow_jax.sampling_params import SamplingParams
from tests.step.sampler_driver import (
    MESHES,
    NO_ROW,
    OPTIONS,
    ROWS,
    VOCAB,
    Case,
    Row,
    case_of,
    probabilities,
    random_rows,
    sample_on,
    scores_on,
    settings,
    tokens_on,
    transformers_rows,
)

SCORES_TOLERANCE = 1e-5  # absolute, for scores of at most about 100: float32 against float64


def normalised(scores: np.ndarray) -> np.ndarray:
    return scores - scores.max(axis=-1, keepdims=True)


def wrong_rows(scores: np.ndarray, expected: np.ndarray) -> list[int]:
    """Rows whose kept set differs, or whose scores do, up to a constant per row; both [B, V], -inf for what is
    left out."""
    wrong = []
    for i, (found, wanted) in enumerate(zip(normalised(scores), normalised(expected), strict=True)):
        kept = wanted > -np.inf
        if not np.array_equal(found > -np.inf, kept) or np.abs(found[kept] - wanted[kept]).max() > SCORES_TOLERANCE:
            wrong.append(i)
    return wrong


def expected_scores(rows: list[Row]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.stack([probabilities(row.adjusted, row.params) for row in rows]))


# -- against transformers


@pytest.mark.parametrize("devices", MESHES)
def test_scores_are_those_of_transformers(devices: int) -> None:
    """Repetition penalty, logit bias, allowed tokens, min_tokens, temperature, min-p, top-k, top-p and their order."""
    rows, scores = transformers_rows()
    assert wrong_rows(scores_on(devices)(case_of(rows)), scores) == []


def test_the_definition_in_this_test_is_that_of_transformers() -> None:
    rows, scores = transformers_rows()
    assert wrong_rows(expected_scores(rows), scores) == []


NEUTRAL: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    "bias": NO_ROW, "history": NO_ROW,
}  # fmt: skip


def ignoring(option: str, case: Case) -> Case:
    column = np.full_like(getattr(case.params, option), NEUTRAL.get(option, 0))
    return case._replace(params=replace(case.params, **{option: column}))


@pytest.mark.parametrize("ignored", NEUTRAL)
def test_the_test_against_transformers_finds_an_ignored_option(ignored: str) -> None:
    """In several cases, and only in those that have the option."""
    rows, scores = transformers_rows()
    case = case_of(rows)
    found = wrong_rows(scores_on(2)(ignoring(ignored, case)), scores)
    assert len(found) >= 3
    assert all(getattr(case.params, ignored)[i] != NEUTRAL[ignored] for i in found)


# -- against the definition


@pytest.mark.parametrize("devices", MESHES)
def test_scores_are_those_of_the_definition(devices: int) -> None:
    """All options at once, frequency and presence penalties among them."""
    rows = random_rows(3, ROWS)
    assert wrong_rows(scores_on(devices)(case_of(rows)), expected_scores(rows)) == []


@pytest.mark.parametrize("ignored", [*NEUTRAL, "presence_penalty", "frequency_penalty"])
def test_the_test_against_the_definition_finds_an_ignored_option(ignored: str) -> None:
    rows = random_rows(3, ROWS)
    case = case_of(rows)
    scores = scores_on(2)(ignoring(ignored, case))
    assert len(wrong_rows(scores, expected_scores(rows))) >= 3


def test_penalties_read_the_right_part_of_the_history() -> None:
    """Repetition: prompt and output. Frequency and presence: the output only, by how often and whether."""
    logits = np.array([[2.0, 2.0, 2.0, 2.0, -1.0, -1.0, 0.0, 0.0]], np.float32)
    counts = np.array([[0, 1 << 15, 3, (1 << 15) + 2, 1 << 15, 1, 0, 1 << 15]], np.uint16)

    def scores(**params: float) -> np.ndarray:
        return scores_on(2)(Case(logits, settings(1, temperature=1.0, history=0, **params), counts))[0]

    def expected(x: list[float]) -> np.ndarray:
        return np.array(x, np.float32) - max(x)

    np.testing.assert_array_equal(scores(repetition_penalty=2), expected([2, 1, 1, 1, -2, -2, 0, 0]))
    np.testing.assert_array_equal(scores(repetition_penalty=0.5), expected([2, 4, 4, 4, -0.5, -0.5, 0, 0]))
    np.testing.assert_array_equal(scores(frequency_penalty=0.5), expected([2, 2, 0.5, 1, -1, -1.5, 0, 0]))
    np.testing.assert_array_equal(scores(presence_penalty=-0.5), expected([2, 2, 2.5, 2.5, -1, -0.5, 0, 0]))


@pytest.mark.parametrize("devices", [1, 8])
def test_extreme_settings_stay_finite(devices: int) -> None:
    """The largest and smallest values that are accepted leave scores without NaN, and a token of the vocabulary."""
    rng = np.random.default_rng(0)
    extremes = {
        "temperature": [1e-30, 1e-10, 1e30], "top_p": [1e-30, 1.0], "min_p": [0.0, 1e-30, 1.0],
        "repetition_penalty": [1e-30, 1.0, 1e30], "presence_penalty": [-2, 2], "frequency_penalty": [-2, 2],
        "top_k": [0, 1, 2**31 - 1],
    }  # fmt: skip
    count = ROWS
    params = settings(
        count,
        history=np.arange(count),
        bias=np.arange(count),
        top_logprobs=3,
        seed=np.arange(count),
        **{name: rng.choice(values, count) for name, values in extremes.items()},
    )
    logits = rng.choice([-1e4, -3.0, 0.0, 3.0, 1e4], (count, VOCAB)).astype(np.float32)
    counts = rng.choice([0, 1, 32767, 32768, 65535], (count, VOCAB))
    biases = rng.choice([-np.inf, -100, 0, 100], (count, VOCAB))
    biases[:, 77] = 0
    case = Case(logits, params, counts, biases)
    assert not np.isnan(scores_on(devices)(case)).any()
    sampled, _ = sample_on(devices, case)
    assert (sampled.tokens >= 0).all() and (sampled.tokens < VOCAB).all()
    assert (biases[np.arange(count), sampled.tokens] > -np.inf).all()
    assert not np.isnan(sampled.logprobs.logprob).any()


# -- through `sample`


SMALL = 24


def small_row(**fields: Any) -> Row:
    rng = np.random.default_rng(8)
    return Row(rng.normal(0, 1, SMALL).astype(np.float32), SamplingParams(**fields), [1, 2, 3, 3], [3, 4, 4, 4, 17, 23])


SMALL_OPTIONS = OPTIONS | {
    "logit_bias": {"logit_bias": {0: 3.0, 11: -2.5, 23: 2.0}},
    "allowed_token_ids": {"allowed_token_ids": [1, 4, 12, 21, 23]},
    "min_tokens": {"min_tokens": 10, "stop_token_ids": [4, 19, 23]},
    "everything": {
        "temperature": 1.6, "top_p": 0.93, "top_k": 12, "min_p": 0.03, "presence_penalty": 0.5,
        "frequency_penalty": -0.2, "repetition_penalty": 1.3, "logit_bias": {5: 1.5, 9: -1.0},
        "allowed_token_ids": list(range(2, 24)), "min_tokens": 8, "stop_token_ids": [6, 22],
    },
}  # fmt: skip
DRAWS = 8192


COLUMNS = [
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "bias",
]  # fmt: skip


@cache
def drawn(option: str, devices: int) -> np.ndarray:
    """The same row many times, over seeds and positions."""
    row = small_row(**SMALL_OPTIONS[option])
    case = case_of([row])
    assert case.counts is not None
    columns = {name: getattr(case.params, name)[0] for name in COLUMNS}
    # A row of counts each, as no two may share one.
    history = np.arange(DRAWS) if case.params.history[0] == 0 else NO_ROW
    params = settings(DRAWS, **columns, history=history, seed=np.arange(DRAWS) // 2, position=np.arange(DRAWS) % 2)
    logits, counts = (np.broadcast_to(x, (DRAWS, SMALL)) for x in (case.logits, case.counts))
    return tokens_on(devices, logits, params, counts, case.biases)


def p_value(tokens: np.ndarray, expected: np.ndarray) -> float:
    """Of Pearson's chi-square test; 0 when a token of probability 0 is there."""
    counts = np.bincount(tokens, minlength=len(expected))
    some = expected > 0
    if counts[~some].any():
        return 0.0
    return float(stats.chisquare(counts[some], len(tokens) * expected[some]).pvalue) if some.sum() > 1 else 1.0


@pytest.mark.parametrize("option", SMALL_OPTIONS)
def test_tokens_come_as_often_as_they_should(option: str) -> None:
    row = small_row(**SMALL_OPTIONS[option])
    expected = probabilities(row.adjusted, row.params)
    plain = small_row()
    assert p_value(drawn(option, 2), expected) > 1e-3
    ignored = probabilities(plain.adjusted, plain.params)
    assert p_value(drawn(option, 2), ignored) < 1e-6  # of a sampler that ignores the option


GREEDY = [name for name in SMALL_OPTIONS if name not in ("temperature", "top_p", "top_k", "min_p")]


@pytest.mark.parametrize("devices", MESHES)
def test_bias_and_penalties_act_on_greedy_rows(devices: int) -> None:
    """One option per row, and each moves the largest logit; rows without any keep theirs."""
    rng = np.random.default_rng(4)
    rows = []
    for _ in range(9):
        logits = rng.normal(0, 0.3, VOCAB).astype(np.float32)
        best = int(logits.argmax())
        for name in (
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "logit_bias",
            "allowed_token_ids",
            "min_tokens",
        ):
            options: dict[str, Any] = OPTIONS[name] | {"temperature": 0.0}
            if name == "frequency_penalty":
                options["frequency_penalty"] = 0.4
            if name == "min_tokens":
                options["stop_token_ids"] = [best, 130]
            rows.append(Row(logits, SamplingParams(**options), [best], [best, best, 5]))
        rows.append(Row(logits, SamplingParams(temperature=0.0), [best], [best, best, 5]))
    case = case_of(rows)
    tokens = tokens_on(devices, *case)
    assert tokens.tolist() == [int(row.adjusted.argmax()) for row in rows]
    moved = tokens != case.logits.argmax(axis=1)
    by_option = moved.reshape(9, 7).mean(axis=0)
    assert (by_option[:6] > 0.5).all() and by_option[6] == 0
