"""Evaluations: figures against computations of their own, answers against the library's, tasks read strictly."""

from __future__ import annotations

import itertools
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.config import ConfigError
from nanoflow_jax.evaluate.metrics import (
    contains,
    exact_match,
    f1,
    majority,
    mean,
    paired_difference,
    pass_at,
    score_outputs,
)
from nanoflow_jax.evaluate.plot import LOSS, plot_results
from nanoflow_jax.evaluate.prompts import samples
from nanoflow_jax.evaluate.report import Comparison, Failure, TaskResult, compare, results_table
from nanoflow_jax.evaluate.run_task import judge_text
from nanoflow_jax.evaluate.tasks import load_task, task_names
from nanoflow_jax.version import __version__
from tests.evaluate.flags import Cli

scores = st.lists(st.floats(0, 1), min_size=2, max_size=30)


# -- figures


@given(scores)
def test_mean_and_standard_error(values: list[float]) -> None:
    """By the two-pass formula; of a share, sqrt(p (1 - p) / (n - 1))."""
    found, n = mean(values), len(values)
    average = math.fsum(values) / n
    assert found.value == pytest.approx(average)
    variance = math.fsum((v - average) ** 2 for v in values) / (n - 1)
    assert found.stderr == pytest.approx(math.sqrt(variance / n), abs=1e-12)
    share = mean([float(v > 0.5) for v in values])
    assert share.stderr == pytest.approx(math.sqrt(share.value * (1 - share.value) / (n - 1)), abs=1e-12)
    assert math.isnan(mean(values[:1]).stderr)


@given(scores, st.integers(0, 1000))
def test_paired_difference(values: list[float], seed: int) -> None:
    old = np.random.default_rng(seed).random(len(values))
    found = paired_difference(values, old)
    differences = np.subtract(values, old)
    assert found.value == pytest.approx(differences.mean())
    assert found.stderr == pytest.approx(stats.sem(differences), abs=1e-12)
    if found.stderr > 1e-9:
        assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(found.value / found.stderr)), abs=1e-9)
    assert found.n == len(values)
    same = paired_difference(values, values)
    assert (same.value, same.stderr, same.p_value) == (0, 0, 1)


def test_pairing_is_what_makes_the_error_small() -> None:
    """Two runs that agree on nearly all questions differ by little noise, however uneven the questions."""
    rng = np.random.default_rng(0)
    old = (rng.random(400) < 0.5).astype(float)
    new = old.copy()
    new[:8] = 1.0
    apart = math.hypot(mean(new).stderr, mean(old).stderr)
    assert paired_difference(new, old).stderr < apart / 4


def test_text_metrics() -> None:
    assert exact_match(" 42\n", "42") == 1 and exact_match("420", "42") == 0
    assert contains("it is 42.", "42") == 1 and contains("4 2", "42") == 0
    assert f1("The cat sat!", "a cat") == pytest.approx(2 * (1 / 2) * (1 / 1) / (1 / 2 + 1 / 1))
    assert f1("b b", "b") == pytest.approx(2 / 3)
    assert f1("", "b") == 0 and f1("", "") == 1 and f1("x", "y") == 0


# -- tasks


def write_task(folder: Path, **fields: Any) -> str:
    base = {"data": {"problems": "addition", "count": 6}, "prompt": "{{ prompt }}", "target": "{{ answer }}"}
    base |= {"generate": {"max_tokens": 8, "temperature": 0}, "metrics": ["exact_match"]}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**base, **fields}.items() if v is not None}))
    return str(path)


def test_builtin_tasks_are_held_out_and_fixed() -> None:
    assert {"addition", "reverse", "sort", "lookup", "addition_choice"} <= set(task_names())
    for name in task_names():
        task = load_task(name)
        assert task.name == name
        assert task.description
        assert task.data.split == "test"
        asked = samples(task)
        assert len(asked) == task.data.count
        assert asked == samples(task)
        assert asked[:5] == samples(task, 5)


def test_few_shot_examples(tmp_path: Path) -> None:
    """Others than the question, the same each time, in the task's form."""
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"q": f"q{i}", "a": f"a{i}", "id": f"n{i}"}) + "\n" for i in range(5)))
    path = write_task(
        tmp_path, data={"file": "d.jsonl"}, prompt="Q: {{ q }}\nA:", target="{{ a }}", delimiter=" ",
        fewshot={"count": 2, "seed": 3, "separator": "\n\n"},
    )  # fmt: skip
    asked = samples(load_task(path))
    assert [s.id for s in asked] == [f"n{i}" for i in range(5)]
    for i, sample in enumerate(asked):
        *examples, question = sample.prompt.split("\n\n")
        assert question == f"Q: q{i}\nA:"
        assert len(examples) == 2
        for example in examples:
            number = example[4]
            assert example == f"Q: q{number}\nA: a{number}"
            assert int(number) != i
    assert len({s.prompt.split("Q: ")[1] for s in asked}) > 2, "each question has examples of its own"
    assert asked == samples(load_task(path))
    other = write_task(
        tmp_path, fewshot={"count": 1, "data": {"problems": "addition", "split": "train", "count": 50}}, chat=True
    )
    messages = samples(load_task(other))[0].messages
    assert messages is not None and [m["role"] for m in messages] == ["user", "assistant", "user"]


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"colour": 1}, ["'colour'", "accepted"]),
    ({"prompt": None}, ["prompt", "missing"]),
    ({"prompt": 3}, ["prompt", "3"]),
    ({"metrics": ["bleu"]}, ["metrics", "bleu", "exact_match"]),
    ({"metrics": []}, ["metrics"]),
    ({"metrics": ["accuracy"]}, ["metrics", "accuracy"]),
    ({"generate": {"max_tokens": 0}}, ["generate.max_tokens", "0"]),
    ({"generate": {"beams": 2}}, ["generate", "'beams'"]),
    ({"generate": {"structured_outputs": {"regex": "("}}}, ["generate.structured_outputs: regex", "compiled"]),
    ({"generate": {"structured_outputs": {"regx": "a"}}}, ["generate.structured_outputs", "did you mean regex"]),
    ({"generate": {"structured_outputs": "json"}}, ["generate.structured_outputs", "an object"]),
    ({"generate": {"response_format": {"type": "json"}}}, ["generate.response_format", "json_schema"]),
    ({"generate": {"n": 2}}, ["generate.n", "a temperature above 0"]),
    ({"generate": {"n": 2, "temperature": 0}}, ["generate.n"]),
    ({"generate": {"n": 1001, "temperature": 1}}, ["generate.n", "at most 1000"]),
    ({"metrics": ["pass@2"]}, ["metrics", "pass@2", "at most pass@1"]),
    ({"metrics": ["pass@0"]}, ["metrics", "pass@0", "majority, pass@K"]),
    ({"metrics": ["pass@K"]}, ["metrics", "pass@K"]),
    ({"data": {"problems": "chess", "count": 3}}, ["data.problems", "'chess'", "addition"]),
    ({"data": {"problems": "addition"}}, ["data.count"]),
    ({"data": {"file": "no.jsonl"}}, ["data.file", "no.jsonl"]),
    ({"data": {}}, ["data", "'file'", "'problems'"]),
    ({"data": {"problems": "addition", "count": -1}}, ["data.count", "-1"]),
    ({"extract": {"regex": "("}}, ["extract.regex"]),
    ({"extract": {"regex": "x", "group": 1}}, ["extract.group"]),
    ({"extract": {"regex": "x", "match": "all"}}, ["extract.match"]),
    ({"fewshot": {"count": -1}}, ["fewshot.count"]),
    ({"fewshot": {"count": 6}}, ["fewshot.count", "5 other"]),
    ({"fewshot": {"shots": 6}}, ["fewshot", "'shots'"]),
    ({"choices": ["1", "2"], "metrics": ["accuracy"]}, ["generate", "choices"]),
    ({"choices": ["1", "2"], "metrics": ["accuracy"], "generate": None}, ["target", "exactly one"]),
    ({"choices": [], "metrics": ["accuracy"], "generate": None}, ["choices"]),
    ({"prompt": "{{ nothing }}"}, ["document 0", "nothing"]),
    ({"prompt": "{% if %}"}, ["document 0"]),
    ({"chat": "yes"}, ["chat", "'yes'"]),
]


@pytest.mark.parametrize(("fields", "words"), BAD, ids=lambda x: str(x)[:40])
def test_a_bad_task_names_its_field(tmp_path: Path, fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as found:
        samples(load_task(write_task(tmp_path, **fields)))
    assert "\n" not in str(found.value)
    for word in words:
        assert word in str(found.value)


def test_other_bad_tasks(tmp_path: Path) -> None:
    for name, words in (("chess", "addition_choice"), ("./no.yaml", "not a file")):
        with pytest.raises(ConfigError, match=words):
            load_task(name)
    for text, words in (("{", "not YAML"), ("- 1", "mapping")):
        (tmp_path / "t.yaml").write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_task(str(tmp_path / "t.yaml"))
    for text, words in (
        ("", "empty"),
        ("{\n", ":1: not JSON"),
        ("[]\n", ":1: must be"),
        ('{"prompt": "x"}\n', "'target'"),
    ):
        (tmp_path / "t.jsonl").write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_task(str(tmp_path / "t.jsonl"))
    (tmp_path / "t.jsonl").write_text('{"prompt": "x", "target": "y", "id": "a"}\n' * 2)
    with pytest.raises(ConfigError, match="two documents have the id 'a'"):
        samples(load_task(str(tmp_path / "t.jsonl")))


# -- runs


def records(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda r: int(r["id"].removeprefix("sample_")))


def test_generation_and_choices_against_the_library(cli: Cli, llm: LLM, tmp_path: Path) -> None:
    """The same questions through `generate` and `score`; the table and the JSON say what the records say."""
    folder = tmp_path / "run"
    status, printed, err = cli(
        "eval", "reverse", "addition_choice", "-o", str(folder), "--limit", "12", "--num-fewshot", "1"
    )
    assert status == 0, err
    data = json.loads((folder / "results.json").read_text())["results"]
    assert printed.strip() == (folder / "results.md").read_text().strip()
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")

    texts = records(folder / "reverse.samples.jsonl")
    params = SamplingParams(temperature=0, max_tokens=16)
    direct = [o.outputs[0].text for o in llm.generate([r["prompt"] for r in texts], params, use_tqdm=False)]
    assert [r["output"] for r in texts] == direct
    right = [float(text == r["target"]) for text, r in zip(direct, texts, strict=True)]
    assert [r["scores"]["exact_match"] for r in texts] == right
    assert sum(right) < 12, "examples confuse this model; were all right, the test would say little"
    assert data["reverse"]["metrics"]["exact_match"]["value"] == pytest.approx(np.mean(right))
    assert data["reverse"]["metrics"]["exact_match"]["stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(12))
    assert f"|reverse        |      1|none  |     1|exact_match  |↑|{np.mean(right):.4f}|±|" in printed

    chosen = records(folder / "addition_choice.samples.jsonl")
    hits, normed = [], []
    for r in chosen:
        direct_scores = llm.score([(r["prompt"], choice) for choice in r["choices"]], use_tqdm=False)
        assert list(zip(r["logprobs"], r["is_greedy"], strict=True)) == direct_scores
        best = max(range(5), key=lambda i: direct_scores[i][0])
        by_length = max(range(5), key=lambda i: direct_scores[i][0] / len(r["choices"][i]))
        hits.append(r["choices"][best] == r["target"])
        normed.append(r["choices"][by_length] == r["target"])
    assert [r["scores"] for r in chosen] == [
        {"accuracy": float(a), "accuracy_norm": float(b)} for a, b in zip(hits, normed, strict=True)
    ]
    assert data["addition_choice"]["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(hits))


def test_continued_compared_and_refused(cli: Cli, tmp_path: Path) -> None:
    """A log that was cut off is continued; a second run is compared question by question; other settings are another
    run."""
    first, second = tmp_path / "a", tmp_path / "b"
    arguments = ["eval", "addition", "--limit", "20"]
    assert cli(*arguments, "-o", str(first))[0] == 0
    log = first / "addition.samples.jsonl"
    whole = records(log)
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:7]) + lines[7][:30])
    assert cli(*arguments, "-o", str(first))[0] == 0
    assert records(log) == whole
    assert log.read_bytes().startswith(b"".join(lines[:7]))
    status, _, err = cli("eval", "addition", "--limit", "21", "-o", str(first))
    assert status == 1 and "questions was" in err and "--restart" in err

    status, printed, _ = cli(*arguments, "-o", str(second), "--num-fewshot", "2", "--compare", str(first), "--json")
    assert status == 0
    found = json.loads(printed)["compare"]["differences"][0]
    new, old = ([r["scores"]["exact_match"] for r in records(f / "addition.samples.jsonl")] for f in (second, first))
    expected = paired_difference(new, old)
    assert found["difference"] == {
        "value": expected.value,
        "stderr": expected.stderr,
        "p_value": expected.p_value,
        "n": 20,
    }
    assert (found["value"]["value"], found["other"]["value"]) == (np.mean(new), np.mean(old))
    assert expected.value < -0.3, "examples confuse this model: the comparison must see it"
    assert json.loads(printed)["compare"]["settings"] == ["task.fewshot.count was 0 and is 2"]
    assert "\n- task.fewshot.count was 0 and is 2\n" in (second / "results.md").read_text()
    assert "|exact_match|20|" in (second / "results.md").read_text()
    for other, words in ((tmp_path / "no", "not a folder"), (tmp_path, "no results of task 'addition'")):
        status, _, err = cli(*arguments, "-o", str(first), "--compare", str(other))
        assert status == 1 and words in err


def test_failures_count_as_wrong_and_are_told_in_one_line(cli: Cli, tmp_path: Path) -> None:
    """And by the exit status; each has its reason in the results."""
    task, out = tmp_path / "mine.jsonl", tmp_path / "out"
    lines = [{"prompt": "12+30=", "target": "42"}]
    lines += [{"prompt": "x" * (300 + i), "target": "y", "id": f"long{i}"} for i in range(5)]
    task.write_text("".join(json.dumps(x) + "\n" for x in lines))
    status, printed, err = cli("eval", str(task), "-o", str(out))
    assert status == 1
    assert "|mine |      1|none  |     0|exact_match|↑|0.1667|±|0.1667|" in printed
    told = "5 of 6 questions have no answer and count as wrong (mine 5); the first, long0 of mine: prompt: 301 tokens"
    assert err.count("\n") == 1 and err.startswith(f"nanoflow eval: {told}")
    assert told in (out / "results.md").read_text()
    failures = json.loads((out / "results.json").read_text())["results"]["mine"]["failures"]
    assert [f["sample"] for f in failures] == [f"long{i}" for i in range(5)]
    assert cli("eval", str(task), "-o", str(out), "--json")[0] == 1, "nor is it forgotten when nothing is left to ask"


def test_results_say_when_and_by_what_and_keep_what_was_not_run_again(cli: Cli, tmp_path: Path) -> None:
    arguments = ["--limit", "3", "-o", str(tmp_path)]
    path = tmp_path / "results.json"
    before = datetime.now(UTC).replace(microsecond=0)
    assert cli("eval", "addition", "sort", *arguments)[0] == 0
    first = json.loads(path.read_text())["results"]
    for name in ("addition", "sort"):
        found = first[name]
        assert before <= datetime.fromisoformat(found["date"]) <= datetime.now(UTC)
        assert found["versions"]["jax"] == jax.__version__ and found["versions"]["nanoflow_jax"] == __version__
        assert found["model"] == "tiny" and f"eval addition sort --limit 3 -o {tmp_path}" in found["command"]
        assert found["settings"]["deterministic"] is True and found["settings"]["task"]["name"] == name
    status, printed, _ = cli("eval", "addition", "reverse", *arguments, "--restart", "--num-fewshot", "1", "--json")
    assert status == 0
    assert set(json.loads(printed)["results"]) == {"addition", "reverse"}
    second = json.loads(path.read_text())["results"]
    assert second["sort"] == first["sort"] and set(second) == {"addition", "reverse", "sort"}
    assert second["addition"]["fewshot"] == 1 and second["addition"]["settings"]["task"]["fewshot"]["count"] == 1
    assert "Of earlier runs, in results.json: sort" in (tmp_path / "results.md").read_text()
    path.write_text("[]")
    status, _, err = cli("eval", "lookup", *arguments)
    assert status == 1 and "results.json" in err and err.count("\n") == 1
    assert not (tmp_path / "lookup.samples.jsonl").exists(), "told before the work"


def test_a_single_question_gives_json(cli: Cli, tmp_path: Path) -> None:
    assert cli("eval", "addition", "--limit", "1", "-o", str(tmp_path))[0] == 0

    def refused(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=refused)
    assert found["results"]["addition"]["metrics"]["exact_match"]["stderr"] is None


def test_wrong_usage(cli: Cli, tmp_path: Path) -> None:
    assert cli("eval", flags=False)[0] == 2
    assert cli("eval", "addition", flags=False)[0] == 2
    listed = cli("eval", "--list", flags=False)[1]
    assert [line.split()[0] for line in listed.splitlines()] == task_names()
    out = str(tmp_path / "o")
    for arguments, words in (
        (["chess", "-o", out], "'chess'"),
        (["addition", "-o", out, "--limit", "0"], "--limit"),
        (["addition", "-o", out, "--num-fewshot", "-1"], "--num-fewshot"),
        (["addition", "addition", "-o", out], "same name"),
        (["addition", "-o", out, "--compare", out], "--compare"),
    ):
        status, printed, err = cli("eval", *arguments)
        assert (status, printed) == (1, "")
        assert words in err and err.count("\n") == 1


def test_extraction(tmp_path: Path) -> None:
    """The first or the last match, a group of it; none is wrong, and no failure."""
    from nanoflow_jax.engine.request import CompletionOutput, RequestMetrics, RequestOutput

    def judged(text: str, reason: str = "stop", **extract: Any) -> tuple[Any, float, Any]:
        task = load_task(write_task(tmp_path, extract={"regex": "=([0-9]+)", **extract}, target=["7", "8"]))
        sample = samples(task)[0]
        done = CompletionOutput(0, text, [], reason, error="broken" if reason == "error" else None, content=text)
        fields, found, error = judge_text(task, sample, RequestOutput("0", "", [], [done], RequestMetrics(0.0)))
        return fields.get("answer"), found["exact_match"], error

    assert judged("a=7, b=9") == ("7", 1.0, None)
    assert judged("a=7, b=9", match="last") == ("9", 0.0, None)
    assert judged("a=7, b=8", match="last") == ("8", 1.0, None)
    assert judged("a=7", group=0) == ("=7", 0.0, None)
    assert judged("nothing") == (None, 0.0, None)
    assert judged("a=7", reason="error") == (None, 0.0, "broken")


def test_scores_of_several_outputs() -> None:
    """pass@k against all ways to draw k of n; majority by votes, those of a tie shared."""
    for n in range(1, 7):
        for right in range(n + 1):
            outputs = [True] * right + [False] * (n - right)
            for k in range(1, n + 1):
                drawn = list(itertools.combinations(outputs, k))
                assert pass_at(k, n, right) == pytest.approx(sum(map(any, drawn)) / len(drawn)), (k, n, right)
    assert majority(["4", " 4", "5", None, None, None], ["4"]) == 1.0
    assert majority(["4", "5", "5"], ["4"]) == 0.0
    assert majority(["4", "5"], ["4"]) == majority(["4", "5"], ["5"]) == 0.5
    assert majority([None, None], ["4"]) == 0.0
    answers = ["4", "x", None, "4"]
    metrics = ("exact_match", "pass@1", "pass@2", "pass@4", "majority", "contains")
    wanted = {"exact_match": 0.5, "pass@1": 0.5, "pass@2": 5 / 6, "pass@4": 1.0, "majority": 1.0, "contains": 0.5}
    assert score_outputs(metrics, answers, ["4", "y"]) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "form",
    [
        {"structured_outputs": {"choice": ["7", "42"]}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "sum", "schema": {"enum": [7, 42]}}}},
    ],
    ids=lambda form: next(iter(form)),
)
def test_answers_of_a_form(cli: Cli, tmp_path: Path, form: dict[str, Any]) -> None:
    """As a batch file's body says it; another form is another run, and a bad one is told before the folder is made."""
    pytest.importorskip("llguidance", reason="needs the structured extra")
    generate = {"max_tokens": 40, "temperature": 0}
    out = tmp_path / "run"
    assert cli("eval", write_task(tmp_path, generate=generate | form), "-o", str(out))[0] == 0
    found = [r["output"] for r in records(out / "mine.samples.jsonl")]
    assert len(found) == 6 and set(found) <= {"7", "42"}
    status, _, err = cli("eval", write_task(tmp_path, generate=generate), "-o", str(out))
    assert status == 1 and f"task.generate.{next(iter(form))} was" in err
    bad = write_task(tmp_path, generate={"structured_outputs": {"regex": "("}})
    status, _, err = cli("eval", bad, "-o", str(tmp_path / "bad"))
    assert status == 1 and "generate.structured_outputs: regex" in err and not (tmp_path / "bad").exists()


def test_a_task_with_several_outputs(cli: Cli, llm: LLM, tmp_path: Path) -> None:
    """All outputs are in the log; the figures are those of `generate`, with the errors of means over questions."""
    task = write_task(
        tmp_path, generate={"n": 6, "temperature": 2.5, "max_tokens": 3}, metrics=["exact_match", "pass@4", "majority"],
        data={"problems": "addition", "split": "test", "seed": 1, "count": 12},
    )  # fmt: skip
    status, printed, err = cli("eval", str(task), "-o", str(tmp_path / "run"))
    assert status == 0, err
    log = records(tmp_path / "run" / "mine.samples.jsonl")
    for number, record in enumerate(log):
        params = SamplingParams(n=6, temperature=2.5, max_tokens=3, seed=number)
        (direct,) = llm.generate(record["prompt"], params, use_tqdm=False)
        assert record["output"] == [o.text for o in direct.outputs]
        assert record["finish_reason"] == [o.finish_reason for o in direct.outputs]
        right = sum(text.strip() == record["target"] for text in record["output"])
        assert record["scores"]["exact_match"] == pytest.approx(right / 6)
        assert record["scores"]["pass@4"] == pytest.approx(1 - math.comb(6 - right, 4) / math.comb(6, 4))
    assert len({s["scores"]["pass@4"] for s in log}) > 2, "some are always right, some never, some at times"
    data = json.loads((tmp_path / "run" / "results.json").read_text())["results"]["mine"]["metrics"]
    for metric, found in data.items():
        scores = [r["scores"][metric] for r in log]
        assert found["value"] == pytest.approx(np.mean(scores))
        assert found["stderr"] == pytest.approx(np.std(scores, ddof=1) / math.sqrt(12))
        assert f"|{metric}" in printed


def test_pictures_show_the_figures() -> None:
    results = [TaskResult("t", "1", "none", 0, {"exact_match": mean([1, 0, 1, 1])}, (Failure("3", "x"),))]
    other = Comparison(
        "t", "exact_match", mean([1, 0, 1, 1]), mean([0, 0, 1, 1]), paired_difference([1, 0, 1, 1], [0, 0, 1, 1]), 0
    )
    figure = plot_results(results, compared=[other], title="tiny")
    patches: list[Any] = list(figure.axes[0].patches)
    bars = [bar.get_width() for bar in patches]
    assert bars == [0.75, 0.5]
    assert [line.get_xdata()[0] for line in figure.axes[1].lines][:1] == [0.25]  # type: ignore[index]
    assert [text.get_text() for text in figure.axes[1].texts] == ["+0.25"]
    worse = Comparison("t", "exact_match", mean([0] * 4), mean([1] * 4), paired_difference([0] * 4, [1] * 4), 0)
    (mark,) = plot_results(results, compared=[worse]).axes[1].texts
    assert (mark.get_text(), mark.get_color()) == ("-1.00 worse", LOSS)
    single = plot_results([TaskResult("t", "1", "none", 0, {"f1": mean([1.0])}, ())])
    assert len(single.axes) == 1
    assert "N/A" in results_table([TaskResult("t", "1", "none", 0, {"f1": mean([1.0])}, ())])


def test_comparisons_that_pair_nothing(tmp_path: Path) -> None:
    def write(folder: str, ids: list[str], target: str = "y") -> Path:
        (tmp_path / folder).mkdir()
        lines = [
            {"id": f"sample_{i}", "error": None, "sample": s, "target": target, "scores": {"f1": 1.0}}
            for i, s in enumerate(ids)
        ]
        (tmp_path / folder / "t.samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return tmp_path / folder

    mine = write("a", ["1", "2", "3"])
    assert compare("t", ["f1"], mine, write("b", ["2", "3", "4"]))[0].unpaired == 2
    with pytest.raises(ConfigError, match="none of this run's questions"):
        compare("t", ["f1"], mine, write("c", ["9"]))
    with pytest.raises(ConfigError, match="another target"):
        compare("t", ["f1"], mine, write("d", ["1"], "z"))
    with pytest.raises(ConfigError, match="was not judged by 'accuracy'"):
        compare("t", ["accuracy"], mine, write("e", ["1"]))
