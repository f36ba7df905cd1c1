"""`SamplingParams`: how the tokens of one request are chosen and when it ends. Names and meanings follow vLLM's."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of one request.

    temperature          0 is greedy
    top_p                in (0, 1]: keep the likeliest tokens that reach this probability together
    top_k                keep this many likeliest tokens; 0 or -1 keeps all
    seed                 the request's noise; None draws from the engine's seed and the request's number
    max_tokens           tokens to generate at most; None: up to the model's length
    stop_token_ids       tokens that end the request, besides the model's own end tokens; the stop token is not part
                         of the text
    ignore_eos           go on past the model's end tokens
    skip_special_tokens  leave special tokens out of the text
    detokenize           False: no text, token ids only

    The remaining fields are accepted only at their defaults for now: a value that would have to be ignored is an error.
    Raises ValueError naming the field and what is accepted.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in _NOT_YET and value != f.default:
                raise ValueError(f"{f.name}: {value!r} is not supported yet; accepted: {f.default!r}")
        _number("temperature", self.temperature, 0, math.inf, "a number of at least 0")
        _number("top_p", self.top_p, 5e-324, 1, "a number above 0 and at most 1")
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**32 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        for name in ("ignore_eos", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not accepted; it must be True or False")
        if not isinstance(self.stop_token_ids, Collection) or isinstance(self.stop_token_ids, str):
            raise ValueError(f"stop_token_ids: {self.stop_token_ids!r} is not accepted; it must be a list of token ids")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)


_NOT_YET = {
    "n", "min_p", "min_tokens", "stop", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "allowed_token_ids", "logprobs", "prompt_logprobs", "include_stop_str_in_output",
}  # fmt: skip


def _number(name: str, value: Any, low: float, high: float, accepted: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name}: {value!r} is not accepted; it must be {accepted}")


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}: {value!r} is not accepted; it must be an integer from {low} to {high}")
