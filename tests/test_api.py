"""`LLM` and `generate` as a user calls them, on the embedded model: what comes back, and what is refused and how."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nanoflow_jax
from nanoflow_jax import LLM, SamplingParams, api, generate
from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine import setup
from nanoflow_jax.engine.request import RequestOutput
from nanoflow_jax.generation_config import end_tokens, generation_defaults
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.tokenizer import Tokenizer
from nanoflow_jax.weights.hub import resolve_model

TINY = resolve_model("tiny")
SMALL: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "max_model_len": 512,
    "decode_slots": 8,
    "tokens_per_step": 72,
    "page_size": 16,
    "kv_cache_tokens": 4096,
    "progress": False,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny", **SMALL)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [o.outputs[0].text for o in outputs]


def one_line(error: pytest.ExceptionInfo[BaseException], *words: str) -> None:
    message = str(error.value)
    assert message
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not named by: {message}"


# -- generate


def test_generate(capsys: pytest.CaptureFixture[str]) -> None:
    """One line of Python: strings in order, and not a word on the terminal."""
    assert generate("tiny", ["12+30=", "25+25="], max_tokens=8, **SMALL) == ["42", "50"]
    assert capsys.readouterr() == ("", "")


def test_generate_gives_options_to_whom_they_belong(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling options to SamplingParams, the rest to LLM, the seed to both; a lone string is one prompt."""
    made: list[tuple[Any, dict[str, Any]]] = []
    asked: list[SamplingParams] = []

    def make(model: Any, **options: Any) -> LLM:
        made.append((model, options))
        return llm

    original = llm.default_sampling_params
    monkeypatch.setattr(llm, "default_sampling_params", lambda **o: asked.append(original(**o)) or asked[-1])
    monkeypatch.setattr(api, "LLM", make)
    assert generate("tiny", ["12+30="], max_tokens=8) == ["42"]
    assert generate("tiny", "12+30=", max_tokens=8, top_k=3, seed=9, page_size=32) == ["42"]
    assert made == [("tiny", {"progress": False}), ("tiny", {"progress": False, "seed": 9, "page_size": 32})]
    assert asked[1] == SamplingParams(temperature=0.0, max_tokens=8, top_k=3, seed=9)


def test_prompts_of_every_kind(llm: LLM) -> None:
    """Text, token ids (also NumPy's), a list of either or both: the same prompt gives the same answer."""
    ids = llm.tokenizer.encode("12+30=", add_special_tokens=True)
    assert ids[0] == BOS
    as_text: list[Any] = ["12+30=", ["12+30="]]
    as_ids: list[Any] = [ids, tuple(ids), np.array(ids), [ids], [np.array(ids)]]
    for form in as_text + as_ids:
        (output,) = llm.generate(form, GREEDY, use_tqdm=False)
        assert output.outputs[0].text == "42"
        assert output.prompt_token_ids == ids
        assert output.prompt == ("12+30=" if any(form is f for f in as_text) else None)
    mixed = llm.generate(["12+30=", ids, "25+25=", tuple(ids)], GREEDY, use_tqdm=False)
    assert texts(mixed) == ["42", "42", "50", "42"]
    assert [o.prompt for o in mixed] == ["12+30=", None, "25+25=", None]
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_order_is_kept_whatever_ends_first(llm: LLM) -> None:
    """Thirty prompts, lengths 2 to 60, of one to twelve new tokens, on eight slots."""
    prompts = [f"sort {'7351'[: 1 + i % 4] * (1 + (i * 7) % 13)}=" for i in range(30)]
    params = [SamplingParams(temperature=0.0, max_tokens=1 + (i * 5) % 12) for i in range(30)]
    together = llm.generate(prompts, params, use_tqdm=False)
    assert [o.prompt for o in together] == prompts
    for i in range(0, 30, 7):
        (alone,) = llm.generate(prompts[i], params[i], use_tqdm=False)
        assert together[i].outputs[0].token_ids == alone.outputs[0].token_ids


def test_params_per_prompt(llm: LLM) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (1, 5, 3)]
    outputs = llm.generate(["12+30="] * 3, params, use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 5, 3]


def test_output_fields(llm: LLM) -> None:
    one, two = llm.generate(["12+30=", "25+25="], GREEDY, use_tqdm=False)
    assert one.request_id != two.request_id
    assert one.prompt == "12+30="
    assert one.prompt_token_ids == [BOS, *b"12+30="]
    assert one.prompt_logprobs is None
    (done,) = one.outputs
    assert (done.index, done.text, done.finish_reason, done.stop_reason) == (0, "42", "stop", None)
    assert done.token_ids == [*b"42", EOS]
    assert done.logprobs is None
    assert done.cumulative_logprob is None
    metrics = one.metrics
    assert metrics.first_token_time is not None
    assert metrics.finished_time is not None
    assert metrics.arrival_time < metrics.first_token_time < metrics.finished_time
    assert metrics.num_preemptions == 0


def test_text_options(llm: LLM) -> None:
    """detokenize and skip_special_tokens are applied; stop_token_ids end a request and are no part of the text."""
    on = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, skip_special_tokens=False)
    off = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    silent = SamplingParams(temperature=0.0, max_tokens=3, detokenize=False)
    stop = SamplingParams(temperature=0.0, max_tokens=3, stop_token_ids=[ord("2")])
    outputs = llm.generate(["12+30="] * 4, [on, off, silent, stop], use_tqdm=False)
    assert texts(outputs) == ["42<|end_of_text|>", "42", "", "4"]
    assert outputs[2].outputs[0].token_ids == [*b"42", EOS]
    assert outputs[3].outputs[0].token_ids == [*b"42"]
    assert outputs[3].outputs[0].stop_reason == ord("2")


def test_sampling_is_applied(llm: LLM) -> None:
    """A hot request differs from seed to seed and repeats with its seed; top_k=1 makes it greedy again."""
    hot = [SamplingParams(temperature=3.0, seed=s, max_tokens=12, ignore_eos=True) for s in (1, 2, 1)]
    cold = SamplingParams(temperature=3.0, top_k=1, seed=1, max_tokens=8)
    a, b, c, greedy = llm.generate(["12+30="] * 4, [*hot, cold], use_tqdm=False)
    assert a.outputs[0].token_ids == c.outputs[0].token_ids != b.outputs[0].token_ids
    assert greedy.outputs[0].text == "42"


def test_progress_goes_to_stderr_and_can_be_off(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["12+30="], GREEDY)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"generating: 1/1 requests \d+ tokens/s", err)
    llm.generate(["12+30="], GREEDY, use_tqdm=False)
    assert capsys.readouterr() == ("", "")


# -- what generate refuses


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([[]], ["prompt", "empty", "at least one token"]),
        (["12+30=", []], ["prompt", "empty"]),
        ([[65] * 512], ["prompt", "512 tokens", "at most 511"]),
        (["12" * 300], ["prompt", "601 tokens", "at most 511"]),
        ([[65, 262]], ["prompt", "262", "0 to 261"]),
        ([[65, -1]], ["prompt", "-1", "0 to 261"]),
        ([[65.0, 66.0]], ["prompt", "65.0", "token ids"]),
        ([{"prompt_token_ids": [65], "lora": 1}], ["prompt", "'lora'", "prompt_token_ids"]),
        ([{"prompt_token_ids": []}], ["prompt", "empty", "at least one token"]),
        ([None], ["prompt", "None"]),
        (["half \ud83d of a pair"], ["prompt", "character 5", "UTF-8"]),
    ],
)
def test_bad_prompts(llm: LLM, monkeypatch: pytest.MonkeyPatch, prompts: Any, words: list[str]) -> None:
    """One line that names the prompt's fault, before any prompt runs, and nothing is left queued."""
    monkeypatch.setattr(llm.engine, "step", lambda: pytest.fail("a step ran"))
    with pytest.raises(ValueError) as error:
        llm.generate(["12+30=", *prompts], GREEDY, use_tqdm=False)
    one_line(error, *words)
    assert not llm.engine.has_work


def test_dicts_of_vllm(llm: LLM) -> None:
    """As what is in them; token ids come before the text that stands beside them."""
    dicts = [{"prompt": "12+30="}, {"prompt_token_ids": [256, *b"25+25="]}]
    dicts.append({"prompt": "25+25= as it was", "prompt_token_ids": [256, *b"25+25="]})
    outputs = llm.generate(dicts, GREEDY, use_tqdm=False)
    assert texts(outputs) == ["42", "50", "50"]
    assert [o.prompt for o in outputs] == ["12+30=", None, "25+25= as it was"]
    assert texts(llm.generate(dicts[0], GREEDY, use_tqdm=False)) == ["42"]
    both = llm.score([("12+30=", "42"), ({"prompt": "12+30="}, {"prompt": "42"})], use_tqdm=False)
    assert both[0] == both[1]


@pytest.mark.parametrize("call", ["generate", "stream", "score", "chat"])
def test_nothing_is_no_prompt(llm: LLM, call: str) -> None:
    with pytest.raises(ValueError) as error:
        list(getattr(llm, call)(None))
    one_line(error, {"score": "pairs", "chat": "messages"}.get(call, "prompts"), "None", "must be")


def test_tab_completion_sees_what_is_loaded_later() -> None:
    assert {"LLM", "SamplingParams", "generate"} <= {*dir(nanoflow_jax)}
    code = "import nanoflow_jax as n, sys; sys.exit(not {*n.__all__} <= {*dir(n)} or 'jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"max_tokens": 3}, ["sampling_params", "{'max_tokens': 3}", "SamplingParams"]),
        (5, ["sampling_params", "5", "SamplingParams"]),
        ([GREEDY], ["sampling_params", "1 given for 2 prompts"]),
        ([GREEDY] * 3, ["sampling_params", "3 given for 2 prompts"]),
        ([], ["sampling_params", "0 given for 2 prompts"]),
        ([GREEDY, {"max_tokens": 3}], ["sampling_params", "max_tokens", "SamplingParams"]),
        ([GREEDY, None], ["sampling_params", "None", "SamplingParams"]),
    ],
)
def test_bad_params(llm: LLM, params: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        llm.generate(["12+30=", "25+25="], params, use_tqdm=False)
    one_line(error, *words)
    assert not llm.engine.has_work


# -- the constructor


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, ["dtype", "'int8'", "'bfloat16'"]),
        ({"tensor_parallel_size": 3}, ["tensor_parallel_size", "3", "1, 2, 4, 8"]),
        ({"tensor_parallel_size": 9}, ["tensor_parallel_size", "9", "8 present", "JAX_NUM_CPU_DEVICES=9"]),
        ({"tensor_parallel_size": 0}, ["tensor_parallel_size", "0"]),
        ({"tensor_parallel_size": "2"}, ["tensor_parallel_size", "'2'"]),
        ({"plan": "no_such_plan"}, ["no_such_plan", "two_all_reduce", "two_gather_one_reduce"]),
        ({"plan": "./no_such_plan.toml"}, ["./no_such_plan.toml"]),
        ({"tokenizer": "./no/such/tokenizer"}, ["tokenizer", "./no/such/tokenizer"]),
        ({"max_model_len": 0}, ["max_model_len", "0"]),
        ({"max_model_len": 1}, ["max_model_len", "1"]),
        ({"max_model_len": 1025}, ["max_model_len", "1025", "1024"]),
        ({"max_model_len": "many"}, ["max_model_len", "'many'"]),
        ({"tokens_per_step": 0}, ["tokens_per_step", "0"]),
        ({"tokens_per_step": 70}, ["tokens_per_step = 70", "multiples of 8"]),
        ({"tokens_per_step": 64.0}, ["tokens_per_step", "64.0"]),
        ({"decode_slots": 0}, ["decode_slots", "0"]),
        ({"decode_slots": 7}, ["decode_slots", "7", "multiples of 8"]),
        ({"decode_slots": 72}, ["decode_slots", "72"]),
        ({"page_size": 0}, ["page_size", "0"]),
        ({"page_size": True}, ["page_size", "True"]),
        ({"kv_cache_tokens": 511}, ["kv_cache_tokens", "31 pages of 16", "at least 512"]),
        ({"kv_cache_tokens": -5}, ["kv_cache_tokens", "-5"]),
        ({"kv_cache_tokens": "all"}, ["kv_cache_tokens", "'all'"]),
        ({"memory_utilization": 0}, ["memory_utilization", "0"]),
        ({"memory_utilization": 1.5}, ["memory_utilization", "1.5"]),
        ({"memory_utilization": "most"}, ["memory_utilization", "'most'"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"seed": None}, ["seed", "None"]),
        ({"enable_prefix_caching": "yes"}, ["enable_prefix_caching", "'yes'", "True", "False"]),
        ({"kv_offload_gib": -1}, ["kv_offload_gib", "-1", "at least 0"]),
        ({"kv_offload_gib": "4"}, ["kv_offload_gib", "'4'"]),
        ({"kv_offload_gib": float("inf")}, ["kv_offload_gib", "inf"]),
        ({"kv_offload_disk_gib": 4}, ["kv_offload_disk_gib", "kv_offload_gib"]),
        ({"kv_offload_gib": 4, "enable_prefix_caching": False}, ["kv_offload_gib", "enable_prefix_caching"]),
        ({"kv_offload_gib": 4, "kv_offload_folder": "spill"}, ["kv_offload_folder", "kv_offload_disk_gib"]),
        (
            {"kv_offload_gib": 4, "kv_offload_disk_gib": 4, "kv_offload_folder": __file__},
            ["kv_offload_folder", __file__],
        ),
        ({"deterministic": "always"}, ["deterministic", "'always'", "True", "False"]),
        ({"deterministic": True, "plan": "nanoflow_70b"}, ["deterministic", "'nanoflow_70b'", "'gather'"]),
        ({"attention_backend": "mosaic"}, ["attention_backend", "'mosaic'", "'xla'"]),
        ({"quantization": "int8"}, ["quantization", "'fp8'"]),
        ({"kv_cache_dtype": "int8"}, ["kv_cache_dtype", "'int8'", "'fp8'"]),
        ({"revision": "main"}, ["revision", "'main'"]),
    ],
    ids=str,
)
def test_bad_constructor_values(options: dict[str, Any], words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one line that names the option and its value, before anything is compiled."""
    monkeypatch.setattr(setup, "compile_steps", lambda *_, **__: pytest.fail("steps were compiled"))
    monkeypatch.setattr(setup, "Runner", lambda *_, **__: pytest.fail("steps were compiled"))
    with pytest.raises(ConfigError) as error:
        LLM("tiny", **{**SMALL, **options})
    one_line(error, *words)


def test_unknown_option_is_a_type_error() -> None:
    unknown: dict[str, Any] = {"gpu_memory_utilization": 0.9}
    with pytest.raises(TypeError, match="gpu_memory_utilization"):
        LLM("tiny", **unknown)


def copy_of_tiny(folder: Path, without: str = "", **files: str) -> Path:
    shutil.copytree(TINY, folder)
    if without:
        (folder / without).unlink()
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"without": "config.json"}, ["config.json", "no such file"]),
        ({"without": "model.safetensors"}, ["safetensors"]),
        ({"without": "tokenizer.json"}, ["tokenizer"]),
        ({"tokenizer": '{"version": "1.0"}'}, ["tokenizer", "tokenizer.json"]),
        ({"config": "{"}, ["config.json", "not valid JSON"]),
        ({"generation_config": "{"}, ["generation_config.json", "not valid JSON"]),
        ({"generation_config": "[]"}, ["generation_config.json", "object"]),
        ({"generation_config": '{"eos_token_id": "</s>"}'}, ["eos_token_id", "</s>"]),
        ({"generation_config": '{"do_sample": true, "top_p": 2.0}'}, ["generation_config.json", "top_p", "2.0"]),
        ({"generation_config": '{"max_new_tokens": -3}'}, ["generation_config.json", "max_tokens", "-3"]),
    ],
    ids=str,
)
def test_bad_model_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], words: list[str]
) -> None:
    """One line that names the file at fault, before anything is compiled."""
    monkeypatch.setattr(setup, "compile_steps", lambda *_, **__: pytest.fail("steps were compiled"))
    monkeypatch.setattr(setup, "Runner", lambda *_, **__: pytest.fail("steps were compiled"))
    with pytest.raises(ConfigError) as error:
        LLM(copy_of_tiny(tmp_path / "copy", **change), **SMALL)
    one_line(error, *words)


def test_bad_model_names(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for model in ("./no/such/folder", str(tmp_path / "file"), ""):
        with pytest.raises(ConfigError) as error:
            LLM(model, **SMALL)
        one_line(error, "model", repr(model), "'tiny'", "Hub id")


# -- chat


def test_chat(llm: LLM) -> None:
    """One conversation or several: the answers follow the template's rendering, without a second begin-of-text
    token."""
    question = [{"role": "user", "content": "What is 12+30?"}]
    longer = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "What is 25+25?"},
    ]
    params = SamplingParams(temperature=0.0, max_tokens=16)
    (one,) = llm.chat(question, params, use_tqdm=False)
    assert one.prompt == "<|begin_of_text|><|user|>What is 12+30?<|end_of_turn|><|assistant|>"
    assert one.prompt_token_ids == llm.tokenizer.encode(one.prompt, add_special_tokens=False)
    assert one.prompt_token_ids.count(BOS) == 1
    assert one.outputs[0].finish_reason == "stop"
    first, second = llm.chat([question, longer], [params, params], use_tqdm=False)
    assert first.outputs[0] == one.outputs[0]
    assert second.prompt is not None
    assert second.prompt.count("<|end_of_turn|>") == 3
    assert llm.chat([], params, use_tqdm=False) == []


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user"}], ["messages", "content"]),
        ([{"content": "x"}], ["messages", "role"]),
        ([{"role": "user", "content": None}], ["messages", "None", "content"]),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], ["messages", "only text"]),
        (["What is 12+30?"], ["messages", "'role'"]),
        ("What is 12+30?", ["messages", "'role'"]),
        ([[]], ["messages", "empty"]),
        ([[{"role": "user", "content": "x"}], [{"role": "user"}]], ["messages", "content"]),
    ],
    ids=str,
)
def test_bad_messages(llm: LLM, messages: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        llm.chat(messages, GREEDY, use_tqdm=False)
    one_line(error, *words)
    assert not llm.engine.has_work


def test_a_model_without_template_and_a_template_that_refuses(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bare = copy_of_tiny(tmp_path / "bare", without="chat_template.jinja")
    monkeypatch.setattr(llm, "tokenizer", Tokenizer(bare))
    with pytest.raises(ValueError) as error:
        llm.chat([{"role": "user", "content": "Hi"}], GREEDY, use_tqdm=False)
    one_line(error, "messages", "no chat template", "generate")
    (bare / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    monkeypatch.setattr(llm, "tokenizer", Tokenizer(bare))
    with pytest.raises(ValueError) as error:
        llm.chat([{"role": "user", "content": "Hi"}], GREEDY, use_tqdm=False)
    one_line(error, "messages", "roles must alternate")
    (bare / "chat_template.jinja").write_text("{{ messages[0].content + 1 }}")
    monkeypatch.setattr(llm, "tokenizer", Tokenizer(bare))
    with pytest.raises(ValueError) as error:
        llm.chat([{"role": "user", "content": "Hi"}], GREEDY, use_tqdm=False)
    one_line(error, "messages", "chat template refuses", "TypeError")


# -- defaults


def test_defaults_of_tiny_are_greedy(llm: LLM) -> None:
    assert llm.default_sampling_params() == SamplingParams(temperature=0.0)
    assert llm.default_sampling_params(max_tokens=3, temperature=0.5) == SamplingParams(temperature=0.5, max_tokens=3)
    (default,) = llm.generate("12+30=", use_tqdm=False)
    (greedy,) = llm.generate("12+30=", SamplingParams(temperature=0.0), use_tqdm=False)
    assert default.outputs[0] == greedy.outputs[0]


@pytest.mark.parametrize(
    ("fields", "defaults", "eos"),
    [
        (None, {"temperature": 0.0}, (257, 261)),
        ({}, {"temperature": 0.0}, (257, 261)),
        ({"temperature": 0.6, "eos_token_id": 5}, {"temperature": 0.0}, (5, 257)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [5, 6]},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
            (5, 6, 257),
        ),
        ({"do_sample": True, "top_p": None}, {}, (257, 261)),
        ({"max_new_tokens": 5}, {"temperature": 0.0, "max_tokens": 5}, (257, 261)),
    ],
    ids=str,
)
def test_defaults_come_from_generation_config(
    tmp_path: Path, fields: dict[str, Any] | None, defaults: dict[str, Any], eos: tuple[int, ...]
) -> None:
    """Sampling only where do_sample says so; end tokens there win over those of config.json, and the tokenizer's own
    is one of them."""
    if fields is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    assert generation_defaults(tmp_path) == defaults
    found = end_tokens(tmp_path, read_config(TINY / "config.json"), Tokenizer(TINY))
    assert found == eos
