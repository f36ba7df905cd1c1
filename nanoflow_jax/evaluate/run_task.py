"""A task's questions through an LLM into a journal: one record per question, durable and resumable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from nanoflow_jax.chat import PLAIN, ChatSettings
from nanoflow_jax.engine.feed import Score, Work
from nanoflow_jax.engine.request import RequestOutput
from nanoflow_jax.evaluate.batch import progress_of, work_steps
from nanoflow_jax.evaluate.journal import Journal
from nanoflow_jax.evaluate.metrics import CHOICE_METRICS, score_outputs
from nanoflow_jax.evaluate.prompts import Sample, sample_record
from nanoflow_jax.evaluate.response import encode_record
from nanoflow_jax.evaluate.tasks import Task
from nanoflow_jax.evaluate.windows import longest_first

if TYPE_CHECKING:
    from nanoflow_jax.api import LLM


@dataclass(frozen=True)
class _Key:
    sample: Sample
    choice: int = 0


def run_task(
    llm: LLM,
    task: Task,
    asked: Sequence[Sample],
    journal: Journal,
    progress: bool = True,
    now: datetime | None = None,
    chat: ChatSettings = PLAIN,
) -> None:
    """Asks what has no record in the journal yet, which is complete and durable when this returns. A question that
    cannot be served, or that the engine fails on, scores 0 and keeps its error. `now`: the time for chat templates that
    write it; `chat`: how chats are rendered."""
    left = [sample for sample in asked if sample.number not in journal.done]
    scores: dict[int, list[Score | None]] = {}

    def emit(sample: Sample, fields: dict[str, Any], values: dict[str, float], error: str | None = None) -> None:
        journal.write(encode_record(sample_record(sample, fields, values, error)))

    def work() -> Iterator[Work | None]:
        for sample in left:
            try:
                items = _prepare(llm, task, sample, now, chat)
            except ValueError as error:
                emit(sample, {}, dict.fromkeys(task.metrics, 0.0), " ".join(str(error).split()))
                yield None
                continue
            yield from items

    with progress_of(llm, journal, len(asked), task.name, "questions", progress) as show:
        for item, output in llm.run_stream(longest_first(work(), work_steps(llm)), show):
            sample, choice = item.key.sample, item.key.choice
            if isinstance(output, RequestOutput):
                emit(sample, *judge_text(task, sample, output))
                continue
            assert sample.choices is not None
            of_sample = scores.setdefault(sample.number, [None] * len(sample.choices))
            of_sample[choice] = output
            known = [s for s in of_sample if s is not None]
            if len(known) == len(of_sample):
                del scores[sample.number]
                emit(sample, *judge_choices(task, sample, known))
        journal.finish()


def _prepare(llm: LLM, task: Task, sample: Sample, now: datetime | None, chat: ChatSettings) -> list[Work]:
    if sample.choices is not None:
        continuations = [task.delimiter + choice for choice in sample.choices]
        return [llm.prepare_score(sample.prompt, c, _Key(sample, i)) for i, c in enumerate(continuations)]
    params = llm.default_sampling_params(**{"max_tokens": 64, "seed": sample.number, **task.sampling()})
    if sample.messages is not None:
        return [llm.prepare_chat(sample.messages, params, _Key(sample), now, chat)]
    return [llm.prepare(sample.prompt, params, _Key(sample))]


Judged = tuple[dict[str, Any], dict[str, float], str | None]  # fields of the record, scores, error


def judge_text(task: Task, sample: Sample, output: RequestOutput) -> Judged:
    """By the best of the targets: the answer alone, without the thought before it. An output whose thought did not end,
    or without the answer that `extract` looks for, is wrong. Of several outputs each field is a list."""
    if failed := [o.error for o in output.outputs if o.finish_reason == "error"]:
        return {}, dict.fromkeys(task.metrics, 0.0), failed[0] or "failed"
    contents = [o.content for o in output.outputs]
    thoughts = [o.reasoning_content for o in output.outputs]
    fields = {"reasoning_content": thoughts} if any(t is not None for t in thoughts) else {}
    fields |= {"output": contents}
    wrong = None
    try:
        extract = task.extract
        fields["answer"] = [text if text is None or extract is None else extract(text) for text in contents]
    except ValueError as error:
        wrong = f"extract.regex: {error}"
    answers = fields.get("answer", [None] * len(contents))
    fields["finish_reason"] = [o.finish_reason for o in output.outputs]
    if len(contents) == 1:
        fields = {name: values[0] for name, values in fields.items()}
    return fields, score_outputs(task.metrics, answers, sample.targets), wrong


def judge_choices(task: Task, sample: Sample, scores: Sequence[Score]) -> Judged:
    """By the log-probabilities of the choices as continuations of the prompt."""
    assert sample.choices is not None
    if failed := [s.error for s in scores if s.error is not None]:
        return {"choices": list(sample.choices)}, dict.fromkeys(task.metrics, 0.0), failed[0]
    logprobs, right = [s.logprob for s in scores], sample.choices.index(sample.targets[0])
    fields = {
        "choices": list(sample.choices),
        "logprobs": logprobs,
        "is_greedy": [s.is_greedy for s in scores],
        "num_tokens": [s.num_tokens for s in scores],
    }
    return fields, {m: CHOICE_METRICS[m](logprobs, sample.choices, right) for m in task.metrics}, None
