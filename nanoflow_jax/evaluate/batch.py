"""A batch file through an LLM: `answer` runs records of any source, `run_batch` a file into a journal."""

from __future__ import annotations

import json
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanoflow_jax.chat import PLAIN, ChatSettings
from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.feed import Work
from nanoflow_jax.engine.request import RequestOutput, error_line
from nanoflow_jax.evaluate.journal import Journal, record_number
from nanoflow_jax.evaluate.lines import FileIdentity, Line, NumberSet, TextSet, read_lines
from nanoflow_jax.evaluate.manifest import sync_folder
from nanoflow_jax.evaluate.records import COMPLETIONS, Problem, Record, parse_line, problem
from nanoflow_jax.evaluate.response import Json, encode_record, error_record, response_record
from nanoflow_jax.evaluate.windows import WINDOW, longest_first
from nanoflow_jax.system.output_files import create
from nanoflow_jax.system.progress import Progress

if TYPE_CHECKING:
    from nanoflow_jax.api import LLM

COMPLETION_TOKENS = 16  # max_tokens of a completion that names none, as in the OpenAI interface


@dataclass(frozen=True)
class Settings:
    """model     the served name: in responses, and what a body's `model` must be
    sampling  defaults of fields that a request leaves out, over the model's own (generation_config.json)
    seed      of requests that bring none, together with their line: the same whatever ran before
    now       the time for chat templates that write it; None: the clock's
    chat      tools and documents of chats that bring none"""

    model: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    window: int = WINDOW
    now: datetime | None = None
    chat: ChatSettings = PLAIN


def parse_lines(
    lines: Iterable[Line], models: Iterable[str], done: NumberSet | None = None
) -> Iterator[Record | Problem | None]:
    """Each line's record or problem; None for one that is done. A custom_id that came before is a problem, in a later
    run of the same file as in the first."""
    known, names = TextSet(), tuple(models)
    for line in lines:
        item = parse_line(line, names)
        if item.custom_id is not None and not known.add(item.custom_id):
            again = problem(line.number, item.custom_id, "custom_id: an earlier line has the same", "custom_id")
            item = replace(again, digest=f"{item.digest}-again")
        yield None if done is not None and line.number in done else item


class Requests:
    """The requests of a file, to which the results of a changed run are given: by custom_id and digest of the content,
    where there is no custom_id by the digest alone. About 300 bytes of memory per line."""

    def __init__(self, source: Path, models: Iterable[str], found: FileIdentity):
        self._numbers: dict[tuple[str | None, str], list[int]] = {}
        self._ids: set[str] = set()
        for item in parse_lines(read_lines(source, identity=found), models):
            assert item is not None
            self._numbers.setdefault((item.custom_id, item.digest), []).append(item.line)
            if item.custom_id is not None:
                self._ids.add(item.custom_id)

    def number(self, record: Json) -> int | None:
        found = self._numbers.get((record["custom_id"], record.get("request_digest", "")))
        return found.pop(0) if found else None

    def is_known(self, record: Json) -> bool:
        return record["custom_id"] in self._ids

    def renumbered(self, record: Json, number: int) -> Json:
        """With the ids and the line that a run of this input gives."""
        record["id"] = f"batch_req_{number}"
        if record["error"] is not None:
            record["error"]["line"] = number
        else:
            response = record["response"]
            response["request_id"] = f"req_{number}"
            response["body"]["id"] = f"{response['body']['id'].partition('-')[0]}-{number}"
        return record


def prepare(llm: LLM, record: Record, settings: Settings) -> Work | Problem:
    """A record's tokens and sampling params. Never raises for what a record holds."""
    wanted = {**settings.sampling, **record.sampling}
    wanted.setdefault("max_tokens", COMPLETION_TOKENS if record.endpoint == COMPLETIONS else llm.default_max_tokens)
    if "seed" not in wanted:
        wanted["seed"] = int(np.random.SeedSequence([settings.seed, record.line]).generate_state(1, np.uint32)[0])
    try:
        if record.echo:
            wanted["prompt_logprobs"] = wanted.get("logprobs")
        params = llm.default_sampling_params(**wanted)
        if record.messages is not None:
            chat, run = record.chat, settings.chat
            chat = replace(chat, tools=chat.tools or run.tools, documents=chat.documents or run.documents)
            return llm.prepare_chat(record.messages, params, record, settings.now, chat)
        assert record.prompt is not None
        return replace(llm.prepare(record.prompt, params, record), prompt_only=record.prompt_only)
    except ValueError as error:
        return record.refused(error)
    except Exception as error:  # a chat template or a tokenizer that fails on one text must not end the run
        return Problem(record.line, record.custom_id, "server_error", error_line(error), digest=record.digest)


def work_steps(llm: LLM) -> Callable[[Work], float]:
    """About how many steps a prompt takes at most: what windows are sorted by."""

    def steps(item: Work) -> float:
        prompt = len(item.prompt_token_ids)
        room = llm.max_model_len - prompt
        most = room if item.most_tokens is None else min(item.most_tokens, room)
        return most + prompt / llm.prefill_rows

    return steps


def answer(
    llm: LLM,
    items: Iterable[Record | Problem | None],
    settings: Settings,
    emit: Callable[[Json], None],
    between: Callable[[], None] = lambda: None,
) -> None:
    """Runs records, in windows by length, and gives `emit` one output record for each record or problem, as they come;
    `between` is called between steps.

    None among the items means "nothing this time". Raises what `emit` raises, and the engine's error when every request
    fails.
    """

    def work() -> Iterator[Work | None]:
        for item in items:
            if isinstance(item, Record):
                item = prepare(llm, item, settings)
            if isinstance(item, Problem):
                emit(error_record(item))
            yield item if isinstance(item, Work) else None

    ordered = longest_first(work(), work_steps(llm), lambda item: item.key.num_bytes, settings.window)
    for item, output in llm.run_stream(ordered, between):
        assert isinstance(output, RequestOutput)
        emit(response_record(item.key, output, settings.model, llm.tokenizer))


@dataclass(frozen=True)
class BatchReport:
    """lines of the input; of these `errors` have an error record; `done_before` had a record when this run began.
    Tokens and seconds are of this run, without loading the model."""

    lines: int
    errors: int
    done_before: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return (self.prompt_tokens + self.completion_tokens) / self.seconds if self.seconds else 0.0


def run_batch(
    llm: LLM, source: Path, found: FileIdentity, journal: Journal, settings: Settings, progress: bool = True
) -> BatchReport:
    """Answers every line of `source` that has no record in the journal yet.

    found  what `source` was when the journal's manifest was made: no line of another content is answered
    Results are durable when this returns or raises. Raises JournalError when they cannot be written, and ConfigError
    when the input was changed meanwhile.
    """
    before, started = len(journal.done), time.monotonic()
    prompt_tokens = completion_tokens = 0

    def emit(record: Json) -> None:
        nonlocal prompt_tokens, completion_tokens
        journal.write(encode_record(record))
        if record["response"] is not None:
            usage = record["response"]["body"]["usage"]
            prompt_tokens += usage["prompt_tokens"]
            completion_tokens += usage["completion_tokens"]

    with progress_of(llm, journal, found.lines, "answering", "requests", progress) as show:
        lines = read_lines(source, identity=found)
        answer(llm, parse_lines(lines, (settings.model,), journal.done), settings, emit, show)
        journal.finish()
    assert len(journal.done) == found.lines, (len(journal.done), found.lines)
    seconds = time.monotonic() - started
    return BatchReport(found.lines, journal.errors, before, prompt_tokens, completion_tokens, seconds)


@contextmanager
def progress_of(
    llm: LLM, journal: Journal, total: int, title: str, unit: str, enabled: bool
) -> Iterator[Callable[[], None]]:
    """What is to be called between steps, and shows how far a run is: records that are on the disk, of `total`, and
    tokens per second."""
    before, started, rows_before = journal.synced, time.monotonic(), llm.num_rows
    shown = before
    with Progress(total - before, title, unit, enabled) as bar:

        def show() -> None:
            nonlocal shown
            seconds, now = time.monotonic() - started, journal.synced
            note = f"{(llm.num_rows - rows_before) / seconds:.0f} tokens/s"  # also of what has not ended yet
            if now > before and not sys.stderr.isatty():  # the bar of a terminal tells it
                note += f", {_duration((total - now) * seconds / (now - before))} left"
            bar.advance(now - shown, note)
            shown = now

        yield show
        if journal.synced > shown:
            show()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def write_in_order(path: Path) -> None:
    """Rewrites a results file in the order of the numbers of its records, atomically: killed at any moment, either the
    old or the new file is there. Takes 40 bytes of memory per record at most, and as much disk space again."""
    numbers, offsets, at = array("q"), array("q"), 0
    with open(path, "rb") as file:
        for line in file:
            number = record_number(line)
            if number is None:
                raise ConfigError(f"--ordered: {path} has a damaged record at byte {at}")
            numbers.append(number)
            offsets.append(at)
            at += len(line)
        starts = np.asarray(offsets)[np.argsort(np.asarray(numbers))]
        temporary = path.with_name(path.name + ".part")
        with create(temporary) as out:
            for start in starts:
                file.seek(int(start))
                out.write(file.readline())
            out.flush()
            os.fsync(out.fileno())
    os.replace(temporary, path)
    sync_folder(path.absolute().parent)


def first_errors(path: Path, count: int = 3) -> list[str]:
    """Messages of the first error records of a results file."""
    found = []
    with open(path, "rb") as file:
        for line in file:
            if b'"error": {' in line[:80]:
                error = json.loads(line)["error"]
                found.append(f"line {error['line']}: {error['message']}")
                if len(found) == count:
                    break
    return found


def unfinished_thoughts(path: Path) -> int:
    """Answers of a results file that are missing because their thoughts had not ended."""
    with open(path, "rb") as file:
        return sum(line.count(b'"content": null') for line in file)  # in a text, quotes have a backslash
