"""`SamplingParams`: a field that is accepted is applied, so everything else is an error that names the field."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from typing import Any

import pytest

from nanoflow_jax import SamplingParams
from nanoflow_jax.sampling_params import StructuredOutputsParams as Form
from nanoflow_jax.sampling_params import check_vocabulary

ACCEPTED: dict[str, list[Any]] = {
    "n": [1, 2, 64],
    "temperature": [0, 0.0, 1, 0.7, 1e-9, 100.0],
    "top_p": [1, 1.0, 0.5, 1e-12, 0.999999],
    "top_k": [0, -1, 1, 50, 2**31 - 1],
    "min_p": [0, 0.0, 0.05, 1, 1.0],
    "seed": [None, 0, 1, 2**32 - 1],
    "max_tokens": [None, 1, 100_000],
    "min_tokens": [0, 1, 16],
    "stop": [None, "x", "\n\n", [], ["a"], ("a", "bc")],
    "stop_token_ids": [(), [], [5], (0, 7, 2**31 - 1), {3}],
    "ignore_eos": [True, False],
    "presence_penalty": [-2, 0, 0.5, 2.0],
    "frequency_penalty": [-2.0, 0, 0.5, 2],
    "repetition_penalty": [1, 0.1, 1.3, 5.0, 1e-30, 1e30],
    "logit_bias": [None, {}, {0: -100}, {3: 1.5, 2**31 - 1: 100.0}],
    "allowed_token_ids": [None, [0], (1, 2), {3}, [2**31 - 1], range(5)],
    "logprobs": [None, 0, 1, 20],
    "prompt_logprobs": [None, 0, 1, 20],
    "include_stop_str_in_output": [True, False],
    "skip_special_tokens": [True, False],
    "detokenize": [True, False],
    "structured_outputs": [None, Form(regex="a"), Form(json={}), Form(json="{}"), Form(choice=["a", "b"])],
}

REFUSED: dict[str, list[Any]] = {
    "n": [0, -1, 1.0, "1", None, True],
    "temperature": [-0.1, float("nan"), float("inf"), 1e31, "1", None, True],
    "top_p": [0, -0.5, 1.0001, float("nan"), "0.5", None, True],
    "top_k": [-2, 2**31, 1.0, "5", None, True],
    "min_p": [-0.1, 1.01, float("nan"), "0", None, False],
    "seed": [-1, 2**32, 1.5, "1", True],
    "max_tokens": [0, -1, 2.0, "8", True],
    "min_tokens": [-1, 17, 1.0, "1", None, True],
    "stop": ["", [""], ["a", ""], [1], 5, b"x", {"a": 1}, True],
    "stop_token_ids": [[-1], [1.0], ["a"], "ab", 5, None, [True], [2**31], {1: 2}],
    "ignore_eos": [1, 0, "yes", None],
    "presence_penalty": [-2.01, 3, float("nan"), "0", None, True],
    "frequency_penalty": [-2.01, 3, float("inf"), "0", None, True],
    "repetition_penalty": [0, -1, 1e-31, 1e31, float("nan"), float("inf"), "1", None, True],
    "logit_bias": [
        [1],
        {"3": 1.0},
        {-1: 1.0},
        {1: 100.5},
        {1: -101},
        {1: float("nan")},
        {1: float("-inf")},
        {1: None},
        {1.0: 1.0},
        {True: 1.0},
        {2**31: 1.0},
        "ab",
        5,
    ],
    "allowed_token_ids": [[], (), [-1], [1.0], ["a"], "ab", 5, [True], [2**31], {1: 2}],
    "logprobs": [-1, 21, 1.0, "5", True],
    "prompt_logprobs": [-1, 21, 1.0, "5", True],
    "include_stop_str_in_output": [1, 0, "yes", None],
    "skip_special_tokens": [1, "no", None],
    "detokenize": [0, "", None],
    "structured_outputs": ["json", {"regex": "a"}, True],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, values in table.items() for value in values]


def test_every_field_of_the_interface_is_in_a_table() -> None:
    """No field is left without a test; the names are those of the contract, in its order."""
    names = [f.name for f in fields(SamplingParams)]
    assert names == list(ACCEPTED) == list(REFUSED)
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
        "structured_outputs",
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


def test_defaults_are_accepted() -> None:
    """And given explicitly they change nothing."""
    params = SamplingParams()
    defaults: dict[str, Any] = {f.name: f.default for f in fields(SamplingParams)}
    assert SamplingParams(**defaults) == params
    assert params.stop_strings == ()


def refusal(**values: Any) -> str:
    with pytest.raises(ValueError) as caught:
        SamplingParams(**values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fields_that_contradict_each_other() -> None:
    assert refusal(min_tokens=9, max_tokens=8) == "min_tokens: 9 is not accepted; it must be at most max_tokens, 8"
    assert SamplingParams(min_tokens=9, max_tokens=None).min_tokens == 9
    assert refusal(n=2, temperature=0).startswith("n: 2 is not accepted; it must be 1 with temperature 0")
    assert "detokenize=False" in refusal(stop="a", detokenize=False)
    assert SamplingParams(stop=[], detokenize=False).stop_strings == ()


FORMS: list[tuple[dict[str, Any], str]] = [
    ({}, "none given; accepted: exactly one of json, regex, choice, grammar, json_object"),
    ({"json_object": False}, "none given"),
    ({"regex": "a", "json": {}}, "json and regex given"),
    ({"regex": ""}, "regex: '' is not accepted"),
    ({"regex": b"a"}, "regex: b'a'"),
    ({"grammar": ["a"]}, "grammar: "),
    ({"choice": []}, "choice: "),
    ({"choice": "ab"}, "choice: "),
    ({"choice": ["a", ""]}, "choice: "),
    ({"json": "{"}, "json: not JSON"),
    ({"json": '{"a": 1, "a": 2}'}, "json: not JSON"),
    ({"json": [1]}, "json: [1] is not accepted; it must be a JSON schema"),
    ({"json": "true"}, "json: 'true' is not accepted"),
    ({"json_object": 1}, "json_object: 1"),
    ({"json": {}, "disable_any_whitespace": "yes"}, "disable_any_whitespace: 'yes'"),
    ({"json": {}, "whitespace_pattern": 3}, "whitespace_pattern: 3"),
    ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "give one"),
    ({"regex": "a", "disable_additional_properties": True}, "disable_additional_properties is about JSON"),
]


@pytest.mark.parametrize(("given", "words"), FORMS, ids=[str(given) for given, _ in FORMS])
def test_forms_that_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        Form(**given)
    assert str(caught.value).startswith(f"structured_outputs: {words}") or words in str(caught.value)
    assert str(caught.value).isprintable()


def test_forms_that_there_are_not() -> None:
    with pytest.raises(TypeError, match="no field 'structural_tag'; accepted: json, regex"):
        Form(structural_tag="a")  # type: ignore[call-arg]


def test_stop_strings() -> None:
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop_strings == ("ab", "c")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"stop_token_ids": [3, 10]}, "stop_token_ids: token id 10 is outside the vocabulary; accepted: 0 to 9"),
        ({"allowed_token_ids": [12, 3]}, "allowed_token_ids: token id 12 is outside the vocabulary; accepted: 0 to 9"),
        ({"logit_bias": {10: 1.0}}, "logit_bias: token id 10 is outside the vocabulary; accepted: 0 to 9"),
        ({"logprobs": 11}, "logprobs: 11 tokens; accepted: at most the vocabulary's 10"),
        ({"prompt_logprobs": 20}, "prompt_logprobs: 20 tokens; accepted: at most the vocabulary's 10"),
    ],
)
def test_what_does_not_fit_the_vocabulary(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_vocabulary(SamplingParams(**values), 10)
    assert str(caught.value) == named
    check_vocabulary(SamplingParams(**values), 100)


def test_min_tokens_must_leave_an_allowed_token() -> None:
    params = SamplingParams(min_tokens=2, allowed_token_ids=[3, 4], stop_token_ids=[3])
    check_vocabulary(params, 10)
    check_vocabulary(params, 10, [5])
    with pytest.raises(ValueError, match=r"^min_tokens: every token of allowed_token_ids ends the request"):
        check_vocabulary(params, 10, [5, 4])
    check_vocabulary(SamplingParams(allowed_token_ids=[3, 4]), 10, [3, 4])


def test_an_unknown_field_is_a_type_error() -> None:
    unknown: dict[str, Any] = {"beam_width": 4}
    with pytest.raises(TypeError, match="beam_width"):
        SamplingParams(**unknown)


def test_it_is_frozen() -> None:
    params: Any = SamplingParams()
    with pytest.raises(AttributeError):
        params.temperature = 2.0


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("temprature", "did you mean temperature?"),
        ("max_new_tokens", "did you mean max_tokens?"),
        ("best_of", "accepted: n, temperature, "),
    ],
)
def test_an_unknown_field_is_told_its_neighbour(name: str, told: str) -> None:
    unknown: dict[str, Any] = {name: 1}
    with pytest.raises(TypeError) as error:
        SamplingParams(**unknown)
    assert str(error.value).startswith(f"SamplingParams: no field {name!r}; {told}")
    assert replace(SamplingParams(n=2), top_k=3) == SamplingParams(2, top_k=3)
    assert pickle.loads(pickle.dumps(SamplingParams(top_k=3))) == SamplingParams(top_k=3)
