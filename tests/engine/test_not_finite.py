"""Logits that are not finite end the request they belong to, with an error that says so, and nobody else's.

The model is "tiny" with an output head of its own and NaN in the embedding of one byte: whoever's text holds it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nanoflow_jax import LLM, SamplingParams, generate
from nanoflow_jax.evaluate.journal import Journal
from nanoflow_jax.evaluate.manifest import Manifest
from nanoflow_jax.evaluate.prompts import samples
from nanoflow_jax.evaluate.report import summarize
from nanoflow_jax.evaluate.run_task import run_task
from nanoflow_jax.evaluate.tasks import load_task
from nanoflow_jax.weights.hub import resolve_model
from tests.engine.engine_driver import tokens

pytestmark = pytest.mark.usefixtures("no_leak")

BAD = ord("~")
OPTIONS: dict[str, Any] = {
    "tensor_parallel_size": 2, "max_model_len": 128, "decode_slots": 8, "tokens_per_step": 48, "page_size": 8,
    "kv_cache_tokens": 1024, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken") / "tiny"
    shutil.copytree(resolve_model("tiny"), folder)
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.copy()
    embedding[BAD, 3] = np.nan
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, **OPTIONS)


def load() -> tuple[list[str], list[SamplingParams]]:
    """Thirty ragged prompts, every kind of sampling."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 1.5, "top_k": 3, "seed": 6},
        {"temperature": 0.7, "top_p": 0.8, "min_p": 0.05, "seed": 7, "logprobs": 2},
        {"temperature": 0.0, "repetition_penalty": 1.2, "logprobs": 1},
    ]
    prompts = [f"{'sort 9876=' * (i % 4)}{i}+{3 * i}=" for i in range(30)]
    return prompts, [SamplingParams(max_tokens=4 + i % 9, ignore_eos=True, **kinds[i % 5]) for i in range(30)]


def spoilt(prompt: str, i: int) -> str:
    """The bad byte at the start, in the middle or at the end."""
    at = (0, len(prompt) // 2, len(prompt))[i % 3]
    return prompt[:at] + chr(BAD) + prompt[at:]


def test_only_they_end_and_they_say_why(llm: LLM) -> None:
    """Twice: the second time they get pages in which others have left NaN."""
    prompts, params = load()
    calm = tokens(llm.generate(prompts, params, use_tqdm=False))
    spoils = [i % 4 == 1 for i in range(30)]
    some = [spoilt(p, i) if bad else p for i, (p, bad) in enumerate(zip(prompts, spoils, strict=True))]
    for _ in range(2):
        for i, (output, bad) in enumerate(zip(llm.generate(some, params, use_tqdm=False), spoils, strict=True)):
            done = output.outputs[0]
            if not bad:
                assert (done.token_ids, done.error) == (calm[i], None)
                continue
            assert (done.finish_reason, done.text, done.token_ids) == ("error", "", [])
            length = len(output.prompt_token_ids)
            assert done.error == (
                f"NotFinite: after {length} tokens, the logits are not finite, or none is that of an allowed token"
            )


def test_what_was_good_until_then_is_kept(llm: LLM) -> None:
    forced = SamplingParams(temperature=0.0, max_tokens=8, allowed_token_ids=[BAD], logprobs=0)
    done = llm.generate("12+30=", forced, use_tqdm=False)[0].outputs[0]
    assert (done.finish_reason, done.text, done.token_ids) == ("error", "~", [BAD])
    assert done.logprobs is not None
    assert len(done.logprobs) == 1
    assert done.error is not None
    assert "after 8 tokens" in done.error


def test_their_pages_are_not_found_again(llm: LLM) -> None:
    """But those of a good prefix that others share are."""
    start, one = "lookup a=1 b=2 c=3 d=4: ", SamplingParams(temperature=0.0, max_tokens=2)
    llm.generate(start, one, use_tqdm=False)
    for ending in ("~ and more of it", "~ and more of it"):
        output = llm.generate(start + ending, one, use_tqdm=False)[0]
        assert output.outputs[0].finish_reason == "error"
        assert output.metrics.num_cached_tokens <= len(start)
    again = llm.generate(start, one, use_tqdm=False)[0].outputs[0]
    assert again.error is None
    # Neither what filled up while it was generated.
    forced = SamplingParams(temperature=0.0, max_tokens=40, logit_bias={BAD: 100}, min_tokens=20)
    assert llm.generate("sort 31=", forced, use_tqdm=False)[0].outputs[0].finish_reason == "error"
    assert llm.generate("sort 31=" + "~" * 16, one, use_tqdm=False)[0].metrics.num_cached_tokens <= 8


def test_who_shares_their_pages_is_computed_again(llm: LLM) -> None:
    """Those that come in the next step, with the start of the prompt in common, find pages in which there is NaN."""
    start = "sort 9876=6789\nreverse abc="  # three pages; a step has rows for a prompt and a half
    one = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=0)
    params = [one, replace(one, prompt_logprobs=None), replace(one, prompt_logprobs=None)]
    calm = [llm.generate(start + ending, p, use_tqdm=False)[0] for ending, p in zip("x12", params, strict=True)]
    llm.engine.scheduler.pool.reset()
    prompts = [start + "~", start + "1", start + "2"]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "error"
    assert tokens(outputs[1:]) == tokens(calm[1:])
    assert [o.metrics.num_preemptions for o in outputs] == [0, 0, 1]
    assert [o.metrics.num_cached_tokens for o in outputs] == [0, 0, 24]


def test_a_stream_goes_on(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6)
    ended = {o.prompt: o.outputs[0] for o in llm.stream(["12+30=", "12+~=", "47+85="], params) if o.finished}
    assert [ended[p].text for p in ("12+30=", "47+85=")] == ["42", "132"]
    assert ended["12+~="].finish_reason == "error"


def test_scores(llm: LLM) -> None:
    pairs = [("12+30=", "42"), ("1~2+30=", "42"), ("12+30=", "43"), ("12+30=", "4~2")]
    good = llm.score([pairs[0], pairs[2]], use_tqdm=False)
    with pytest.raises(RuntimeError, match="pair 1: NotFinite: the logits of the prompt are not finite"):
        llm.score(pairs, use_tqdm=False)
    assert llm.last_scores == [good[0], None, good[1], None]
    wanted = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=1)
    outputs = llm.generate(["12+30=", "1~2+30="], wanted, use_tqdm=False)
    assert [o.outputs[0].text for o in outputs] == ["42", ""]
    assert outputs[1].outputs[0].error == "NotFinite: the logits of the prompt are not finite"


def test_preempted_ones_end_too(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose bad token arrives when it has no slot any more."""
    real, moved = llm.engine.scheduler.schedule, []

    def schedule() -> Any:
        run = llm.engine.running
        for slot in np.flatnonzero(run.active & (run.length > run.known)).tolist():
            if run.requests[slot] not in moved:
                moved.append(llm.engine.scheduler.preempt(slot))
        return real()

    monkeypatch.setattr(llm.engine.scheduler, "schedule", schedule)
    params = SamplingParams(temperature=0.0, max_tokens=6)
    outputs = llm.generate(["12+30=", "12+~=", "47+85="], params, use_tqdm=False)
    assert len(moved) == 3
    assert [o.outputs[0].text for o in outputs] == ["42", "", "132"]
    assert outputs[1].outputs[0].finish_reason == "error"


# -- the commands


def test_generate_says_so(folder: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow_jax.api.LLM", lambda *_, **__: llm)
    assert generate(folder, ["12+30="], max_tokens=4) == ["42"]
    with pytest.raises(RuntimeError, match="prompt 1: NotFinite: "):
        generate(folder, ["12+30=", "~"], max_tokens=4)


@pytest.fixture
def command(
    llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    from nanoflow_jax.cli import main

    monkeypatch.setattr("nanoflow_jax.api.LLM", lambda *_, **__: llm)

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        status = main([name, *arguments, "--model", str(folder), "--quiet"])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_the_command_says_so(command: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = command("generate", "12+30=", "~=", "--json")
    good, bad = map(json.loads, out.splitlines())
    assert (status, good["text"], bad["finish_reason"]) == (1, "42", "error")
    assert bad["error"] in err
    assert err.startswith("nanoflow generate: prompt 2: NotFinite: after ")
    assert err.count("\n") == 1


def test_a_batch_records_it(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """And keeps the record: a second run has nothing to do."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [{"prompt": "12+30="}, {"prompt": "~+30=", "temperature": 1, "logprobs": 2}, {"prompt": "47+85="}]
    source.write_text("".join(json.dumps(b) + "\n" for b in bodies))
    for _ in range(2):
        status, out, _ = command("batch", "-i", str(source), "-o", str(target))
        assert (status, "3 lines: 2 answered, 1 with an error" in out) == (0, True)
    records = {r["id"]: r for r in map(json.loads, target.read_text().splitlines())}
    assert records["batch_req_2"]["error"]["message"].startswith("NotFinite: ")
    texts = [records[f"batch_req_{i}"]["response"]["body"]["choices"][0]["text"] for i in (1, 3)]
    assert texts == ["42", "132"]


def test_no_choice_is_right_by_chance(llm: LLM, tmp_path: Path) -> None:
    rows = [
        {"q": "12+30=", "a": "42", "b": "43"},
        {"q": "12+~=", "a": "5", "b": "6"},
        {"q": "1+1=", "a": "2", "b": "~~"},
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        f'data: {{file: {tmp_path / "sums.jsonl"}}}\nprompt: "{{{{ q }}}}"\ntarget: "{{{{ a }}}}"\n'
        'choices: ["{{ a }}", "{{ b }}"]\nmetrics: [accuracy]\n'
    )
    task, log = load_task(str(tmp_path / "sums.yaml")), tmp_path / "sums.samples.jsonl"
    with Journal.open(log, Manifest("eval", {})) as journal:
        run_task(llm, task, samples(task), journal, progress=False)
    result = summarize(task, log)
    assert result.metrics["accuracy"].value == pytest.approx(1 / 3)
    assert len(result.failures) == 2
    assert all("NotFinite" in failure.error for failure in result.failures)
    json.loads(log.read_text().splitlines()[-1], parse_constant=lambda name: pytest.fail(name))


def test_lm_eval_stops_and_keeps_what_was_good(llm: LLM) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the lm-eval extra)")
    from lm_eval.api.instance import Instance

    from nanoflow_jax.evaluate.lm_eval import NanoflowLM

    def asked(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
        return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]

    lm, kept = NanoflowLM(llm=llm), []
    lm.cache_hook = SimpleNamespace(dbdict=None, add_partial=lambda kind, key, value: kept.append((kind, value)))  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="pair 0: NotFinite"):
        lm.loglikelihood(asked("loglikelihood", ("1~+30=", "42"), ("12+30=", "42")), disable_tqdm=True)
    with pytest.raises(RuntimeError, match="NotFinite"):
        lm.generate_until(
            asked(
                "generate_until",
                ("~=", {"until": ["\n"], "max_gen_toks": 8}),
                ("12+30=", {"until": ["\n"], "max_gen_toks": 8}),
            ),
            disable_tqdm=True,
        )
    assert [kind for kind, _ in kept] == ["loglikelihood", "generate_until"]
    assert kept[1][1] == "42"
