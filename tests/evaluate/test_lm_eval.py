"""The model "nanoflow" of lm-evaluation-harness, on the tiny model and local tasks."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from functools import partialmethod
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the lm-eval extra)")

import datasets.config
import lm_eval
from huggingface_hub import constants
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.cli import main
from nanoflow_jax.config import ConfigError
from nanoflow_jax.evaluate import lm_eval as adapter
from nanoflow_jax.evaluate.journal import Journal
from nanoflow_jax.evaluate.lm_eval import NanoflowLM
from nanoflow_jax.evaluate.manifest import Manifest
from nanoflow_jax.evaluate.prompts import samples
from nanoflow_jax.evaluate.report import TaskResult, summarize
from nanoflow_jax.evaluate.run_task import run_task
from nanoflow_jax.evaluate.tasks import load_task
from nanoflow_jax.weights import hub
from tools import nightly_data

LENGTH = 128  # of the shared model
SUMS = [(a, a + 7) for a in range(10, 46, 6)]


@pytest.fixture(scope="module")
def lm(llm: LLM) -> NanoflowLM:
    return NanoflowLM(llm=llm)


def instances(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_the_model_is_registered() -> None:
    assert get_model("nanoflow") is NanoflowLM


def test_loglikelihoods_are_scores(lm: NanoflowLM, llm: LLM) -> None:
    pairs = [("12+30=", "42"), ("12+30=", "43"), ("12+30= ", "42"), ("", "sort")]
    found = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    # lm-eval gives a space at the end of the context to the continuation.
    wanted = llm.score([pairs[0], pairs[1], ("12+30=", " 42"), pairs[3]], use_tqdm=False)
    assert [f[1] for f in found] == [w[1] for w in wanted] == [True, False, False, False]
    assert [f[0] for f in found] == pytest.approx([w[0] for w in wanted], abs=2e-3)
    assert found[0][0] > found[1][0] + 1


def test_a_context_that_is_too_long_loses_its_beginning(lm: NanoflowLM, llm: LLM) -> None:
    context = "sort 9876=6789\n" * 20
    tokens = llm.tokenizer.encode(context + "12+30=42", True)
    border = len(llm.tokenizer.encode(context + "12+30=", True))
    kept = tokens[-(LENGTH - 1) :]
    cut = len(tokens) - len(kept)
    found = lm.loglikelihood(instances("loglikelihood", (context + "12+30=", "42")), disable_tqdm=True)
    wanted = llm.score([(kept[: border - cut], kept[border - cut :])], use_tqdm=False)
    assert found[0][0] == pytest.approx(wanted[0][0], abs=2e-3) and found[0][1] == wanted[0][1]
    with pytest.raises(ValueError, match="accepted: at most 126"):
        lm.loglikelihood(instances("loglikelihood", ("1", "2" * 150)), disable_tqdm=True)


def test_rolling_scores_every_token_once_after_what_fits(lm: NanoflowLM, llm: LLM) -> None:
    texts = ["12+30=42", "reverse abc=cba\nsort 321=123\n" * 11]
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", *[(t,) for t in texts]), disable_tqdm=True)
    first, most = llm.tokenizer.first_token_id, LENGTH - 2
    for text, value in zip(texts, found, strict=True):
        tokens = llm.tokenizer.encode(text, False)
        wanted, scored = 0.0, 0
        while scored < len(tokens):  # windows that end where the text, or the room, ends
            stop = min(scored + most, len(tokens))
            start = max(0, stop - most - 1) if scored else 0
            window = tokens[start:stop] if scored else [first, *tokens[start:stop]]
            output = llm.generate([window], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)[0]
            assert output.prompt_logprobs is not None
            steps = list(zip(window[1:], output.prompt_logprobs[1:], strict=True))[-(stop - scored) :]
            wanted += sum(step[token].logprob for token, step in steps if step is not None)
            scored = stop
        assert value == pytest.approx(wanted, rel=1e-3)
    assert len(llm.tokenizer.encode(texts[1], False)) > 2 * most


def test_generation_obeys_its_settings(lm: NanoflowLM) -> None:
    asked = [
        ("reverse abcdef=", {"until": ["c"], "max_gen_toks": 20}),
        ("reverse abcdef=", {"until": "\n", "max_gen_toks": 2, "do_sample": False, "temperature": 0.8}),
        ("12+30=", {"until": [], "do_sample": True, "temperature": 3.0, "max_gen_toks": 12}),
        ("12+30=", {"until": [], "do_sample": True, "temperature": 3.0, "max_gen_toks": 12}),
        ("sort 54321=12345\n" * 12 + "12+30=", {"until": ["\n"], "max_gen_toks": 8}),
    ]
    found = lm.generate_until(instances("generate_until", *asked), disable_tqdm=True)
    assert found[:2] == ["fed", "fe"]
    assert found[2] != found[3], "each sample has noise of its own"
    assert found[4] == "42", "of a context that is too long, the end counts"
    assert lm.generate_until(instances("generate_until", *asked), disable_tqdm=True) == found
    neutral = {"until": ["c"], "max_gen_toks": 20, "num_beams": 1, "length_penalty": 1.0, "typical_p": None}
    assert lm.generate_until(instances("generate_until", ("reverse abcdef=", neutral)), disable_tqdm=True) == ["fed"]
    with pytest.raises(ValueError, match=r"^gen_kwargs: 'num_beams' is not supported; accepted: "):
        lm.generate_until(instances("generate_until", ("1", {"num_beams": 4})), disable_tqdm=True)
    with pytest.raises(ValueError, match=r"^max_gen_toks: 128 leave no room"):
        lm.generate_until(instances("generate_until", ("1", {"max_gen_toks": LENGTH})), disable_tqdm=True)


def test_a_chat_has_one_first_token(lm: NanoflowLM, llm: LLM) -> None:
    text = lm.apply_chat_template([{"role": "user", "content": "What is 25+17?"}])
    first = llm.tokenizer.first_token_id
    assert lm.tok_encode(text).count(first) == 1
    assert lm.tok_encode("12").count(first) == 1
    assert lm.chat_template(True) and "tiny_llama" in lm.tokenizer_name
    assert lm.generate_until(instances("generate_until", (text, {"max_gen_toks": 12}))) == ["25+17=42"]


def test_wrong_model_arguments_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^model_args: no option 'pages'; did you mean page_size\?$"):
        NanoflowLM("tiny", pages=3)


# -- whole evaluations, from local files


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a generation task and a choice task of the same sums."""
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b), "wrong": [str(a + b + 1), str(a + b - 9)]} for a, b in SUMS]
    rows[-1].update(answer=rows[-1]["wrong"][0], wrong=[rows[-1]["answer"], "1"])  # the model gets it wrong
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / "datasets"}}}
test_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
"""
    (tmp_path / "sums.yaml").write_text(
        f"""task: sums{shared}output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
    (tmp_path / "choices.yaml").write_text(
        f"""task: choices{shared}output_type: multiple_choice
doc_to_target: 0
doc_to_choice: "{{{{[answer] + wrong}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return tmp_path


def of_nanoflow_eval(llm: LLM, folder: Path, name: str) -> TaskResult:
    """The same questions as a task of `nanoflow eval`."""
    choices = 'choices: ["{{ answer }}", "{{ wrong[0] }}", "{{ wrong[1] }}"]\nmetrics: [accuracy]'
    texts = 'generate: {max_tokens: 8, temperature: 0, stop: "\\n"}\nmetrics: [exact_match]'
    path = folder / f"ours_{name}.yaml"
    path.write_text(
        f'data: {{file: {folder / "sums.jsonl"}}}\nprompt: "{{{{ question }}}}"\ntarget: "{{{{ answer }}}}"\n'
        + (choices if name == "choices" else texts)
    )
    task, log = load_task(str(path)), folder / f"ours_{name}.samples.jsonl"
    with Journal.open(log, Manifest("eval", {})) as journal:
        run_task(llm, task, samples(task), journal, progress=False)
    return summarize(task, log)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")  # of datasets and sqlitedict
def test_scores_are_those_of_nanoflow_eval_and_come_from_the_cache(lm: NanoflowLM, llm: LLM, tasks: Path) -> None:
    def evaluate() -> dict[str, Any]:
        found = cast(Any, simple_evaluate)(
            model=lm,
            tasks=["sums", "choices"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            use_cache=str(tasks / "answers"),
            bootstrap_iters=100,
        )
        assert found is not None
        return found["results"]

    results = evaluate()
    for name, metric, ours in (("sums", "exact_match", "exact_match"), ("choices", "acc", "accuracy")):
        wanted = of_nanoflow_eval(llm, tasks, name).metrics[ours]
        assert results[name][f"{metric},none"] == pytest.approx(wanted.value)
        assert results[name][f"{metric}_stderr,none"] == pytest.approx(wanted.stderr)
        assert wanted.value == (len(SUMS) - 1) / len(SUMS)
    steps = llm.engine.num_steps
    assert evaluate() == results
    assert llm.engine.num_steps == steps, "nothing is computed again"


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_the_command_line_prints_the_table(
    llm: LLM, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}

    def make(model: str, **options: Any) -> LLM:
        given.update(options, model=model)
        return llm

    monkeypatch.setattr(adapter, "LLM", make)
    # lm-eval's own tasks are thousands of files.
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    before = list(sys.argv)
    arguments = ["--model_args", "pretrained=tiny,page_size=16", "--tasks", "sums", "--include_path", str(tasks)]
    assert main(["lm-eval", *arguments, "--limit", "4"]) == 0
    assert given == {"model": "tiny", "page_size": 16}
    printed = capsys.readouterr().out
    assert "|sums |" in printed and "|exact_match|↑  |    1|±  |     0|" in printed
    assert sys.argv == before


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_the_tasks_of_every_night_run_on_stand_ins(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own gsm8k and mmlu, as in the dry run of docs/nightly.md: no Hub is asked, and targets are right."""
    nightly_data.write_both(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    own = Path(lm_eval.__file__).parent / "tasks"
    found = cast(Any, simple_evaluate)(
        model=NanoflowLM(llm=llm, max_gen_toks=8),
        tasks=["gsm8k", "mmlu_anatomy"],
        num_fewshot=1,
        limit=3,
        task_manager=TaskManager(include_path=[str(own / "gsm8k"), str(own / "mmlu/default")], include_defaults=False),
        bootstrap_iters=10,
    )
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} <= set(found["results"]["gsm8k"])
    assert len(nightly_data.subjects()) == 57 and "acc,none" in found["results"]["mmlu_anatomy"]
    for sample in found["samples"]["gsm8k"]:
        asked, right = (re.findall(r"\d+", sample["doc"][name]) for name in ("question", "answer"))
        assert int(asked[0]) + int(asked[1]) == int(right[-1]) and "#### " in sample["target"]
    for sample in found["samples"]["mmlu_anatomy"]:
        asked = re.findall(r"\d+", sample["doc"]["question"])
        assert sample["doc"]["choices"][sample["target"]] == str(int(asked[0]) + int(asked[1]))


def test_a_hub_that_cannot_be_reached_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its clients then ask it no more: they would for a minute and a half, with two lines each time."""
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # so that it is put back
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert not hub.go_offline_without_hub()
        assert "HF_HUB_OFFLINE" not in os.environ
    started = time.monotonic()
    with pytest.raises(SystemExit):
        main(["lm-eval", "ls", "--no-such-option"])
    assert time.monotonic() - started < 30
    assert capsys.readouterr().err.startswith("the Hub cannot be reached: tasks and models come from the local cache")
    assert os.environ["HF_HUB_OFFLINE"] == "1" and constants.HF_HUB_OFFLINE
    assert not hub.go_offline_without_hub(), "who has set it has decided"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:1"})
    assert not hub.go_offline_without_hub()
