"""What is taken as prompts and pairs, and the one line for what is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nanoflow_jax.chat import as_conversations
from nanoflow_jax.prompts import as_list, as_pairs, text_and_tokens


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", [""]),
        ("ab", ["ab"]),
        ([], []),
        ([1, 2], [[1, 2]]),
        (["a", [1, 2]], ["a", [1, 2]]),
        (("a", "b"), ["a", "b"]),
        ({"prompt": "a"}, [{"prompt": "a"}]),
        ([{"prompt": "a"}, "b"], [{"prompt": "a"}, "b"]),
    ],
    ids=str,
)
def test_one_prompt_or_several(given: Any, expected: list[Any]) -> None:
    assert as_list(given) == expected


def test_arrays_are_token_ids() -> None:
    (one,) = as_list(np.array([1, 2]))  # type: ignore[arg-type]
    assert text_and_tokens(one) == (None, [1, 2])
    assert [text_and_tokens(p) for p in as_list(np.array([[1, 2], [3, 4]]))] == [(None, [1, 2]), (None, [3, 4])]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", ("a", None)),
        ({"prompt": "a"}, ("a", None)),
        ({"prompt": "a", "prompt_token_ids": None}, ("a", None)),
        ({"prompt_token_ids": [1, 2]}, (None, [1, 2])),
        ({"prompt": "a", "prompt_token_ids": (1, 2)}, ("a", [1, 2])),
        ([], (None, [])),
    ],
    ids=str,
)
def test_text_and_tokens_of_a_prompt(given: Any, expected: Any) -> None:
    assert text_and_tokens(given) == expected


@pytest.mark.parametrize(
    ("take", "given", "words"),
    [
        *((as_list, given, "prompts: ") for given in (None, 5, b"ab", {1, 2}, (c for c in "ab"))),
        *((text_and_tokens, given, "prompt: ") for given in (None, 5, b"ab", [1.5], ["a"], {}, {"prompt": 5}, {1: 2})),
        (text_and_tokens, {"prompt": "a", "multi_modal_data": {}}, "prompt: 'multi_modal_data' is not accepted"),
        (text_and_tokens, {"prompt_token_ids": "ab"}, "prompt: {'prompt_token_ids': 'ab'} is not accepted"),
        (text_and_tokens, ["a" * 900], "prompt: "),
        (as_pairs, ("a", "b"), "pairs: 'a' is not accepted; it must be a list of pairs (context, continuation)"),
        *((as_pairs, given, "pairs: ") for given in (None, 5, "ab", [("a",)], [("a", "b", "c")], ["ab"], [None])),
        *((as_conversations, given, "messages: ") for given in (None, 5, "hi", {"role": "user", "content": "hi"})),
    ],
)  # fmt: skip
def test_all_else_is_one_line(take: Callable[[Any], Any], given: Any, words: str) -> None:
    with pytest.raises(ValueError) as error:
        take(given)
    message = str(error.value)
    assert message.startswith(words) and "accepted" in message and "\n" not in message and len(message) < 300
