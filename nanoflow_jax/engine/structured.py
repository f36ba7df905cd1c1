"""Structured outputs: which tokens a constrained request may have next, by llguidance.

A request has a matcher, which takes its tokens as the host books them and then says which may follow. The matcher knows
tokens by the bytes that they add to a text, the same bytes that the text is made of, so what it allows is what the text
shows. Special and end tokens are no text, and never allowed inside of one; where the text may end, the request's end
tokens are allowed. A thought (`engine.reasoning`) before the text is free.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from nanoflow_jax.engine.reasoning import Reasoning, Thought
from nanoflow_jax.sampling_params import StructuredOutputsParams
from nanoflow_jax.system.install import install_command
from nanoflow_jax.system.reading import one_line
from nanoflow_jax.tokenizer import Tokenizer

MISSING = f"structured_outputs: llguidance is needed; accepted: {install_command('structured')}"
MOST_GRAMMARS = 256  # that are kept compiled, the latest used
PARALLEL = 16  # matchers from which on threads share the work; for a few, waking them takes longer


class Constraint:
    """What one request's output may be, as far as its tokens have been taken."""

    def __init__(self, matcher: Any, stop_tokens: Collection[int], thought: Thought | None = None):
        self.matcher, self._thought = matcher, thought
        self.stop_tokens = tuple(stop_tokens)
        self.taken = 0  # tokens of the output

    def take(self, output: np.ndarray) -> None:
        """output: all tokens so far. Raises RuntimeError for one that is not allowed: a mask was not applied."""
        for token in output[self.taken :].tolist():
            if self.counts(token):
                self.matcher.consume_token(token)
        if self.matcher.is_error():
            raise RuntimeError(f"structured_outputs: {_first_line(self.matcher.get_error())}")

    def counts(self, token: int) -> bool:
        """Whether the matcher must take the next token, which is no thought."""
        self.taken += 1
        return self._thought is None or not self._thought.take(token)

    @property
    def is_free(self) -> bool:
        """Whether the next token may be any: a thought goes on."""
        return self._thought is not None and self._thought.goes_on

    @property
    def may_begin(self) -> Sequence[int]:
        """Tokens that begin a thought, where one may begin now."""
        return () if self._thought is None else self._thought.may_begin

    @property
    def is_complete(self) -> bool:
        """Whether nothing can be added to the text."""
        return not self.is_free and self.matcher.is_stopped()


def check_form(params: StructuredOutputsParams) -> None:
    """Raises ValueError, one line, for what no tokenizer makes right: known before a model is loaded."""
    if wrong := _matchers().validate_grammar(_grammar(params)):
        raise ValueError(_cannot(params, wrong))


class Grammars:
    """Compiles what requests ask for, each text once.

    tokenizer   None: there is no text to constrain
    vocab_size  of the model, whatever the tokenizer has
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, end_tokens: Collection[int]):
        self._tokenizer, self._vocab_size, self._end_tokens = tokenizer, vocab_size, end_tokens
        self.reasoning: Reasoning | None = None  # what keeps a thought apart from the text
        self._compiled: OrderedDict[str, Any] = OrderedDict()  # matchers, or what is wrong
        self._lock = threading.Lock()
        self.threads = (os.cpu_count() or 1) * 3 // 4  # the others are the program's, and those of XLA

    def constraint(
        self, params: StructuredOutputsParams, prompt: Sequence[int] = (), stop_tokens: Collection[int] = ()
    ) -> Constraint:
        """For a request. Raises ValueError, one line, for what cannot be compiled."""
        matcher, thought = self._matcher(params), None
        if self.reasoning is not None and self._tokenizer is not None:
            try:
                thought = self.reasoning.thought(self._tokenizer, prompt)
            except ValueError as error:
                raise ValueError(f"structured_outputs: {error}") from None
        return Constraint(matcher.deep_copy(), [t for t in stop_tokens if t < self._vocab_size], thought)

    def advance(self, constraints: Sequence[Constraint], tokens: Sequence[int]) -> None:
        """Each takes a token, all at once. What goes wrong is told by each one's `take`."""
        some = [(c.matcher, t) for c, t in zip(constraints, tokens, strict=True) if c.counts(t)]
        if not self._shared(len(some)):
            for matcher, token in some:
                matcher.consume_token(token)
        else:
            self._executor.consume_token_par(some)

    def masks(self, constraints: Sequence[Constraint]) -> np.ndarray:
        """Of each the tokens that may come next, [n, bytes] uint8: bit i of byte j for token 8 j + i. What goes wrong
        is told by each one's `take`."""
        words = np.zeros((len(constraints), -(-(self._vocab_size + 1) // 32)), np.int32)
        at, size = words.ctypes.data, words.strides[0]
        if not self._shared(len(constraints)):
            for number, constraint in enumerate(constraints):
                constraint.matcher.unsafe_compute_mask_ptr(at + number * size, size)
        else:
            matchers = [(c.matcher, number) for number, c in enumerate(constraints)]
            self._executor.unsafe_compute_mask_ptr(matchers, at, size, len(constraints))
        found = words.view(np.uint8)
        place, bit = divmod(self._vocab_size, 8)  # of the token that stands for all ends
        ends = np.flatnonzero(found[:, place] >> bit & 1)
        found[:, place] &= ~np.uint8(1 << bit)
        for row in ends.tolist():
            _allow(found[row], constraints[row].stop_tokens)
        for row, constraint in enumerate(constraints):
            _allow(found[row], constraint.may_begin)
        return found

    def _shared(self, count: int) -> bool:
        return count >= PARALLEL and self.threads > 1

    def _matcher(self, params: StructuredOutputsParams) -> Any:
        key = repr(params)
        with self._lock:  # also of several threads that ask for the same
            found = self._compiled.pop(key, None)
            if found is None:
                found = self._compile(params)
                while len(self._compiled) >= MOST_GRAMMARS:
                    self._compiled.popitem(last=False)
            self._compiled[key] = found
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _compile(self, params: StructuredOutputsParams) -> Any:
        """A matcher that has taken nothing, or what is wrong."""
        if self._tokenizer is None:
            return "structured_outputs: it needs a tokenizer"
        matchers, matcher = _matchers(), None
        try:
            matcher = matchers(self._vocabulary, _grammar(params), log_level=0)
            wrong = matcher.get_error() if matcher.is_error() else ""
        except ValueError as error:
            wrong = str(error)
        return _cannot(params, wrong) if wrong else matcher

    @cached_property
    def _vocabulary(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        assert self._tokenizer is not None
        return LLTokenizer(TokenizerWrapper(_Words(self._tokenizer, self._vocab_size, self._end_tokens)))

    @cached_property
    def _executor(self) -> Any:
        from llguidance import LLExecutor

        return LLExecutor(self.threads)


def _matchers() -> Any:
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise ValueError(MISSING) from None
    return LLMatcher


def _cannot(params: StructuredOutputsParams, wrong: str) -> str:
    kind, given = _kind(params)
    return f"structured_outputs: {kind}: {one_line(repr(given), 120)} cannot be compiled: {_first_line(wrong)}"


class _Words:
    """A tokenizer as llguidance wants it: ids 0 to vocab_size - 1 of the model, and one more that stands for the end of
    a text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_tokens: Collection[int]):
        special = {i for i in {*tokenizer.special_ids, *end_tokens} if i < vocab_size}
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)] + [b"<end>"]
        self.special_token_ids = [*sorted(special), vocab_size]
        self.eos_token_id, self.bos_token_id = vocab_size, None
        self._tokenizer = tokenizer
        self._id_of = {data: i for i, data in enumerate(self.tokens[:-1]) if data and i not in special}
        self._longest = max(map(len, self._id_of), default=1)

    def __call__(self, text: bytes | str) -> list[int]:
        """How the model would write a text that is certain: as the tokenizer does, where it adds nothing of its own
        (a space at the beginning), else by the longest tokens."""
        data = text.encode() if isinstance(text, str) else text
        try:
            found = self._tokenizer.encode(data.decode(), False)
            if b"".join(map(self._tokenizer.token_bytes, found)) == data:
                return found
        except ValueError:  # not whole characters
            pass
        found, at = [], 0
        while at < len(data):
            ends = range(min(len(data), at + self._longest), at, -1)
            end = next((end for end in ends if data[at:end] in self._id_of), None)
            if end is None:
                break  # there is no token for it
            found.append(self._id_of[data[at:end]])
            at = end
        return found


def _allow(mask: np.ndarray, tokens: Sequence[int]) -> None:
    for token in tokens:
        mask[token >> 3] |= np.uint8(1 << (token & 7))


def _kind(params: StructuredOutputsParams) -> tuple[str, Any]:
    if params.json_object:
        return "json_object", True
    return next(
        (name, v) for name in ("json", "regex", "choice", "grammar") if (v := getattr(params, name)) is not None
    )


def _grammar(params: StructuredOutputsParams) -> str:
    """In llguidance's own form. Raises ValueError."""
    from llguidance import LLMatcher, grammar_from

    kind, given = _kind(params)
    if kind not in ("json", "json_object"):
        return grammar_from(kind, given)  # type: ignore[arg-type]
    schema = params.schema()
    if params.disable_additional_properties:
        schema = _closed(schema)
    options: dict[str, Any] = {"whitespace_flexible": not params.disable_any_whitespace, "lenient": False}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)  # type: ignore[arg-type]


def _closed(schema: Any) -> Any:
    """The schema, with no other properties in objects whose properties it names."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed = {name: _closed(part) for name, part in schema.items()}
    if ("properties" in schema or "patternProperties" in schema) and "additionalProperties" not in schema:
        closed["additionalProperties"] = False
    return closed


def _first_line(text: str) -> str:
    """Of llguidance's messages, which go on with the state of the parser."""
    return one_line(" ".join(text.partition("<state>")[0].split()), 300)
