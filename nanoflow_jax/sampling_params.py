"""`SamplingParams`: how the tokens of one request are chosen and when it ends. Names and meanings follow vLLM's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from nanoflow_jax.system.reading import check_names, parse_json, refused

MAX_LOGPROBS = 20  # likeliest tokens that a request may ask for
MAX_N = 1000  # completions of one prompt, where files ask for them
MAX_FLOAT = 1e30  # settings stay in float32, and so do logits times a penalty
MAX_INT = 2**31 - 1


def _names_the_nearest[T](cls: type[T]) -> type[T]:
    """For a keyword that is no field: TypeError, as Python's own, with the field that was perhaps meant."""
    made, known = cls.__init__, list(cls.__dataclass_fields__)  # type: ignore[attr-defined]

    @wraps(made)
    def init(self: T, *args: Any, **given: Any) -> None:
        check_names(cls.__name__, "field", given, known)
        made(self, *args, **given)

    setattr(cls, "__init__", init)  # noqa: B010 - as an assignment it would be an error of types
    return cls


@_names_the_nearest
@dataclass(frozen=True)
class StructuredOutputsParams:
    """What form an output must have. Exactly one of the first five is given; names and meanings are vLLM's.

    json         JSON that fits this schema (a mapping, or its text)
    regex        text that this regular expression matches as a whole (the syntax of Rust's regex crate)
    choice       one of these texts
    grammar      text of this grammar: Lark as llguidance has it, or GBNF
    json_object  True: any JSON object
    disable_any_whitespace         JSON without spaces and line ends between its parts
    disable_additional_properties  objects whose schema names properties have no others
    whitespace_pattern             regular expression of what stands between the parts of JSON

    Raises ValueError naming the field and what is accepted, and TypeError for a name that is no field. Whether it can
    be compiled is found out when a request is given to an `LLM`.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        kinds = ("json", "regex", "choice", "grammar", "json_object")
        given = [name for name in kinds if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"structured_outputs: {found} given; accepted: exactly one of {', '.join(kinds)}")
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool) and (name != "json_object" or self.json_object is not None):
                raise refused(f"structured_outputs: {name}", getattr(self, name), "True or False")
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise refused(f"structured_outputs: {name}", value, "a text that is not empty")
        if self.choice is not None:
            accepted = "a list of texts, none of them empty"
            if not isinstance(self.choice, (list, tuple)) or not self.choice:
                raise refused("structured_outputs: choice", self.choice, accepted)
            if not all(isinstance(text, str) and text for text in self.choice):
                raise refused("structured_outputs: choice", self.choice, accepted)
        of_json = self.json is not None or bool(self.json_object)
        for name in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"):
            if getattr(self, name) and not of_json:
                raise ValueError(f"structured_outputs: {name} is about JSON, but {given[0]} is given")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError("structured_outputs: whitespace_pattern, but disable_any_whitespace allows none; give one")
        if self.json is not None:
            self.schema()

    def schema(self) -> dict[str, Any]:
        """Of `json` or `json_object`. Raises ValueError."""
        if self.json_object:
            return {"type": "object"}
        found: Any = self.json
        if isinstance(found, str):
            try:
                found = parse_json(found)
            except ValueError as error:
                raise ValueError(f"structured_outputs: json: not JSON ({error})") from None
        if not isinstance(found, Mapping):
            raise refused("structured_outputs: json", self.json, "a JSON schema: an object, or its text")
        return dict(found)


@_names_the_nearest
@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of one request.

    n                    completions of the prompt; each has noise of its own
    temperature          0 is greedy
    top_p                in (0, 1]: keep the likeliest tokens that reach this probability together
    top_k                keep this many likeliest tokens; 0 or -1 keeps all
    min_p                in [0, 1]: keep tokens at least this likely, relative to the likeliest
    seed                 the request's noise; None draws from the engine's seed and the request's number
    max_tokens           tokens to generate at most; None: up to the model's length
    min_tokens           tokens to generate before an end token or a stop string may end the request
    stop                 strings that end the request when they appear in the text
    stop_token_ids       tokens that end the request, besides the model's own end tokens; the stop token is not part
                         of the text
    ignore_eos           go on past the model's end tokens
    presence_penalty     in [-2, 2]: taken from the logits of tokens generated before
    frequency_penalty    in [-2, 2]: the same, times how often
    repetition_penalty   above 0: positive logits of tokens of the prompt or generated before are divided by it,
                         negative ones multiplied
    logit_bias           token id -> number in [-100, 100] added to its logit
    allowed_token_ids    only these tokens are generated; None: all
    logprobs             how many likeliest tokens to report with their logprobs at each generated token, besides that
                         token; None: no logprobs. Those of the raw logits: nothing above changes them
    prompt_logprobs      the same at each token of the prompt but the first
    include_stop_str_in_output  leave the stop string in the text
    skip_special_tokens  leave special tokens out of the text
    detokenize           False: no text, token ids only
    structured_outputs   the form that the output must have; None: any

    The order of processing: structured_outputs, logit_bias and allowed_token_ids, penalties, temperature, min_p, top_k,
    top_p. Greedy requests are subject to those before temperature. Raises ValueError naming the field and what is
    accepted, and TypeError for a name that is no field.
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
    stop_token_ids: Collection[int] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Collection[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_INT)
        _number("temperature", self.temperature, 0, MAX_FLOAT, "a number from 0 to 1e30")
        _number("top_p", self.top_p, 5e-324, 1, "a number above 0 and at most 1")
        _integer("top_k", self.top_k, -1, MAX_INT)
        _number("min_p", self.min_p, 0, 1, "a number from 0 to 1")
        _number("presence_penalty", self.presence_penalty, -2, 2, "a number from -2 to 2")
        _number("frequency_penalty", self.frequency_penalty, -2, 2, "a number from -2 to 2")
        _number(
            "repetition_penalty", self.repetition_penalty, 1 / MAX_FLOAT, MAX_FLOAT,
            "a number above 0, from 1e-30 to 1e30",
        )  # fmt: skip
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**32 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, MAX_INT)
        _integer("min_tokens", self.min_tokens, 0, MAX_INT)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise refused("min_tokens", self.min_tokens, f"at most max_tokens, {self.max_tokens}")
        if self.n > 1 and self.temperature == 0:
            raise refused("n", self.n, "1 with temperature 0: all completions would be the same")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise refused(name, getattr(self, name), "True or False")
        _token_ids("stop_token_ids", self.stop_token_ids, "a list of token ids")
        if self.allowed_token_ids is not None:
            accepted = "None or a list of at least one token id"
            _token_ids("allowed_token_ids", self.allowed_token_ids, accepted)
            if not self.allowed_token_ids:
                raise refused("allowed_token_ids", self.allowed_token_ids, accepted)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise refused("logit_bias", self.logit_bias, "None or a mapping of token ids to numbers")
            for token, bias in self.logit_bias.items():
                _integer("logit_bias", token, 0, MAX_INT)
                _number("logit_bias", bias, -100, 100, "a number from -100 to 100 for each token")
        self._check_stop()
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise refused("structured_outputs", self.structured_outputs, "None or StructuredOutputsParams")

    def _check_stop(self) -> None:
        if self.stop is None:
            return
        accepted = "a string or a list of strings, none of them empty"
        if not isinstance(self.stop, (str, list, tuple)):
            raise refused("stop", self.stop, accepted)
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise refused("stop", self.stop, accepted)
        if self.stop_strings and not self.detokenize:
            raise refused("stop", self.stop, "None with detokenize=False: there is no text to search")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty when there is none."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def check_vocabulary(params: SamplingParams, vocab_size: int, end_tokens: Collection[int] = ()) -> None:
    """Raises ValueError when `params` cannot be applied to a model with this vocabulary.

    end_tokens  those that end the request besides stop_token_ids: forbidden, too, before min_tokens
    """
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        if (outside := max(getattr(params, name) or (0,))) >= vocab_size:
            raise ValueError(f"{name}: token id {outside} is outside the vocabulary; accepted: 0 to {vocab_size - 1}")
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > vocab_size:
            raise ValueError(f"{name}: {getattr(params, name)} tokens; accepted: at most the vocabulary's {vocab_size}")
    if params.min_tokens and params.allowed_token_ids is not None:
        ending = {*params.stop_token_ids, *end_tokens}
        if ending.issuperset(params.allowed_token_ids):
            raise ValueError(
                "min_tokens: every token of allowed_token_ids ends the request; accepted: 0, or another allowed token"
            )


def _number(name: str, value: Any, low: float, high: float, accepted: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # which NaN is not
        raise refused(name, value, accepted)


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise refused(name, value, f"an integer from {low} to {high}")


def _token_ids(name: str, value: Any, accepted: str) -> None:
    if not isinstance(value, Collection) or isinstance(value, (str, bytes, Mapping)):
        raise refused(name, value, accepted)
    for token in value:
        _integer(name, token, 0, MAX_INT)
