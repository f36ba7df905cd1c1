"""What a run is: its plan, the day it began, and which request each result answers."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanoflow_jax import LLM, SamplingParams, api
from nanoflow_jax.cli import main
from nanoflow_jax.engine.feed import Work
from nanoflow_jax.evaluate.journal import Journal, manifest_path
from nanoflow_jax.evaluate.manifest import Manifest
from nanoflow_jax.evaluate.prompts import samples
from nanoflow_jax.evaluate.run_task import run_task
from nanoflow_jax.evaluate.tasks import load_task
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.plan.file import load_plan
from tests.evaluate.flags import FLAGS, Cli
from tests.evaluate.stand_in import StandIn
from tests.scripted import LLAMA3_CONFIG, llama3, write_model

Json = dict[str, Any]
DATA = Path(__file__).with_name("data")  # a batch and an evaluation, as they were left before `LLMOptions` was


def chat(name: str, content: str, **body: Any) -> Json:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 6, **body}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path: Path, lines: list[Json]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# -- the plan


def test_the_manifest_names_the_plan_that_runs(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What plan="auto" takes on the GPUs that are there for such weights, when nothing asks for bitwise the same."""
    gpus, plan = load_hardware("h200"), load_plan("sequential")
    asked: list[tuple[Any, ...]] = []
    flags = [*(flag for flag in FLAGS if flag != "--deterministic"), "--quantization", "fp8"]
    monkeypatch.setattr(api, "hardware_of", lambda _: gpus)
    monkeypatch.setattr(
        api,
        "known_plan",
        lambda config, *sizes: (asked.append((config.quantization, *sizes)), (plan, "it is known"))[1],
    )

    class Chosen(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Chosen

    monkeypatch.setattr(api, "LLM", stop)
    write(tmp_path / "in.jsonl", [{"prompt": "12+30="}])
    with pytest.raises(Chosen):
        cli("batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *flags, flags=False)
    with pytest.raises(Chosen):
        cli("eval", "addition", "--limit", "2", "-o", str(tmp_path / "eval"), *flags, flags=False)
    digest = hashlib.sha256(repr(plan).encode()).hexdigest()[:16]
    for path in (tmp_path / "out.jsonl", tmp_path / "eval" / "addition.samples.jsonl"):
        assert Manifest.read(manifest_path(path)).identity["plan"] == f"sequential {digest}"
    assert asked == [("fp8", "h200", 1, 40, 8)] * 2


def test_an_llm_takes_the_plan_that_the_manifest_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Chosen(Exception):
        pass

    def chosen(config: Any, device: Any, *sizes: Any) -> None:
        assert (device.platform, sizes) == ("cpu", (1, 40, 8, True))
        raise Chosen

    monkeypatch.setattr(api, "auto_plan", chosen)
    with pytest.raises(Chosen):
        LLM("tiny", tensor_parallel_size=1, tokens_per_step=40, decode_slots=8, deterministic=True, progress=False)


# -- the options


def recorded(name: str, folder: Path, identity: Json) -> tuple[Manifest, Path]:
    """The records of a run by an earlier version, and its manifest with the model and plan of `identity`, which other
    tests hold: (the manifest as it was, the path of the records)."""
    was = Manifest.read(manifest_path(DATA / name))
    told = {n: identity[n] for n in ("model", "plan")}
    replace(was, identity={**was.identity, **told}).write(manifest_path(folder / name))
    (folder / name).write_bytes((DATA / name).read_bytes())
    return was, folder / name


def test_a_difference_is_shown_where_it_is() -> None:
    """Of a setting inside a setting, and of texts that begin alike."""
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}" * 3
    changed = template.replace("role }}", "name }}", 2).replace("name }}", "role }}", 1)
    mine = Manifest("eval", {"task": {"prompt": template, "fewshot": {"count": 0, "seed": 1}}, "page_size": 16})
    theirs = Manifest("eval", {"task": {"prompt": changed, "fewshot": {"count": 5, "seed": 1}}, "seed": 0})
    prompt, *others = mine.differences(theirs)
    assert others == ["task.fewshot.count was 0 and is 5", "page_size was 16 and is null", "seed was null and is 0"]
    was, now = prompt.split(" and is ")
    assert was.startswith("task.prompt was ...") and "message.role }}" in was and "message.name }}" in now
    assert len(prompt) < 160
    assert mine.differences(mine) == []


def test_runs_of_earlier_versions_go_on(cli: Cli, tmp_path: Path) -> None:
    """What they called the same is the same: names and values of all options, those that were left open too."""
    source = DATA / "in.jsonl"
    batch = ("batch", "-i", str(source), "--seed", "5", "-o")
    assert cli(*batch, str(tmp_path / "new.jsonl"))[0] == 0
    now = dict(Manifest.read(manifest_path(tmp_path / "new.jsonl")).identity)
    was, output = recorded("out.jsonl", tmp_path, now)
    later = dict.fromkeys(
        ("quantization", "chat_template", "chat_template_kwargs", "reasoning_parser")
    )  # not there yet
    assert now == {**was.identity, "model": now["model"], "plan": now["plan"], **later}
    whole = output.read_bytes()
    output.write_bytes(whole.splitlines(keepends=True)[0])
    status, printed, err = cli(*batch, str(output))
    assert (status, err) == (0, "") and "of these 1 were there before" in printed
    assert [json.loads(line)["custom_id"] for line in output.read_text().splitlines()] == [
        json.loads(line)["custom_id"] for line in whole.splitlines()
    ]
    assert 'quantization was null and is "fp8"' in cli(*batch, str(output), "--quantization", "fp8")[2]
    assert "page_size was 16 and is 32" in cli(*batch, str(output), *FLAGS, "--page-size", "32", flags=False)[2]

    recorded("addition.samples.jsonl", tmp_path, now)
    evaluate = ("eval", "addition", "--limit", "2", "-o", str(tmp_path), "--max-model-len", "256", "--cpu-devices", "1")
    status, printed, err = cli(*evaluate, "--quiet", flags=False)
    assert (status, err) == (0, "") and "1.0000" in printed
    assert "dtype was" in cli(*evaluate, "--quiet", "--dtype", "bfloat16", flags=False)[2]


# -- the day


@pytest.fixture
def day() -> Iterator[Callable[[str], None]]:
    """Sets the time zone: on either side of the date line it is never the same day."""
    before = os.environ.get("TZ")

    def set_zone(name: str) -> None:
        os.environ["TZ"] = name
        time.tzset()

    yield set_zone
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


def test_a_run_that_goes_on_another_day_asks_the_same(
    tmp_path: Path, day: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Chat templates may write the date: it is the one on which the run began."""
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    made = llama3()
    folder = write_model(tmp_path / "m", made, {**LLAMA3_CONFIG, "chat_template": template}, {}, 5)
    prompts: list[str] = []
    rendered = api.LLM.prepare_chat

    def noted(self: LLM, *arguments: Any, **options: Any) -> Work:
        work = rendered(self, *arguments, **options)
        prompts.append(work.prompt or "")
        return work

    monkeypatch.setattr(api.LLM, "prepare_chat", noted)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [chat("a", " yes"), chat("b", " no")])
    run = ["batch", "-i", str(source), "-o", str(output), "--model", str(folder), *FLAGS]
    day("Etc/GMT+12")
    assert main(run) == 0
    whole = output.read_bytes()
    first, begun = prompts[0].split(" yes")[0], Manifest.read(manifest_path(output)).identity["chat_time"]
    output.write_bytes(whole[: whole.index(b"\n") + 1])
    day("Pacific/Kiritimati")
    assert main(run) == 0
    assert output.read_bytes() == whole
    assert len(prompts) == 3 and all(p.startswith(first) for p in prompts)
    assert Manifest.read(manifest_path(output)).identity["chat_time"] == begun
    assert main([*run, "--restart"]) == 0
    assert not prompts[-1].startswith(first), "a new run begins today"
    assert capsys.readouterr().err == ""


def test_a_template_without_a_clock_has_no_time_in_its_manifest(cli: Cli, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [chat("a", "What is 25+17?")])
    assert cli("batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"))[0] == 0
    assert "chat_time" not in Manifest.read(manifest_path(tmp_path / "out.jsonl")).identity


def test_the_time_reaches_the_questions_of_a_chat_task(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Noting(StandIn):
        def prepare_chat(
            self, messages: Any, params: SamplingParams, key: Any = None, now: Any = None, settings: Any = None
        ) -> Work:
            seen.append(now)
            return super().prepare_chat(messages, params, key)

    task, llm = load_task("addition_chat"), Noting()
    fixed: Any = "the time"
    with Journal.open(tmp_path / "a.jsonl", Manifest("eval", {})) as journal:
        run_task(llm, task, samples(task, 3), journal, progress=False, now=fixed)  # type: ignore[arg-type]
    assert seen == ["the time"] * 3


# -- results of a changed run

BEFORE: list[Json] = [
    chat("first", "What is 25+17?"), {"prompt": "12+30=", "max_tokens": 6}, chat("second", "Reverse abc"),
    {"prompt": "12+30=", "max_tokens": 6}, chat("wrong", "x", stream=True), chat("gone", "Thank you"),
]  # fmt: skip
AFTER: list[Json] = [
    chat("new", "Reverse onion"), {"max_tokens": 6, "prompt": "12+30="}, chat("first", "What is 25+17?"),
    chat("wrong", "x", stream=True), chat("second", "Reverse abcd"), {"prompt": "12+30=", "max_tokens": 6},
    {"prompt": "12+30=", "max_tokens": 6}, {"prompt": "12+30=", "max_tokens": 6, "custom_id": "named"},
]  # fmt: skip


def test_results_belong_to_requests_not_to_lines(cli: Cli, tmp_path: Path) -> None:
    """A line was put in, others moved, one edited, one removed: what is answered is what a new run would answer."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    run = ("batch", "-i", str(source), "-o", str(output), "--json")
    write(source, BEFORE)
    assert cli(*run)[0] == 0
    before = output.read_bytes()
    write(source, AFTER)
    assert cli(*run)[0] == 1, "not without being told to"
    status, report, err = cli(*run, "--allow-changed")
    assert status == 0
    assert "4 results kept; of 1 the request has changed and is answered again, of 1 it is gone" in err
    assert json.loads(report)["done_before"] == 4
    assert Path(f"{output}.old-1").read_bytes() == before and f"{output}.old-1" in err
    other = tmp_path / "other.jsonl"
    assert cli("batch", "-i", str(source), "-o", str(other))[0] == 0
    assert sorted(output.read_bytes().splitlines()) == sorted(other.read_bytes().splitlines())
    assert cli(*run)[0] == 0, "from now on it is the changed run"


def test_a_setting_that_has_changed_keeps_all_results(cli: Cli, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, BEFORE)
    run = ("batch", "-i", str(source), "-o", str(output))
    assert cli(*run)[0] == 0
    before = output.read_bytes()
    status, _, err = cli(*run, "--temperature", "0.5", "--allow-changed")
    assert (status, err) == (0, "")
    assert output.read_bytes() == before and not Path(f"{output}.old-1").exists()


def test_a_kill_while_results_are_paired(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the old nor the new input is taken for the one that the file answers; --allow-changed goes on."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    run = ("batch", "-i", str(source), "-o", str(output))
    for kill_at in (1, 2, 3):  # the manifest of no run, the results, the manifest of the new run
        write(source, BEFORE)
        assert cli(*run, "--restart")[0] == 0
        write(source, AFTER)
        count, replace = 0, os.replace

        def killed(*paths: Any, kill_at: int = kill_at, replace: Any = replace) -> None:
            nonlocal count
            count += 1
            if count == kill_at:
                raise KeyboardInterrupt
            replace(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            assert cli(*run, "--allow-changed")[0] == 1
        assert count == kill_at
        write(source, BEFORE)
        assert cli(*run)[0] == (0 if kill_at == 1 else 1)
        write(source, AFTER)
        assert cli(*run)[0] == 1
        assert cli(*run, "--allow-changed")[0] == 0
        other = tmp_path / f"other{kill_at}.jsonl"
        assert cli("batch", "-i", str(source), "-o", str(other))[0] == 0
        assert sorted(output.read_bytes().splitlines()) == sorted(other.read_bytes().splitlines())


def test_questions_of_a_changed_task(cli: Cli, tmp_path: Path) -> None:
    """As results of a batch: by id and by what is asked."""
    task, data, folder = tmp_path / "t.yaml", tmp_path / "d.jsonl", tmp_path / "out"
    task.write_text('data: {file: d.jsonl}\nprompt: "{{ q }}"\ntarget: "{{ a }}"\nmetrics: [exact_match]\n')
    write(
        data,
        [
            {"id": "x", "q": "12+30=", "a": "42"},
            {"id": "y", "q": "sort 31=", "a": "13"},
            {"id": "z", "q": "1+1=", "a": "2"},
        ],
    )
    assert cli("eval", str(task), "-o", str(folder))[0] == 0
    write(
        data,
        [
            {"id": "n", "q": "11+11=", "a": "22"},
            {"id": "y", "q": "sort 321=", "a": "123"},
            {"id": "x", "q": "12+30=", "a": "42"},
        ],
    )
    assert cli("eval", str(task), "-o", str(folder))[0] == 1
    status, _, err = cli("eval", str(task), "-o", str(folder), "--allow-changed")
    assert status == 0
    assert "t: 1 results kept; of 1 the request has changed and is answered again, of 1 it is gone" in err
    found = {r["sample"]: r for r in map(json.loads, (folder / "t.samples.jsonl").read_text().splitlines())}
    assert {name: (r["id"], r["output"]) for name, r in found.items()} == {
        "n": ("sample_0", "22"), "y": ("sample_1", "123"), "x": ("sample_2", "42"),
    }  # fmt: skip
