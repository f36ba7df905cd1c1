"""What an evaluation asks, and what counts as right: a task, read from YAML or JSONL.

    name: addition
    version: 1
    data: {problems: addition, split: test, seed: 1, count: 200}   # or {file: questions.jsonl}
    prompt: "{{ prompt }}"            # Jinja templates over the fields of a document
    target: "{{ answer }}"            # or a list of texts, any of which is right
    fewshot: {count: 2, seed: 0}      # examples, drawn for each question with a fixed seed
    generate: {max_tokens: 8}         # as a batch file's body; or choices: ["{{ answer }}", "{{ wrong }}"]
    extract: {regex: "([0-9]+)"}      # what of the output is the answer
    metrics: [exact_match]

A JSONL file is a task by itself: each line has `prompt` and `target`, and `choices` where one is to be chosen.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanoflow_jax.assets import tasks as builtin
from nanoflow_jax.config import ConfigError, configs_root
from nanoflow_jax.engine.structured import check_form
from nanoflow_jax.evaluate.forms import FORMS, form_of
from nanoflow_jax.evaluate.metrics import CHOICE_METRICS, MAJORITY, TEXT_METRICS, passes
from nanoflow_jax.sampling_params import MAX_N, SamplingParams
from nanoflow_jax.system import limited
from nanoflow_jax.system.reading import Malformed, is_plain_name, parse_json, parse_yaml, read_text

Document = dict[str, Any]
MOST_BYTES = 2**18  # of a task's YAML
MOST_FEWSHOT = 1000


@dataclass(frozen=True)
class Data:
    """Documents: lines of a JSONL file, or the first `count` problems of a built-in generator (`assets.tasks`)."""

    file: str | None = None
    problems: str | None = None
    split: str = "test"
    seed: int = 0
    count: int | None = None

    def documents(self) -> Iterator[Document]:
        """Raises ConfigError, one line."""
        if self.problems is not None:
            stream = builtin.problems(self.problems, self.split, self.seed)  # type: ignore[arg-type]
            yield from (asdict(problem) for problem in itertools.islice(stream, self.count))
            return
        assert self.file is not None
        found = 0
        with open(self.file, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    document = parse_json(line.decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    raise ConfigError(f"{self.file}:{number}: not UTF-8 text (byte {error.start})") from None
                except Malformed as error:
                    raise ConfigError(f"{self.file}:{number}: not JSON ({error})") from None
                if not isinstance(document, dict):
                    raise ConfigError(f"{self.file}:{number}: must be a JSON object, not {type(document).__name__}")
                yield document
                found += 1
                if found == self.count:
                    return


@dataclass(frozen=True)
class FewShot:
    """`count` examples before each question, drawn with a seed of their own for each. data None: from the task's own
    documents, without the one asked about."""

    count: int = 0
    seed: int = 0
    separator: str = "\n\n"
    data: Data | None = None


@dataclass(frozen=True)
class Extract:
    """The answer in an output: the last (or first) match of a regular expression, or its group. No match: no
    answer. Raises ValueError when it takes too long."""

    regex: str
    group: int = 0
    match: str = "first"

    def __call__(self, text: str) -> str | None:
        return limited.ask("find", regex=self.regex, text=text, group=self.group, last=self.match == "last")


@dataclass(frozen=True, kw_only=True)
class Task:
    """As the module describes it. delimiter: between a prompt and its target, in examples and before a choice.
    choices: templates, or the name of a field that holds a list; None: text is generated."""

    name: str
    data: Data
    prompt: str
    target: str | tuple[str, ...]
    metrics: tuple[str, ...]
    version: str = "1"
    description: str = ""
    delimiter: str = ""
    chat: bool = False
    choices: str | tuple[str, ...] | None = None
    generate: Mapping[str, Any] = field(default_factory=dict)
    extract: Extract | None = None
    fewshot: FewShot = FewShot()

    def sampling(self) -> dict[str, Any]:
        """`generate` by the names of SamplingParams. Raises ValueError for a form that is none."""
        given = {name: value for name, value in self.generate.items() if name not in FORMS}
        return given if (form := form_of(self.generate)) is None else {**given, "structured_outputs": form}

    def to_json(self) -> dict[str, Any]:
        """Plain data: two tasks with the same are the same."""
        return json.loads(json.dumps(asdict(self)))


def task_names() -> list[str]:
    """The built-in tasks."""
    return sorted(path.stem for path in (configs_root() / "tasks").glob("*.yaml"))


def load_task(name: str) -> Task:
    """A built-in name, or the path of a YAML or JSONL file. Raises ConfigError, one line."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".jsonl"):
        path = configs_root() / "tasks" / f"{name}.yaml"
        if name not in task_names():
            raise ConfigError(
                f"task: {name!r} is not known; accepted: {', '.join(task_names())}, or a path ending in .yaml or .jsonl"
            )
    if not os.path.isfile(path):
        raise ConfigError(f"task: {path} is not a file")
    if path.suffix == ".jsonl":
        return _from_lines(path)
    try:
        fields = parse_yaml(read_text(path, MOST_BYTES))
    except Malformed as error:
        raise ConfigError(f"{path}: not YAML ({error})") from None
    try:
        return _task(fields, path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _from_lines(path: Path) -> Task:
    data = Data(file=str(path))
    first = next(data.documents(), None)
    if first is None:
        raise ConfigError(f"{path}: it is empty; a task needs at least one line")
    if missing := [name for name in ("prompt", "target") if name not in first]:
        raise ConfigError(f"{path}:1: {missing[0]!r} is missing; each line has prompt and target, and may have choices")
    chosen = "choices" in first
    return _checked(
        Task(
            name=path.stem,
            data=data,
            prompt="{{ prompt }}",
            target="{{ target }}",
            choices="choices" if chosen else None,
            generate={} if chosen else {"max_tokens": 64, "temperature": 0.0},
            metrics=("accuracy", "accuracy_norm") if chosen else ("exact_match",),
        )
    )


def _task(fields: Any, path: Path) -> Task:
    if not isinstance(fields, dict):
        raise ConfigError("must hold a mapping with data, prompt, target and metrics")
    known = Task.__dataclass_fields__
    _known("task", fields, known)
    if missing := [name for name in ("data", "prompt", "target", "metrics") if name not in fields]:
        raise ConfigError(f"{missing[0]}: it is missing")
    made = {"name": path.stem, **fields}
    made["version"] = str(made.get("version", "1"))
    made["data"] = _data("data", made["data"], path)
    made["fewshot"] = _fewshot(made.get("fewshot", {}), path)
    if "extract" in made:
        made["extract"] = _extract(made["extract"])
    for name in ("target", "choices", "metrics"):
        if isinstance(made.get(name), list):
            made[name] = tuple(made[name])
    for name in ("name", "prompt", "description", "delimiter"):
        _must(isinstance(value := made.get(name, ""), str), name, value, "a text")
    _must(isinstance(value := made.get("chat", False), bool), "chat", value, "true or false")
    for name in ("target", "choices"):
        value = made.get(name, "")
        texts = value if isinstance(value, tuple) else (value,)
        _must(texts and all(isinstance(t, str) for t in texts), name, value, "a text or a list of texts")
    return _checked(Task(**made))


def _checked(task: Task) -> Task:
    """Raises ConfigError for parts that do not go together, and a name that names no file of an output folder."""
    if not is_plain_name(task.name) or not task.name.isprintable() or task.name.startswith("."):
        raise ConfigError(f"name: {task.name!r} is not accepted; it names files: at most 200 bytes, without / and \\")
    if task.choices is not None:
        for name, given in (("generate", task.generate), ("extract", task.extract), ("chat", task.chat)):
            if given:
                raise ConfigError(f"{name}: it does not go together with choices, which are scored as continuations")
    accepted = (*TEXT_METRICS, MAJORITY, "pass@K") if task.choices is None else tuple(CHOICE_METRICS)
    known = isinstance(task.metrics, tuple) and all(
        isinstance(m, str) and (m in accepted or (task.choices is None and passes(m))) and m != "pass@K"
        for m in task.metrics
    )
    if not known or not task.metrics:
        kind = "generated text" if task.choices is None else "choices"
        raise ConfigError(f"metrics: {task.metrics!r} is not accepted; for {kind}: a list of {', '.join(accepted)}")
    _must(isinstance(task.generate, Mapping), "generate", task.generate, "a mapping of sampling settings")
    _known("generate", task.generate, {**SamplingParams.__dataclass_fields__, **dict.fromkeys(FORMS)})
    try:
        params = SamplingParams(**task.sampling())
        if params.structured_outputs is not None:
            check_form(params.structured_outputs)
    except ValueError as error:
        raise ConfigError(f"generate.{error}") from None
    n = params.n
    _must(n <= MAX_N, "generate.n", n, f"at most {MAX_N}")
    if n > 1 and "temperature" not in task.generate:  # the model's own may be 0, and all outputs the same
        raise ConfigError("generate.n: outputs differ by sampling; a temperature above 0 is needed beside it")
    if wrong := [m for m in task.metrics if (passes(m) or 0) > n]:
        raise ConfigError(
            f"metrics: {wrong[0]} needs that many outputs; accepted: at most pass@{n}, or a larger generate.n"
        )
    return task


def _must(ok: Any, where: str, value: Any, accepted: str) -> None:
    if not ok:
        raise ConfigError(f"{where}: {value!r} is not accepted; it must be {accepted}")


def _known(where: str, fields: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in fields:
        if name not in known:
            raise ConfigError(f"{where}: unknown field {name!r}; accepted: {', '.join(known)}")


def _data(where: str, fields: Any, path: Path) -> Data:
    if not isinstance(fields, dict) or ("file" in fields) == ("problems" in fields):
        raise ConfigError(f"{where}: a mapping with either 'file' or 'problems' is needed")
    _known(where, fields, Data.__dataclass_fields__)
    for name in ("seed", "count"):
        value, low = fields.get(name, 1), int(name == "count")
        fits = (type(value) is int and low <= value < 2**31) or (name == "count" and value is None)
        _must(fits, f"{where}.{name}", value, "a whole number below 2**31")
    if "problems" in fields:
        if not isinstance(fields["problems"], str) or fields["problems"] not in builtin.TASKS:
            raise ConfigError(f"{where}.problems: {fields['problems']!r}; accepted: {', '.join(builtin.TASKS)}")
        if fields.get("split", "test") not in ("train", "test"):
            raise ConfigError(f"{where}.split: {fields['split']!r}; accepted: train, test")
        if fields.get("count") is None:
            raise ConfigError(f"{where}.count: it is missing; the problems have no end")
        return Data(**fields)
    file = path.parent / str(fields["file"])
    if not os.path.isfile(file):
        raise ConfigError(f"{where}.file: {file} is not a file")
    return Data(**{**fields, "file": str(file)})


def _fewshot(fields: Any, path: Path) -> FewShot:
    _must(isinstance(fields, dict), "fewshot", fields, "a mapping with count, seed, separator, data")
    _known("fewshot", fields, FewShot.__dataclass_fields__)
    for name in ("count", "seed"):
        most, value = MOST_FEWSHOT if name == "count" else 2**31 - 1, fields.get(name, 0)
        _must(type(value) is int and 0 <= value <= most, f"fewshot.{name}", value, f"a whole number up to {most}")
    _must(isinstance(value := fields.get("separator", ""), str), "fewshot.separator", value, "a text")
    data = fields.get("data")
    return FewShot(**{**fields, "data": None if data is None else _data("fewshot.data", data, path)})


def _extract(fields: Any) -> Extract:
    fits = isinstance(fields, dict) and isinstance(fields.get("regex"), str)
    _must(fits, "extract", fields, "a mapping with regex, group, match")
    _known("extract", fields, Extract.__dataclass_fields__)
    try:
        groups = limited.ask("groups", regex=fields["regex"])
    except limited.LimitedError as error:
        raise ConfigError(f"extract.regex: {fields['regex']!r} is no regular expression ({error})") from None
    group = fields.get("group", 1 if groups else 0)
    if type(group) is not int or not 0 <= group <= groups:
        raise ConfigError(f"extract.group: {group!r} is not accepted; the expression has {groups}")
    _must((value := fields.get("match", "first")) in ("first", "last"), "extract.match", value, "first or last")
    return Extract(**{**fields, "group": group})
