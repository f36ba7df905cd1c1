"""`SamplingParams`: a field that is accepted is applied, so everything else is an error that names the field."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from nanoflow_jax import SamplingParams

ACCEPTED: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 1, 0.7, 1e-9, 100.0],
    "top_p": [1, 1.0, 0.5, 1e-12, 0.999999],
    "top_k": [0, -1, 1, 50, 2**31 - 1],
    "seed": [None, 0, 1, 2**32 - 1],
    "max_tokens": [None, 1, 100_000],
    "stop_token_ids": [(), [], [5], (0, 7, 2**31 - 1), {3}],
    "ignore_eos": [True, False],
    "skip_special_tokens": [True, False],
    "detokenize": [True, False],
}

REFUSED: dict[str, list[Any]] = {
    "temperature": [-0.1, float("nan"), float("inf"), "1", None, True],
    "top_p": [0, -0.5, 1.0001, float("nan"), "0.5", None, True],
    "top_k": [-2, 2**31, 1.0, "5", None, True],
    "seed": [-1, 2**32, 1.5, "1", True],
    "max_tokens": [0, -1, 2.0, "8", True],
    "stop_token_ids": [[-1], [1.0], ["a"], "ab", 5, None, [True], [2**31]],
    "ignore_eos": [1, 0, "yes", None],
    "skip_special_tokens": [1, "no", None],
    "detokenize": [0, "", None],
}

NOT_YET: dict[str, list[Any]] = {
    "n": [2, 0, -1],
    "min_p": [0.1, -1],
    "min_tokens": [1],
    "stop": ["x", ["a", "b"]],
    "presence_penalty": [0.5],
    "frequency_penalty": [-0.5],
    "repetition_penalty": [1.1],
    "logit_bias": [{3: 1.0}],
    "allowed_token_ids": [[1, 2]],
    "logprobs": [0, 5],
    "prompt_logprobs": [0],
    "include_stop_str_in_output": [True],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, values in table.items() for value in values]


def test_every_field_of_the_interface_is_in_a_table() -> None:
    """No field is left without a test; the names are those of the contract, in its order."""
    names = [f.name for f in fields(SamplingParams)]
    assert set(names) == set(ACCEPTED) | set(NOT_YET)
    assert set(ACCEPTED) == set(REFUSED)
    assert names == [
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "max_tokens",
        "min_tokens",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "allowed_token_ids",
        "logprobs",
        "prompt_logprobs",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "detokenize",
    ]


@pytest.mark.parametrize(("name", "value"), cases(ACCEPTED))
def test_accepted_values_are_kept(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert "it must be" in message and "\n" not in message


@pytest.mark.parametrize(("name", "value"), cases(NOT_YET))
def test_fields_that_are_not_applied_are_refused_by_name(name: str, value: Any) -> None:
    """At a value that would have to be ignored; the default, given explicitly, is fine."""
    with pytest.raises(ValueError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert "not supported yet" in message and "\n" not in message
    default: Any = next(f.default for f in fields(SamplingParams) if f.name == name)
    assert getattr(SamplingParams(**{name: default}), name) == default


def test_an_unknown_field_is_a_type_error() -> None:
    unknown: dict[str, Any] = {"beam_width": 4}
    with pytest.raises(TypeError, match="beam_width"):
        SamplingParams(**unknown)


def test_it_is_frozen() -> None:
    params: Any = SamplingParams()
    with pytest.raises(AttributeError):
        params.temperature = 2.0
