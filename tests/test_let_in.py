"""What files of others may not do: run code, write elsewhere, or take all time and memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from nanoflow_jax import LLM, time_limit
from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.memory import check_pool
from nanoflow_jax.engine.request import CompletionOutput, RequestOutput
from nanoflow_jax.evaluate.batch import write_in_order
from nanoflow_jax.evaluate.journal import Journal, manifest_path
from nanoflow_jax.evaluate.manifest import Manifest, replacing
from nanoflow_jax.evaluate.prompts import samples
from nanoflow_jax.evaluate.run_task import judge_text
from nanoflow_jax.evaluate.tasks import load_task
from nanoflow_jax.tokenizer import Tokenizer
from nanoflow_jax.weights.hub import resolve_model

# -- code


def test_a_models_own_code_is_neither_run_nor_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve_model("tiny"), folder)
    (folder / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import PretrainedConfig as Config, PreTrainedTokenizerFast as Tok\n"
    )
    for name, more in (
        ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}}),
    ):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked"))
    assert Tokenizer(folder).encode("ab", True) == Tokenizer(resolve_model("tiny")).encode("ab", True)
    assert not (tmp_path / "ran").exists()


# -- names and links


def test_a_tasks_name_is_plain(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "1", "a": "2"}\n')
    for name in ("../../x", "/tmp/x", "..", "", "a/b", "x" * 300, "a\0b"):
        fields = {
            "name": name, "data": {"file": "rows.jsonl"}, "prompt": "{{ q }}", "target": "{{ a }}",
            "metrics": ["exact_match"],
        }  # fmt: skip
        (tmp_path / "task.yaml").write_text(json.dumps(fields))
        with pytest.raises(ConfigError, match=r"name: .* is not accepted"):
            load_task(str(tmp_path / "task.yaml"))


def test_nothing_is_written_through_a_link_at_a_drafts_name(tmp_path: Path) -> None:
    victim, output = tmp_path / "victim", tmp_path / "out.jsonl"
    victim.write_text("mine")
    record = b'{"id": "batch_req_1", "error": null, "custom_id": null, "response": {}}\n'

    def plant(path: Path) -> None:
        path.with_name(path.name + ".part").symlink_to(victim)

    plant(manifest_path(output))
    with Journal.open(output, Manifest("batch", {})) as journal:
        journal.write(record)
    plant(output)
    write_in_order(output)
    assert output.read_bytes() == record
    assert not output.is_symlink()
    plant(output)
    with pytest.raises(ZeroDivisionError), replacing(output) as file:
        file.write(b"half")
        1 / 0  # noqa: B018
    assert output.read_bytes() == record
    # Where files are put aside, a link that leads nowhere takes a name.
    output.with_name("out.jsonl.old-1").symlink_to(tmp_path / "elsewhere")
    Journal.open(output, Manifest("batch", {}), restart=True).close()
    assert output.with_name("out.jsonl.old-2").read_bytes() == record
    assert not (tmp_path / "elsewhere").exists()
    assert victim.read_text() == "mine"


def test_an_output_that_is_a_link_is_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, real = tmp_path / "out.jsonl", tmp_path / "there" / "real.jsonl"
    link.symlink_to(real)
    with Journal.open(link, Manifest("batch", {})) as journal:
        path = journal.path
    assert path == real.resolve()
    assert link.is_symlink()
    assert manifest_path(real).exists()
    write_in_order(path)
    assert link.is_symlink()


# -- time and memory

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "SECONDS", 0.2)


def task_of(folder: Path, **changes: Any) -> Any:
    (folder / "rows.jsonl").write_text('{"q": "1", "a": "2"}\n')
    fields = {
        "data": {"file": "rows.jsonl"}, "prompt": "{{ q }}", "target": "{{ a }}", "metrics": ["exact_match"], **changes
    }  # fmt: skip
    (folder / "task.yaml").write_text(json.dumps(fields))
    return load_task(str(folder / "task.yaml"))


def test_a_regular_expression_without_end_is_a_questions_error(short: None, tmp_path: Path) -> None:
    task = task_of(tmp_path, extract={"regex": "(a+)+$"})
    (sample,) = samples(task)
    done = CompletionOutput(0, "a" * 40 + "b", [], "stop")
    fields, scores, error = judge_text(task, sample, RequestOutput("1", "", [], [done], None))  # type: ignore[arg-type]
    assert (fields["output"], scores) == (done.text, {"exact_match": 0.0})
    assert error == "extract.regex: it takes longer than 0.2 s"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            ENDLESS,
            "it takes longer than 0.2 s",
        ),
        ("{{ 'a' * 10 ** 10 }}", "more than 1048576 items"),
        ("{{ 10 ** 10 * [1] }}", "more than 1048576 items"),
        ("{{ 9 ** 99999999 }}", "the exponent is above 64"),
    ],
)
def test_a_template_without_end_is_one_line(template: str, told: str, short: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        samples(task_of(tmp_path, prompt=template))


def test_a_chat_template_without_end_is_one_line(short: None) -> None:
    tokenizer = Tokenizer(resolve_model("tiny"))
    tokenizer.hugging_face.chat_template = ENDLESS
    for now in (None, datetime(2026, 1, 1)):
        with pytest.raises(ValueError, match=r"messages: the model's chat template fails on them .*longer than"):
            tokenizer.chat([{"role": "user", "content": "x"}], now)


def test_the_limit_leaves_other_alarms_as_they_were() -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with time_limit.time_limit(5):
            time.sleep(0.05)
        assert not rung
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.26
        time.sleep(0.5)
        assert rung == [1]
        with pytest.raises(time_limit.TooLong), time_limit.time_limit(0.05):
            time.sleep(5)
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    ended: list[int] = []

    def elsewhere() -> None:
        with time_limit.time_limit(0.01):
            time.sleep(0.05)
            ended.append(1)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ended == [1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tokens_per_step": 10**9}, "tokens_per_step: 1000000000 is not accepted; it must be at most 262144"),
        ({"page_size": 10**9}, "page_size: 1000000000 is not accepted; it must be at most 65536"),
        ({"kv_cache_tokens": 10**12}, r"kv_cache_tokens: 1000000000000 take \S+ GiB on each device, which has \S+ GiB"),
    ],
)
def test_absurd_sizes_are_told_at_once(options: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow_jax.engine.setup.compile_steps", lambda *_, **__: pytest.fail("steps are compiled"))
    with pytest.raises(ConfigError, match=told):
        LLM("tiny", tensor_parallel_size=1, progress=False, **options)


def test_a_pool_is_held_to_the_memory_and_to_32_bits() -> None:
    check_pool(64 * 10, 64, page=1000, devices=1, left=10_000, layers=1)
    with pytest.raises(ConfigError, match="accepted: at most 640"):
        check_pool(64 * 11, 64, page=1000, devices=1, left=10_000, layers=1)
    with pytest.raises(ConfigError, match=f"accepted: at most {2 * (2**30 // 80)}"):
        check_pool(2**31, 2, page=1, devices=1, left=2**40, layers=80)
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // 2**20  # two devices share the host's
    check_pool(pages, 1, page=2**20, devices=2, left=None, layers=1)
    with pytest.raises(ConfigError, match="kv_cache_tokens"):
        check_pool(pages + 1, 1, page=2**20, devices=2, left=None, layers=1)
