"""A request on its way through the engine, and what comes out of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from nanoflow_jax.engine.sampling_params import SamplingParams


@dataclass
class RequestMetrics:
    """Times in seconds of `time.monotonic`; None where not reached."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass
class CompletionOutput:
    """One generated sequence. `finish_reason`: "stop" (an end token), "length", or None while it is running."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | None = None  # the stop token given by the request, when one ended it
    cumulative_logprob: float | None = None
    logprobs: None = None


@dataclass
class RequestOutput:
    """The result of one request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: None = None


@dataclass(eq=False)
class Request:
    """Host state of a request. The pages hold the keys and values of tokens [0, num_computed)."""

    number: int  # order of arrival; the smaller, the earlier served and the later preempted
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_tokens: frozenset[int]
    max_length: int  # tokens of prompt and output together, at most
    tokens: list[int] = field(init=False)
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | None = None
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(time.monotonic()))

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[len(self.prompt_token_ids) :]

    @property
    def remaining(self) -> int:
        """Tokens that must still go through the model before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    def append(self, token: int) -> None:
        """Takes a sampled token and ends the request when the token, or the length, says so."""
        now = time.monotonic()
        self.metrics.first_token_time = self.metrics.first_token_time or now
        self.tokens.append(token)
        if token in self.stop_tokens:
            self.finish_reason = "stop"
            self.stop_reason = token if token in self.params.stop_token_ids else None
        elif len(self.tokens) >= self.max_length:
            self.finish_reason = "length"
        if self.finish_reason:
            self.metrics.finished_time = now

    def output(self, text: str) -> RequestOutput:
        completion = CompletionOutput(0, text, self.output_token_ids, self.finish_reason, self.stop_reason)
        return RequestOutput(self.request_id, self.prompt, self.prompt_token_ids, [completion], self.metrics)
