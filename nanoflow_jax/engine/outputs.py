"""From requests to what users get."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing

from nanoflow_jax.engine.calls import Calls
from nanoflow_jax.engine.feed import Score, Work, feed, score_of
from nanoflow_jax.engine.reasoning import Marks, Reasoning
from nanoflow_jax.engine.request import CompletionOutput, Logprob, LogprobRows, Request, RequestOutput
from nanoflow_jax.engine.slot_table import SlotTable
from nanoflow_jax.engine.text import GrowingText, output_text, text_offsets
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.tokenizer import Tokenizer


def request_output(
    requests: Sequence[Request],
    tokenizer: Tokenizer,
    reasoning: Reasoning | None = None,
    running: SlotTable | None = None,
) -> RequestOutput:
    """The result of one prompt: `requests` are its completions, in order.

    reasoning  what keeps a thought apart from the answer
    running    where requests that are not done yet have their tokens; None: all are done
    """
    output = prompt_output(requests[0], tokenizer)
    output.outputs = [_completion(r, tokenizer, reasoning, running) for r in requests]
    return output


def prompt_output(request: Request, tokenizer: Tokenizer) -> RequestOutput:
    """What is known of the prompt alone; its logprobs, of the first completion, when that has got a token, or has
    ended."""
    ids, logprobs = request.prompt_token_ids, None
    if request.params.prompt_logprobs is not None and request.index == 0:
        logprobs = [None, *logprob_dicts(request.prompt_logprobs, ids[1:], tokenizer)]
    return RequestOutput(request.request_id, request.prompt, ids, [], request.metrics, logprobs)


class Gathered:
    """Outputs of prompts whose completions end one by one. What stays of a completion is what the user gets of it: the
    request, with a copy of the prompt's tokens, is let go of."""

    def __init__(self, tokenizer: Tokenizer, reasoning: Reasoning | None):
        self._tokenizer, self._reasoning = tokenizer, reasoning
        self._open: dict[Work, tuple[RequestOutput, set[int]]] = {}  # and the indices that have not ended

    def take(self, work: Work, request: Request, running: SlotTable | None = None) -> RequestOutput:
        """All that is known of the prompt, with what `request` now has; `running` as in `request_output`."""
        found = request_output([request], self._tokenizer, self._reasoning, running)
        (completion,) = found.outputs
        output, left = self._open.setdefault(work, (found, set(range(work.completions))))
        if output is found:
            output.outputs = [CompletionOutput(i, "", [], content="") for i in range(work.completions)]
        elif request.index == 0:  # the prompt's logprobs and times are those of the first completion
            output.request_id, output.metrics, output.prompt_logprobs = (
                found.request_id, found.metrics, found.prompt_logprobs,
            )  # fmt: skip
        output.outputs[request.index] = completion
        if request.finish_reason:
            left.discard(request.index)
            if not left:
                del self._open[work]
        return output

    def is_open(self, work: Work) -> bool:
        """Whether some of its completions have not ended."""
        return work in self._open


def run_steps(
    calls: Calls, work: Iterable[Work | None], tokenizer: Tokenizer, reasoning: Reasoning | None
) -> Generator[list[tuple[Work, RequestOutput | Score]]]:
    """Runs prepared prompts; yields, after each step, those whose completions have all ended, often none."""
    gathered = Gathered(tokenizer, reasoning)
    with closing(feed(calls, work)) as steps:
        for ended, _ in steps:
            done: list[tuple[Work, RequestOutput | Score]] = []
            for item, request in ended:
                if item.scored_from is not None:
                    done.append((item, score_of(request)))
                    continue
                output = gathered.take(item, request)
                if not gathered.is_open(item):
                    done.append((item, output))
            yield done


def _completion(
    request: Request, tokenizer: Tokenizer, reasoning: Reasoning | None, running: SlotTable | None
) -> CompletionOutput:
    tokens = request.tokens
    if request.slot is not None and running is not None:
        tokens = running.tokens[request.slot, : running.known[request.slot]]
    ids = tokens[request.prompt_length :].tolist()
    params = request.params
    output = CompletionOutput(request.index, "", ids, request.finish_reason, request.stop_reason, error=request.error)
    if params.detokenize:
        output.text = _text(request, ids, tokenizer)
    _split(output, request, ids, tokenizer, reasoning)
    if params.logprobs is not None:
        output.logprobs = logprob_dicts(request.logprobs, ids, tokenizer)
        output.cumulative_logprob = sum(step[token].logprob for step, token in zip(output.logprobs, ids, strict=True))
        if params.detokenize:
            offsets = text_offsets(tokenizer, request.prompt_token_ids, ids, params.skip_special_tokens)
            output.text_offsets = [min(at, len(output.text)) for at in offsets]  # of a stop string there is no text
    return output


def _split(
    output: CompletionOutput, request: Request, ids: list[int], tokenizer: Tokenizer, reasoning: Reasoning | None
) -> None:
    """Thought and answer of an output whose text is that of `ids`."""
    output.content = output.text
    if reasoning is not None and request.params.detokenize:
        prompt, skip = request.prompt_token_ids, request.params.skip_special_tokens
        marks = request.marks = request.marks or Marks(tokenizer, prompt, skip, reasoning.marks)
        output.reasoning_content, output.content = reasoning.split(
            tokenizer, prompt, marks.take(ids), output.text, bool(output.finish_reason)
        )


class GrowingOutput:
    """A completion in parts, for a stream: each part holds what has come since the part before, so that the parts
    together are what `request_output` gives. A part costs what its tokens cost, however long the output is.

    The last characters are held back as long as they may belong to a stop string.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, reasoning: Reasoning | None = None):
        params = request.params
        self.request, self._tokenizer, self._reasoning = request, tokenizer, reasoning
        self._growing = GrowingText(tokenizer, request.prompt_token_ids, params.skip_special_tokens)
        self._ids: list[int] = []
        self._text = 0  # characters that have been given
        self._thought, self._answer = 0, 0

    @property
    def num_tokens(self) -> int:
        """Of the prompt, and those that were taken."""
        return self.request.prompt_length + len(self._ids)

    def take(self, token_ids: Sequence[int]) -> CompletionOutput:
        """The part of tokens that a running request has got."""
        request, params = self.request, self.request.params
        before, offsets = len(self._ids), list[int]()
        self._ids += token_ids
        if params.logprobs is None:
            self._growing.extend(token_ids)
        else:
            for token in token_ids:
                offsets.append(self._growing.length)
                self._growing.add(token)
        text = self._growing.text if params.detokenize else ""
        part = CompletionOutput(request.index, _without_stops(text, params), list(token_ids))
        _split(part, request, self._ids, self._tokenizer, self._reasoning)
        if params.logprobs is not None:
            rows = request.logprobs.between(before, len(self._ids))
            part.logprobs = logprob_dicts(rows, token_ids, self._tokenizer)
            part.text_offsets = offsets
        return self._cut(part)

    def finish(self) -> CompletionOutput:
        """The last part, of a request that has ended."""
        whole, before = _completion(self.request, self._tokenizer, self._reasoning, None), len(self._ids)
        whole.token_ids = whole.token_ids[before:]
        if whole.logprobs is not None:
            whole.logprobs = whole.logprobs[before:]
        if whole.text_offsets is not None:
            whole.text_offsets = whole.text_offsets[before:]
        return self._cut(whole)

    def _cut(self, part: CompletionOutput) -> CompletionOutput:
        """Without what of its texts was given before."""
        part.text, self._text = part.text[self._text :], max(self._text, len(part.text))
        if (thought := part.reasoning_content) is not None:
            part.reasoning_content, self._thought = thought[self._thought :], max(self._thought, len(thought))
        if (answer := part.content) is not None:
            part.content, self._answer = answer[self._answer :], max(self._answer, len(answer))
        return part


def _without_stops(text: str, params: SamplingParams) -> str:
    """A running output's text without its last characters, which a stop string may come to take away."""
    held = max((len(stop) - 1 for stop in params.stop_strings), default=0)
    return text[: max(0, len(text) - held)]


def _text(request: Request, ids: list[int], tokenizer: Tokenizer) -> str:
    """The text up to the stop string, or without the stop token (a structured output may be complete without one); as
    far as it is settled, while it is running."""
    if request.text is not None:
        if not request.finish_reason:
            return _without_stops(request.text, request.params)
        if isinstance(request.stop_reason, str):
            return request.text
    if request.finish_reason == "stop" and ids[-1] in request.stop_tokens:
        ids = ids[:-1]
    return output_text(tokenizer, request.prompt_token_ids, ids, request.params.skip_special_tokens)


def logprob_dicts(rows: LogprobRows, tokens: Sequence[int], tokenizer: Tokenizer) -> list[dict[int, Logprob]]:
    """For each token: itself and the likeliest ones, in order of likelihood after itself."""
    found: list[dict[int, Logprob]] = []
    for part in rows.parts:
        for logprob, rank, tops, of_tops in zip(
            part.logprob.tolist(), part.rank.tolist(), part.top_tokens.tolist(), part.top_logprobs.tolist(), strict=True
        ):
            token = int(tokens[len(found)])
            entry = {token: _logprob(logprob, rank, token, tokenizer)}
            for place, (other, its) in enumerate(zip(tops, of_tops, strict=True), start=1):
                if other not in entry:
                    entry[other] = _logprob(its, place, other, tokenizer)
            found.append(entry)
    return found


def _logprob(logprob: float, rank: int, token: int, tokenizer: Tokenizer) -> Logprob:
    data = tokenizer.token_bytes(token)
    return Logprob(logprob, rank, data.decode("utf-8", "replace"), data)
