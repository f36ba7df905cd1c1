"""What callers give as prompts, checked: texts, token ids, vLLM's dicts, lists of these, and pairs to score."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from nanoflow_jax.sampling_params import SamplingParams, check_vocabulary
from nanoflow_jax.system.reading import one_line

Prompt = str | Sequence[int] | Mapping[str, Any]
ACCEPTED = 'a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or several, as a list. Raises ValueError for what is neither."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    try:
        several = len(prompts) > 0 and not isinstance(prompts[0], Integral)
    except (TypeError, KeyError):  # a set, a generator, None
        several = None
    if several is None or isinstance(prompts, bytes | bytearray):
        raise _refused("prompts", prompts, f"{ACCEPTED}, or a list of these")
    return list(prompts) if several or len(prompts) == 0 else [prompts]  # type: ignore[arg-type, list-item]


def text_and_tokens(prompt: Prompt) -> tuple[str | None, list[int] | None]:
    """The text of a prompt, its token ids, or both, where vLLM's dict has both: the ids then are what runs. Raises
    ValueError."""
    text, tokens = None, prompt
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, Mapping):
        given = {name: value for name, value in prompt.items() if value is not None}
        if odd := [name for name in given if name not in ("prompt", "prompt_token_ids")]:
            raise ValueError(
                one_line(f"prompt: {odd[0]!r} is not accepted in a dict; accepted: prompt, prompt_token_ids")
            )
        text, tokens = given.get("prompt"), given.get("prompt_token_ids")
        if text is not None and not isinstance(text, str):
            raise _refused("prompt", text, 'a text under "prompt"')
        if tokens is None and text is not None:
            return text, None
    try:
        if isinstance(tokens, str | bytes | bytearray | Mapping):
            raise TypeError
        return text, [operator.index(token) for token in tokens]  # type: ignore[union-attr]
    except TypeError:
        raise _refused("prompt", prompt, ACCEPTED) from None


def as_pairs(pairs: Sequence[tuple[Prompt, Prompt]]) -> list[tuple[Prompt, Prompt]]:
    """Pairs of a context and its continuation. Raises ValueError for anything else, one pair by itself included."""
    accepted = 'a list of pairs (context, continuation), such as [("12+30=", "42")]'
    if isinstance(pairs, str | bytes | Mapping) or not isinstance(pairs, Sequence):
        raise _refused("pairs", pairs, accepted)
    for pair in pairs:
        if isinstance(pair, str | bytes | Mapping) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise _refused("pairs", pair, accepted)
    return [(context, continuation) for context, continuation in pairs]


def check_prompt(
    token_ids: Sequence[int], params: SamplingParams, max_model_len: int, vocab_size: int, end_tokens: Sequence[int]
) -> None:
    """Raises ValueError when a prompt can never be served by a model with these figures."""
    if not token_ids:
        raise ValueError("prompt: it is empty; at least one token is needed")
    if len(token_ids) >= max_model_len:
        raise ValueError(f"prompt: {len(token_ids)} tokens; accepted: at most {max_model_len - 1} (max_model_len - 1)")
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"prompt: token id {low if low < 0 else high} is outside the vocabulary; accepted: 0 to {vocab_size - 1}"
        )
    check_vocabulary(params, vocab_size, () if params.ignore_eos else end_tokens)


def _refused(name: str, value: Any, accepted: str) -> ValueError:
    return ValueError(f"{name}: {one_line(repr(value), 80)} is not accepted; it must be {accepted}")
