"""From a task's documents to what the model is asked."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nanoflow_jax.config import ConfigError
from nanoflow_jax.evaluate.tasks import Document, Task
from nanoflow_jax.system import limited
from nanoflow_jax.system.reading import Malformed, parse_json


@dataclass(frozen=True)
class Sample:
    """One question. `number`: from 0, its place among the documents; `id`: the document's own ("id"), else the number.

    prompt    the text the model continues, examples included; for a chat, that of the user's last message
    messages  of a chat; else None
    targets   texts that are right; for choices, exactly one of them
    choices   texts to choose from; None: text is generated
    """

    number: int
    id: str
    prompt: str
    messages: list[dict[str, str]] | None
    targets: tuple[str, ...]
    choices: tuple[str, ...] | None


def samples(task: Task, limit: int | None = None) -> list[Sample]:
    """The questions of a task, the first `limit` of them; the same each time. Raises ConfigError naming the document
    that does not fit the task, or when there are none."""
    count = limit if task.data.count is None or limit is None else min(limit, task.data.count)
    documents: list[Document] = []
    for document in task.data.documents():
        if count is not None and len(documents) >= count:
            break
        documents.append(document)
    if not documents:
        raise ConfigError(f"{task.name}: it has no documents")
    shots = task.fewshot
    pool = list(task.data.documents() if shots.data is None else shots.data.documents()) if shots.count else []
    own = shots.data is None  # the pool begins with the documents themselves
    if shots.count and shots.count > len(pool) - own:
        raise ConfigError(f"{task.name}: fewshot.count: {shots.count}; there are {len(pool) - own} other documents")
    found = []
    for number, document in enumerate(documents):
        others = [p for i, p in enumerate(pool) if not (own and i == number)] if shots.count else []
        rng = random.Random(f"{shots.seed}/{number}")
        examples = rng.sample(others, shots.count)
        found.append(_sample(task, number, document, examples))
    ids = [sample.id for sample in found]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ConfigError(f"{task.name}: two documents have the id {twice!r}")
    return found


def _sample(task: Task, number: int, document: Document, examples: list[Document]) -> Sample:
    def render(template: str, of: Document = document) -> str:
        try:
            return limited.ask("render", template=template, fields=of)
        except limited.LimitedError as error:
            raise ConfigError(f"{task.name}: document {number}: {template!r} cannot be rendered: {error}") from None

    def answer(of: Document) -> str:
        template = task.target if isinstance(task.target, str) else task.target[0]
        return render(template, of)

    question = render(task.prompt)
    targets = tuple(render(t) for t in ((task.target,) if isinstance(task.target, str) else task.target))
    choices: tuple[str, ...] | None = None
    if isinstance(task.choices, str):
        value = document.get(task.choices)
        if not isinstance(value, list) or not value or not all(isinstance(c, str) for c in value):
            raise ConfigError(f"{task.name}: document {number}: {task.choices!r} must be a list of texts")
        choices = tuple(value)
    elif task.choices is not None:
        choices = tuple(render(c) for c in task.choices)
    if choices is not None:
        if len(targets) != 1 or choices.count(targets[0]) != 1:
            raise ConfigError(f"{task.name}: document {number}: target {targets!r} is not exactly one of {choices!r}")
        if not all(task.delimiter + c for c in choices):
            raise ConfigError(f"{task.name}: document {number}: a choice is empty")
    messages = None
    if task.chat:
        messages = [
            {"role": role, "content": text}
            for e in examples
            for role, text in (("user", render(task.prompt, e)), ("assistant", answer(e)))
        ]
        messages.append({"role": "user", "content": question})
    else:
        shown = [render(task.prompt, e) + task.delimiter + answer(e) for e in examples]
        question = task.fewshot.separator.join([*shown, question])
    name = document.get("id", number)
    if not isinstance(name, str | int):
        raise ConfigError(f"{task.name}: document {number}: id {name!r} is not a text or a number")
    return Sample(number, str(name), question, messages, targets, choices)


def sample_record(
    sample: Sample, fields: dict[str, Any], scores: dict[str, float], error: str | None
) -> dict[str, Any]:
    """A line of the per-sample log."""
    asked = {"prompt": sample.prompt} if sample.messages is None else {"messages": sample.messages}
    target = sample.targets[0] if len(sample.targets) == 1 else list(sample.targets)
    told = None if error is None else {"message": error}
    return {
        "id": f"sample_{sample.number}", "error": told, "sample": sample.id, **asked, "target": target, **fields,
        "scores": scores,
    }  # fmt: skip


class Questions:
    """The questions of a task, to which the results of a changed run are given: by id and by what is asked."""

    def __init__(self, asked: Sequence[Sample]):
        self._by_id = {sample.id: sample for sample in asked}

    def number(self, record: dict[str, Any]) -> int | None:
        sample = self._by_id.get(record["sample"])
        if sample is None:
            return None
        wanted = sample_record(sample, {}, {}, None)
        same = all(record.get(name) == wanted.get(name) for name in ("prompt", "messages", "target"))
        choices = None if sample.choices is None else list(sample.choices)
        return sample.number if same and record.get("choices") == choices else None

    def is_known(self, record: dict[str, Any]) -> bool:
        return record["sample"] in self._by_id

    def renumbered(self, record: dict[str, Any], number: int) -> dict[str, Any]:
        record["id"] = f"sample_{number}"
        return record


def read_samples(path: Any) -> Iterator[dict[str, Any]]:
    """The records of a per-sample log, in the order of the file. Raises ConfigError for a damaged one."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = parse_json(line.decode("utf-8"))
            except (Malformed, UnicodeDecodeError):
                record = {}
            if not _is_record(record):
                raise ConfigError(f"{path}: line {number} is damaged")
            yield record


def _is_record(record: Any) -> bool:
    """Whether it has what a report is made of."""
    if not isinstance(record, dict) or not re.fullmatch(r"sample_\d{1,15}", str(record.get("id"))):
        return False
    scores, error = record.get("scores"), record.get("error", False)
    return (
        isinstance(record.get("sample"), str)
        and "target" in record
        and (error is None or (isinstance(error, dict) and isinstance(error.get("message"), str)))
        and isinstance(scores, dict)
        and all(type(score) in (int, float) and 0 <= score <= 1 for score in scores.values())
    )
