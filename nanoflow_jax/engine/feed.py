"""Feeds an engine from an iterator, so that it stays full however long the input is, and hands on what has ended."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanoflow_jax.engine.request import Request
from nanoflow_jax.sampling_params import SamplingParams

if TYPE_CHECKING:  # prompts are made, and replicas' processes led, without JAX
    from nanoflow_jax.engine.calls import Call, Calls


@dataclass(frozen=True, eq=False)
class Work:
    """One prompt, checked and ready for the engine (`LLM.prepare`).

    key          whatever the caller needs to know it again
    scored_from  not None: nothing is generated; the logprobs of the prompt's tokens after this position are wanted
    prompt_only  nothing is generated; of the prompt the params may want logprobs
    watched      what its completions get is wanted as it comes
    """

    key: Any
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    scored_from: int | None = None
    prompt_only: bool = False
    watched: bool = False

    @property
    def most_tokens(self) -> int | None:
        """Of output; None: up to the model's length."""
        return 0 if self.scored_from is not None or self.prompt_only else self.params.max_tokens

    @property
    def completions(self) -> int:
        return 1 if self.scored_from is not None else self.params.n


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
    total = sum(float(part.logprob.astype("float64").sum()) for part in rows.parts)
    return Score(total, all(bool((part.rank == 1).all()) for part in rows.parts), rows.count)


def room_ahead(calls: Calls) -> int:
    """Requests that admission may take in the next steps: what waits beside the running ones."""
    return 2 * max(shape.prefill_segments for shape in calls.engine.scheduler.shapes)


Changed = list[tuple[Work, Request]]


def feed(
    calls: Calls, work: Iterable[Work | None], watched: bool = False, gone: set[Work] | None = None
) -> Generator[tuple[Changed, Changed]]:
    """Runs `work` to its end; yields, after each step, the completions that have ended, and of those that are `watched`
    those that have only grown, each with its work. (Another thread's step may have ended one of the latter since: that
    is told next.)

    The iterator is asked between two steps, for as much as admission may take in the next ones: what it does there
    (reading, tokenizing) costs time only where it takes longer than a step. None means "nothing this time, ask
    again". The completions of a prompt are requests from when there is room for them: there are never more of them
    than slots and what waits for the next steps, however large `n` is.

    watched  all of the work is, whatever it says itself
    gone     work that is not wanted any more is put there; it is ended, and taken out when nothing of it is left
    """
    from nanoflow_jax.engine.calls import Call

    scheduler, ahead = calls.engine.scheduler, room_ahead(calls)
    capacity = calls.engine.running.count + ahead  # also where failed requests wait apart from the queue
    source, more = _completions(work), True
    work_of: dict[Request, Work] = {}
    call = Call(calls)
    try:
        while more or work_of:
            new: list[tuple[Work, int]] = []
            room = min(ahead - len(scheduler.waiting), capacity - len(work_of))
            for _ in range(4 * ahead):
                if len(new) >= room:
                    break
                try:
                    one = next(source)
                except StopIteration:
                    more = False
                    break
                if one is not None:
                    new.append(one)
            if new:
                with calls.alone():
                    work_of |= {add_work(call, one, i, watched or one.watched): one for one, i in new}
            if gone:
                unwanted = set(gone)
                with calls.alone():
                    lost = [request for request in call.unfinished if work_of[request] in unwanted]
                    call.end(lost)
                gone -= unwanted - {work_of.pop(request) for request in lost}
            if not call.step() and room <= 0:
                calls.step()  # all the room is others', and perhaps nobody takes them on: a half-read stream
            ended: Changed = []
            grown: Changed = []
            while call.ended:
                request = call.ended.popleft()
                ended.append((work_of.pop(request), request))
            if call.grown:
                with calls.alone():
                    grown = [(work_of[request], request) for request in call.grown]
                    call.grown.clear()
            yield ended, grown
    finally:
        call.close()


def _completions(work: Iterable[Work | None]) -> Iterator[tuple[Work, int] | None]:
    for item in work:
        if item is None:
            yield None
        else:
            yield from ((item, index) for index in range(item.completions))


def add_work(call: Call, work: Work, index: int, watched: bool = False) -> Request:
    """Queues one of its completions. To be called within `Calls.alone`."""
    text, tokens, params = work.prompt, work.prompt_token_ids, work.params
    if work.scored_from is not None:
        return call.add(text, tokens, params, max_tokens=0, scored_from=work.scored_from)
    most = 0 if work.prompt_only else None
    return call.add(text, tokens, params, index=index, max_tokens=most, watched=watched)
