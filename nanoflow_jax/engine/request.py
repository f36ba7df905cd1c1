"""A request on its way through the engine, and what comes out of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from nanoflow_jax.engine.pages import Key
from nanoflow_jax.engine.reasoning import Marks
from nanoflow_jax.engine.structured import Constraint
from nanoflow_jax.sampling_params import SamplingParams

if TYPE_CHECKING:  # without JAX: see `feed`
    from nanoflow_jax.step.logprobs import TokenLogprobs


@dataclass
class RequestMetrics:
    """Times in seconds of `time.monotonic`; None where not reached."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0  # of the prompt, not computed because their pages were there (first admission)


@dataclass(frozen=True)
class Logprob:
    """Natural logarithm of a token's probability by the raw logits. `rank`: 1 is the likeliest.

    decoded_token  the token's bytes as text, with U+FFFD where they are no whole character
    token_bytes    what the token adds to a text's UTF-8
    """

    logprob: float
    rank: int
    decoded_token: str | None = None
    token_bytes: bytes = b""


@dataclass
class CompletionOutput:
    """One generated sequence. `finish_reason`: "stop" (an end token or a stop string), "length", "abort", "error", or
    None while it is running.

    text               all of it
    reasoning_content  what of it is the model's thought; None: it has none, or the model names no tags for it
    content            what of it is the answer; None: the thought has not ended
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop token or string given by the request, when one ended it
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # per token: it and the likeliest ones
    text_offsets: list[int] | None = None  # with logprobs, per token: where in `text` it begins
    error: str | None = None  # one line, when finish_reason is "error"
    reasoning_content: str | None = None
    content: str | None = None


@dataclass
class RequestOutput:
    """The result of one request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # per token; None for the first, which none precedes

    @property
    def finished(self) -> bool:
        return all(o.finish_reason for o in self.outputs)


@dataclass
class LogprobRows:
    """Logprobs of consecutive tokens, as the device gives them: arrays per step, joined when they are read."""

    parts: list[TokenLogprobs] = field(default_factory=list)
    count: int = 0

    def add(self, source: TokenLogprobs, start: int, stop: int, top: int) -> None:
        """Rows [start, stop) of what a step gave, with so many of the likeliest tokens."""
        rows = slice(start, stop)
        part = replace(
            source,
            logprob=np.asarray(source.logprob)[rows],
            rank=np.asarray(source.rank)[rows],
            top_tokens=np.asarray(source.top_tokens)[rows, :top],
            top_logprobs=np.asarray(source.top_logprobs)[rows, :top],
        )
        self.parts.append(part)
        self.count += stop - start

    def between(self, first: int, last: int) -> LogprobRows:
        """Of some of the tokens, where each was added by itself, as generated ones are."""
        return LogprobRows(self.parts[first:last], last - first)


@dataclass(eq=False)
class Request:
    """Host state of a request. While it runs, its slot holds its tokens and its progress (`engine.slot_table`)."""

    number: int  # order of arrival; the smaller, the earlier served and the later preempted
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_tokens: frozenset[int]
    max_length: int  # tokens of prompt and output together, at most
    index: int = 0  # among the completions of one prompt
    watched: bool = False  # someone looks at its tokens one by one (a stream)
    scored_from: int = 0  # with prompt_logprobs: the prompt's tokens after this position are wanted
    constraint: Constraint | None = None  # of structured_outputs
    tokens: np.ndarray = field(init=False)  # [n] int32: prompt and output, as of when it last had no slot
    keys: list[Key] = field(default_factory=list)  # of its full pages, as far as they were computed
    slot: int | None = None
    shared: bool = False  # some of its pages were filled by another
    alone: bool = False  # they shall not be
    pending: bool = False  # preempted while a token of it was in flight
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    text: str | None = None  # as far as it was needed while running (stop strings, streams)
    marks: Marks | None = None  # where tags of thoughts are in the text, where an output has been asked for
    logprobs: LogprobRows = field(default_factory=LogprobRows)
    prompt_logprobs: LogprobRows = field(default_factory=LogprobRows)
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(time.monotonic()))

    def __post_init__(self) -> None:
        self.tokens = np.array(self.prompt_token_ids, np.int32)

    @property
    def prompt_length(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        """Of a request that has no slot."""
        return len(self.tokens) - self.prompt_length

    @property
    def output_token_ids(self) -> list[int]:
        """Of a request that has no slot."""
        return self.tokens[self.prompt_length :].tolist()

    @property
    def next_score(self) -> int | None:
        """Position of the prompt whose next token's logprob is wanted next; None when none is."""
        if self.params.prompt_logprobs is None:
            return None
        position = self.scored_from + self.prompt_logprobs.count
        return position if position < self.prompt_length - 1 else None

    def finish(self, reason: str, stop: int | str | None = None, error: str | None = None) -> None:
        self.finish_reason, self.stop_reason, self.error = reason, stop, error
        self.metrics.finished_time = time.monotonic()


def error_line(error: BaseException) -> str:
    """What is told of an error that ended a request: its type, and the first line of its message."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])
