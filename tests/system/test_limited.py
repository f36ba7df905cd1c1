"""Templates and regular expressions of others end, and take no more memory than there is for them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanoflow_jax.config import EMBEDDED, ConfigError
from nanoflow_jax.engine.request import CompletionOutput, RequestMetrics, RequestOutput
from nanoflow_jax.evaluate.prompts import Sample, samples
from nanoflow_jax.evaluate.run_task import judge_text
from nanoflow_jax.evaluate.tasks import load_task
from nanoflow_jax.system import limited
from nanoflow_jax.system.limited import LimitedError, Worker
from nanoflow_jax.tokenizer import Tokenizer

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLES = "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
ENDED, FULL = "did not end within 0.5 seconds", "more than 2 GiB"


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    found = Worker(seconds=0.5)
    yield found
    found.stop()


@pytest.fixture
def short(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's limit is as short as these tests."""
    monkeypatch.setattr(limited, "_worker_of", lambda process: worker)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOPS, ENDED),
        (DOUBLES, f"{FULL}|{ENDED}"),  # whichever comes first
        ("{{ 'a' * 10**11 }}", FULL),
        ("{{ '%999999999999d' % 1 }}", FULL),
        ("{{ 9**(9**9) }}", ENDED),
        ("{{ ''.__class__ }}", "unsafe"),
        ("{{ absent }}", "'absent' is undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{" + "(" * 5000, "recursion"),
        ("{% for i in range(10**9) %}{% endfor %}", "range"),
    ],
)
def test_templates_have_limits(template: str, message: str, worker: Worker):
    with pytest.raises(LimitedError, match=message) as found:
        worker.ask("render", template=template, fields={})
    assert str(found.value).isprintable() and len(str(found.value)) <= 300
    assert worker.ask("render", template="{{ a }}\n", fields={"a": "ü\ud800"}) == "ü\ud800\n"


def test_regular_expressions_have_limits(worker: Worker):
    with pytest.raises(LimitedError, match=ENDED):
        worker.ask("find", regex="(a+)+$", text="a" * 60 + "b", group=0, last=False)
    assert worker.ask("find", regex="([0-9])x", text="1x 2x 3y", group=1, last=True) == "2"
    assert worker.ask("find", regex="([0-9])x", text="1x 2x 3y", group=1, last=False) == "1"
    assert worker.ask("find", regex="z", text="1x 2x 3y", group=0, last=False) is None


def test_a_killed_worker_and_an_interrupt_leave_no_wrong_answer(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    assert worker.ask("groups", regex="(a)") == 1
    assert worker._process is not None
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(LimitedError, match="its process ended"):
        worker.ask("groups", regex="(a)")

    def interrupted(data: bytes) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(json, "loads", interrupted)  # the answer is there, and nobody has taken it
        with pytest.raises(KeyboardInterrupt):
            worker.ask("groups", regex="(a)")
    assert worker.ask("groups", regex="(a)(b)") == 2


@pytest.mark.parametrize("template", [LOOPS, DOUBLES])
@pytest.mark.usefixtures("short")
def test_a_models_chat_template_that_never_ends(template: str, tmp_path: Path):
    folder = shutil.copytree(EMBEDDED["tiny"], tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=rf"messages: the model's chat template .*({ENDED}|{FULL})"):
        Tokenizer(folder).chat([{"role": "user", "content": "12+30="}])


def task_file(folder: Path, **changed: Any) -> str:
    fields = {"data": {"problems": "addition", "count": 1}, "prompt": "{{ prompt }}", "target": "{{ answer }}",
              "metrics": ["exact_match"], **changed}  # fmt: skip
    (folder / "task.yaml").write_text(json.dumps(fields))
    return str(folder / "task.yaml")


@pytest.mark.usefixtures("short")
def test_a_tasks_template_that_never_ends(tmp_path: Path):
    with pytest.raises(ConfigError, match=rf"document 0: .* cannot be rendered: it {ENDED}"):
        samples(load_task(task_file(tmp_path, prompt=LOOPS)))


@pytest.mark.usefixtures("short")
def test_a_tasks_regular_expression_that_never_ends(tmp_path: Path):
    """The question counts as wrong, and the report says why."""
    task = load_task(task_file(tmp_path, extract={"regex": "(a+)+$"}))
    output = RequestOutput(
        "1", "", [1], [CompletionOutput(0, "", [1], "stop", content="a" * 60 + "b")], RequestMetrics(0.0)
    )
    fields, scores, error = judge_text(task, Sample(0, "0", "", None, ("2",), None), output)
    assert error is not None and error.startswith("extract.regex: it ") and ENDED in error
    assert scores == {"exact_match": 0.0} and fields["output"].endswith("ab")


def test_a_yaml_bomb_is_refused_at_once(tmp_path: Path):
    path = tmp_path / "task.yaml"
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    path.write_text("a0: &a0 [x]\n" + "\n".join(levels) + "\n")
    started = time.process_time()
    with pytest.raises(ConfigError, match=r"task.yaml: not YAML \(line 1: anchors and aliases .* are not accepted"):
        load_task(str(path))
    assert time.process_time() - started < 5
    path.write_text("data: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match=r"tag .* is not accepted"):
        load_task(str(path))
