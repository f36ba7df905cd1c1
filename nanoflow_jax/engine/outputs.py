"""From requests to what users get."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing

from nanoflow_jax.engine.calls import Calls
from nanoflow_jax.engine.feed import Score, Work, feed, score_of
from nanoflow_jax.engine.reasoning import Marks, Reasoning
from nanoflow_jax.engine.request import CompletionOutput, Logprob, LogprobRows, Request, RequestOutput
from nanoflow_jax.engine.slot_table import SlotTable
from nanoflow_jax.engine.text import output_text, text_offsets
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
    first = requests[0]
    completions = [_completion(r, tokenizer, reasoning, running) for r in requests]
    prompt_logprobs = None
    if first.params.prompt_logprobs is not None and first.index == 0:
        prompt_logprobs = [None, *logprob_dicts(first.prompt_logprobs, first.prompt_token_ids[1:], tokenizer)]
    return RequestOutput(
        first.request_id, first.prompt, first.prompt_token_ids, completions, first.metrics, prompt_logprobs
    )


class Gathered:
    """Outputs of prompts whose completions end one by one. What stays of a completion is what the user gets of it: the
    request, with a copy of the prompt's tokens, is let go of."""

    def __init__(self, tokenizer: Tokenizer, reasoning: Reasoning | None):
        self._tokenizer, self._reasoning = tokenizer, reasoning
        self._open: dict[Work, tuple[RequestOutput, set[int]]] = {}  # and the indices that have not ended

    def take(self, work: Work, request: Request, running: SlotTable | None = None) -> RequestOutput:
        """All that is known of the prompt, with what `request` now has; `running` as in `request_output`."""
        found = request_output([request], self._tokenizer, self._reasoning, running)
        output, left = self._open.get(work, (found, set(range(work.completions))))
        if work not in self._open:
            found.outputs = [*(CompletionOutput(i, "", [], content="") for i in range(request.index)), *found.outputs]
            found.outputs += [CompletionOutput(i, "", [], content="") for i in range(request.index + 1, len(left))]
            self._open[work] = output, left
        elif request.index == 0:  # the prompt's logprobs and times are those of the first completion
            output.request_id, output.metrics, output.prompt_logprobs = (
                found.request_id, found.metrics, found.prompt_logprobs,
            )  # fmt: skip
            output.outputs[0] = found.outputs[0]
        else:
            output.outputs[request.index] = found.outputs[0]
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
    output.content = ""
    if params.detokenize:
        output.content = output.text = _text(request, ids, tokenizer)
        if reasoning is not None:
            skip = params.skip_special_tokens
            marks = request.marks = request.marks or Marks(tokenizer, request.prompt_token_ids, skip, reasoning.marks)
            output.reasoning_content, output.content = reasoning.split(
                tokenizer, request.prompt_token_ids, marks.take(ids), output.text, bool(request.finish_reason)
            )
    if params.logprobs is not None:
        output.logprobs = logprob_dicts(request.logprobs, ids, tokenizer)
        output.cumulative_logprob = sum(step[token].logprob for step, token in zip(output.logprobs, ids, strict=True))
        if params.detokenize:
            offsets = text_offsets(tokenizer, request.prompt_token_ids, ids, params.skip_special_tokens)
            output.text_offsets = [min(at, len(output.text)) for at in offsets]  # of a stop string there is no text
    return output


def _text(request: Request, ids: list[int], tokenizer: Tokenizer) -> str:
    """The text up to the stop string, or without the stop token (a structured output may be complete without one); as
    far as it is whole, while it is running."""
    if request.text is not None and (isinstance(request.stop_reason, str) or not request.finish_reason):
        return request.text
    if request.finish_reason == "stop" and ids[-1] in request.stop_tokens:
        ids = ids[:-1]
    return output_text(tokenizer, request.prompt_token_ids, ids, request.params.skip_special_tokens)


def logprob_dicts(rows: LogprobRows, tokens: Sequence[int], tokenizer: Tokenizer) -> list[dict[int, Logprob]]:
    """For each token: itself and the likeliest ones, in order of likelihood after itself."""
    found: list[dict[int, Logprob]] = []
    for logprobs, ranks, top_tokens, top_logprobs in zip(
        rows.logprobs, rows.ranks, rows.top_tokens, rows.top_logprobs, strict=True
    ):
        for i in range(len(logprobs)):
            token = int(tokens[len(found)])
            entry = {token: _logprob(float(logprobs[i]), int(ranks[i]), token, tokenizer)}
            for rank, (other, logprob) in enumerate(zip(top_tokens[i].tolist(), top_logprobs[i].tolist(), strict=True)):
                if other not in entry:
                    entry[other] = _logprob(logprob, rank + 1, other, tokenizer)
            found.append(entry)
    return found


def _logprob(logprob: float, rank: int, token: int, tokenizer: Tokenizer) -> Logprob:
    data = tokenizer.token_bytes(token)
    return Logprob(logprob, rank, data.decode("utf-8", "replace"), data)
