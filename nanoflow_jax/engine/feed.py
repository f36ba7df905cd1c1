"""Feeds an engine from an iterator, so that it stays full however long the input is, and hands on what has ended."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

from nanoflow_jax.engine.calls import Call, Calls
from nanoflow_jax.engine.request import Request
from nanoflow_jax.sampling_params import SamplingParams


@dataclass(frozen=True, eq=False)
class Work:
    """One prompt, checked and ready for the engine (`LLM.prepare`).

    key          whatever the caller needs to know it again
    scored_from  not None: nothing is generated; the logprobs of the prompt's tokens after this position are wanted
    prompt_only  nothing is generated; of the prompt the params may want logprobs
    """

    key: Any
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    scored_from: int | None = None
    prompt_only: bool = False

    @property
    def most_tokens(self) -> int | None:
        """Of output; None: up to the model's length."""
        return 0 if self.scored_from is not None or self.prompt_only else self.params.max_tokens


@dataclass(frozen=True)
class Score:
    """Of a continuation: its log-probability (sum over `num_tokens` tokens, natural logarithm), and whether greedy
    decoding would give it. error: one line, where the request failed; the figures then mean nothing."""

    logprob: float
    is_greedy: bool
    num_tokens: int
    error: str | None = None


def score_of(request: Request) -> Score:
    """The score of a request that only wanted its prompt computed."""
    rows = request.prompt_logprobs
    if request.finish_reason == "error":
        return Score(float("nan"), False, rows.count, request.error or "failed")
    total = sum(float(part.astype("float64").sum()) for part in rows.logprobs)
    return Score(total, all(bool((part == 1).all()) for part in rows.ranks), rows.count)


def feed(
    calls: Calls, work: Iterable[Work | None], check_interrupt: Callable[[], None] = lambda: None
) -> Generator[tuple[Work, list[Request]]]:
    """Runs `work` to its end; yields each with its completions, in the order in which they end.

    The iterator is asked between two steps, for as much as admission may take in the next ones: what it does there
    (reading, tokenizing) costs time only where it takes longer than a step. None means "nothing this time, ask
    again".
    """
    scheduler = calls.engine.scheduler
    ahead = 2 * max(shape.prefill_segments for shape in scheduler.shapes)
    capacity = calls.engine.running.count + ahead  # also where failed requests wait apart from the queue
    source, more = iter(work), True
    group_of: dict[Request, tuple[Work, list[Request]]] = {}
    call = Call(calls)
    try:
        while more or group_of:
            new: list[Work] = []
            room = min(ahead - len(scheduler.waiting), capacity - len(group_of))
            for _ in range(4 * ahead):
                if not more or room <= 0:
                    break
                try:
                    item = next(source)
                except StopIteration:
                    more = False
                    break
                if item is not None:
                    new.append(item)
                    room -= 1 if item.scored_from is not None else item.params.n
            if new:
                with calls.alone():
                    for item in new:
                        group = add_work(call, item)
                        group_of |= dict.fromkeys(group, (item, group))
            check_interrupt()
            call.step()
            while call.ended:
                item, group = group_of.pop(call.ended.popleft())
                if not any(r in group_of for r in group):
                    yield item, group
    finally:
        call.close()


def add_work(call: Call, work: Work) -> list[Request]:
    """Queues its completions. To be called within `Calls.alone`."""
    text, tokens, params = work.prompt, work.prompt_token_ids, work.params
    if work.scored_from is not None:
        return [call.add(text, tokens, params, max_tokens=0, scored_from=work.scored_from)]
    most = 0 if work.prompt_only else None
    return [call.add(text, tokens, params, index=i, max_tokens=most) for i in range(params.n)]
