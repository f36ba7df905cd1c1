"""Models that say what they are told to: their text, its ends and its scores are known, wherever they are made."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.config import ConfigError
from nanoflow_jax.evaluate.batch import Settings, answer
from nanoflow_jax.evaluate.lines import Line
from nanoflow_jax.evaluate.records import CHAT, COMPLETIONS, parse_line
from nanoflow_jax.generation_config import generation_defaults
from tests.scripted import LLAMA2_CONFIG, LLAMA3_CONFIG, llama2, llama3, script, write_model

OPTIONS: dict[str, Any] = {
    "tokens_per_step": 32, "decode_slots": 8, "page_size": 16, "kv_cache_tokens": 1024, "max_model_len": 128,
    "tensor_parallel_size": 1, "progress": False,
}  # fmt: skip
TEMPLATE = "{{ bos_token }}{{ messages[0].content }}"
QUESTION, CODE = "The capital of France is", "def f(x):\n"


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, **fields})


def text(llm: LLM, prompt: str, **fields: Any) -> str:
    return llm.generate(prompt, greedy(**fields), use_tqdm=False)[0].outputs[0].text


@pytest.fixture(scope="module")
def spaces(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Llama-2 style: after " is" it says " Paris and the answer", after a line's end an indented line."""
    made = llama2()
    ids = made.encode(QUESTION, add_special_tokens=False).ids
    name: Any = made.token_to_id
    follows = script(*ids, *map(name, ("▁Paris", "▁and", "▁the", "▁answer", "</s>")))
    follows |= script(*map(name, ("<0x0A>", "▁▁▁", "▁return", "▁x", "</s>"))) | {name("\n"): name("▁▁▁")}
    second = {ids[-1]: name("▁yes")}
    folder = tmp_path_factory.mktemp("spaces")
    config = {**LLAMA2_CONFIG, "chat_template": TEMPLATE}
    return LLM(str(write_model(folder, made, config, follows, name("</s>"), second=second)), **OPTIONS)


@pytest.fixture(scope="module")
def bytes_(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Llama-3 style, a ChatML finetune whose config.json has the base model's end token: after " is" it says " yes",
    ends its turn and would go on with the user's; after " what" it says "😀é"; after " no" the base's end token."""
    made = llama3()
    name: Any = made.token_to_id
    follows = script(*map(name, ("Ġis", "Ġyes", "<|im_end|>", "Ċ", "Ġuser", "Ġis")))
    smile = made.encode("😀é", add_special_tokens=False).ids
    follows |= script(name("Ġwhat"), *smile, name("<|im_end|>")) | {name("Ġno"): name("<|end_of_text|>")}
    folder = tmp_path_factory.mktemp("bytes")
    config = {**LLAMA3_CONFIG, "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    base = {"eos_token_id": name("<|end_of_text|>"), "bos_token_id": name("<|begin_of_text|>")}
    return LLM(str(write_model(folder, made, config, follows, name("Ċ"), **base)), **OPTIONS)


def batch(llm: LLM, *requests: tuple[str, dict[str, Any]]) -> list[Any]:
    """Choices, one per request."""
    records: list[Any] = []
    lines = [
        json.dumps({"custom_id": str(i), "method": "POST", "url": url, "body": body}).encode()
        for i, (url, body) in enumerate(requests)
    ]
    answer(llm, [parse_line(Line(i + 1, line)) for i, line in enumerate(lines)], Settings("m"), records.append)
    assert all(r["error"] is None for r in records), records
    return [r["response"]["body"]["choices"][0] for r in sorted(records, key=lambda r: int(r["custom_id"]))]


# -- one text


@pytest.mark.parametrize(
    ("prompt", "wanted"), [(QUESTION, " Paris and the answer"), (CODE, "    return x"), ("yes", "")], ids=repr
)
def test_the_text_is_the_same_wherever_it_is_made(spaces: LLM, prompt: str, wanted: str) -> None:
    """What the tokens add to the prompt's text: no space lost at its beginning, none taken back at its end."""
    if wanted == "    return x":  # ▁▁▁ and ▁return
        assert spaces.tokenizer.decode(spaces.tokenizer.encode(CODE + wanted, True)) == CODE + wanted
    assert text(spaces, prompt) == wanted
    assert text(spaces, prompt, stop=["never there"]) == wanted
    grown = [o.outputs[0].text for o in spaces.stream(prompt, greedy())]
    assert grown[-1] == wanted
    assert all(after.startswith(before) for before, after in pairwise(grown)), grown
    messages = [{"role": "user", "content": prompt}]
    assert spaces.chat(messages, greedy(), use_tqdm=False)[0].outputs[0].text == wanted
    completion, chat = batch(
        spaces, (COMPLETIONS, {"prompt": prompt, "max_tokens": 12}), (CHAT, {"messages": messages, "max_tokens": 12})
    )
    assert completion["text"] == chat["message"]["content"] == wanted
    done: list[Any] = [output for _, output in spaces.run_stream([spaces.prepare(prompt, greedy())])]
    assert [o.outputs[0].text for o in done] == [wanted]


def test_a_stop_string_cuts_the_same_text(spaces: LLM) -> None:
    assert text(spaces, QUESTION, stop=["answer"]) == " Paris and the "
    assert text(spaces, QUESTION, stop=[" the"]) == " Paris and"
    assert text(spaces, QUESTION, stop=[" the"], include_stop_str_in_output=True) == " Paris and the"
    assert text(spaces, CODE, stop=["   ret"]) == " "


def test_a_prompt_that_ends_in_half_a_character(bytes_: LLM) -> None:
    """The output completes it: the character is the output's."""
    ids = bytes_.tokenizer.encode(" what😀", True)
    (output,) = bytes_.generate([ids[:-2]], greedy(), use_tqdm=False)
    assert output.outputs[0].text == "😀é"
    grown = [o.outputs[0].text for o in bytes_.stream([ids[:-2]], greedy())]
    assert grown[-1] == "😀é" and all("\ufffd" not in t for t in grown)
    assert text(bytes_, "what what", max_tokens=2) == "\ufffd", "an output that ends in half a character"


# -- ends


def test_the_tokenizers_own_end_token_ends(bytes_: LLM) -> None:
    (output,) = bytes_.generate("what is", greedy(), use_tqdm=False)
    done = output.outputs[0]
    assert (done.text, done.finish_reason, done.stop_reason, len(done.token_ids)) == (" yes", "stop", None, 2)
    assert len(bytes_.generate("yes no", greedy(), use_tqdm=False)[0].outputs[0].token_ids) == 1, "config.json's"
    assert text(bytes_, "what is", ignore_eos=True, max_tokens=6) == " yes\n user is yes"


@pytest.mark.parametrize(("generation", "ids"), [(None, "base own"), ({"eos_token_id": [7, 8]}, "7 8 own")], ids=str)
def test_end_tokens_are_told(bytes_: LLM, tmp_path: Path, caplog: Any, generation: Any, ids: str) -> None:
    from nanoflow_jax.generation_config import end_tokens

    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    name = bytes_.tokenizer.hugging_face.convert_tokens_to_ids
    known = {"base": name("<|end_of_text|>"), "own": name("<|im_end|>")}
    with caplog.at_level(logging.INFO, "nanoflow_jax"):
        found = end_tokens(tmp_path, bytes_.config, bytes_.tokenizer)
    assert found == tuple(known.get(word) or int(word) for word in ids.split())
    assert f"{known['own']} '<|im_end|>' (tokenizer)" in caplog.text
    assert ("(config.json)" in caplog.text) is (generation is None)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_stop_strings_that_are_special_tokens_stop(bytes_: LLM, skip: bool, keep: bool) -> None:
    """Also where the text shows none, and where the string goes on beyond the token."""
    options = {"skip_special_tokens": skip, "include_stop_str_in_output": keep, "ignore_eos": True}
    for stop, rest in (("<|im_end|>", ""), ("<|im_end|>\n user", ""), ("s<|im_end|>\n", "s"), ("yes", "yes")):
        (output,) = bytes_.generate("what is", greedy(stop=["Question:", stop], **options), use_tqdm=False)
        done = output.outputs[0]
        wanted = " yes".removesuffix(rest) + (stop if keep else "")
        assert (done.text, done.finish_reason, done.stop_reason) == (wanted, "stop", stop)
        grown = [o.outputs[0].text for o in bytes_.stream("what is", greedy(stop=[stop], **options))]
        assert grown[-1] == wanted
        assert all(after.startswith(before) for before, after in pairwise(grown)), grown
    shown = "" if skip else "<|im_end|>"
    assert text(bytes_, "what is", stop=["im_"], max_tokens=4, **options) == (
        f" yes{shown}\n user" if skip else " yes<|" + ("im_" if keep else "")
    ), "a part of a special token is no stop string where none are shown"
    (choice,) = batch(
        bytes_,
        (COMPLETIONS, {"prompt": "what is", "stop": "<|im_end|>", "max_tokens": 9, "temperature": 0, **options}),
    )
    assert (choice["text"], choice["finish_reason"]) == (" yes" + ("<|im_end|>" if keep else ""), "stop")


# -- generation_config.json


def test_every_field_of_generation_config_is_applied_or_told(tmp_path: Path, caplog: Any) -> None:
    fields = {
        "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.3,
        "presence_penalty": 0.1, "eos_token_id": 2, "max_length": 4096, "num_beams": 1, "length_penalty": 1.0,
        "transformers_version": "4.45.0", "pad_token_id": 0, "bad_words_ids": None, "_from_model_config": True,
    }  # fmt: skip
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(fields))
    wanted = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"}
    assert generation_defaults(tmp_path) == {name: fields[name] for name in wanted}
    assert caplog.records == []
    path.write_text(json.dumps({**fields, "do_sample": False}))
    assert generation_defaults(tmp_path) == {**{name: fields[name] for name in wanted}, "temperature": 0.0}
    path.write_text(json.dumps({**fields, "num_beams": 4, "stop_strings": ["x"], "suppress_tokens": [5]}))
    generation_defaults(tmp_path)
    (record,) = caplog.records
    assert record.getMessage() == f"{path}: not applied: num_beams=4, stop_strings=['x'], suppress_tokens=[5]"
    path.write_text(json.dumps({**fields, "min_p": 5}))
    with pytest.raises(ConfigError, match=r"generation_config\.json: min_p: 5 is not accepted"):
        generation_defaults(tmp_path)


def test_a_penalty_of_the_model_is_there_when_greedy(spaces: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, and not in SamplingParams that a user gives."""
    monkeypatch.setattr(spaces, "_defaults", {"temperature": 0.0, "repetition_penalty": 30.0})
    prompt = "The capital of France and Paris is"
    default = spaces.generate(prompt, spaces.default_sampling_params(max_tokens=12), use_tqdm=False)[0].outputs[0].text
    assert default == text(spaces, prompt, repetition_penalty=30.0) != text(spaces, prompt) == " Paris and the answer"


# -- logprob records


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_logprob_records_are_of_bytes(bytes_: LLM, url: str) -> None:
    """Together the UTF-8 of the text, half a character's too; no two entries fall together."""
    if url == CHAT:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "yes what"}], "top_logprobs": 20}
    else:
        body = {"prompt": "yes what", "logprobs": 20}
    (choice,) = batch(bytes_, (url, {"logprobs": True, **body, "max_tokens": 12}))
    pieces = [bytes([b]) for b in "😀é".encode()]
    escaped = [f"\\x{piece[0]:02x}" for piece in pieces]
    if url == CHAT:
        assert choice["message"]["content"] == "😀é"
        content = choice["logprobs"]["content"]
        assert [bytes(c["bytes"]) for c in content] == [*pieces, b"<|im_end|>"]
        assert [c["token"] for c in content] == [*escaped, "<|im_end|>"]
        assert all(len(c["top_logprobs"]) == 20 for c in content)
        assert all(c["top_logprobs"][0] == {k: c[k] for k in ("token", "logprob", "bytes")} for c in content)
        return
    logprobs = choice["logprobs"]
    assert choice["text"] == "😀é"
    assert logprobs["tokens"] == [*(f"bytes:{e}" for e in escaped), "<|im_end|>"]
    assert logprobs["text_offset"] == [0, 0, 0, 0, 1, 1, 2]
    assert all(len(top) == 20 for top in logprobs["top_logprobs"])


def test_logprob_records_keep_spaces_and_bytes_apart(spaces: LLM) -> None:
    """▁ is a space, also of the first token; a byte's own token and the character's are two entries."""
    (choice,) = batch(spaces, (COMPLETIONS, {"prompt": QUESTION, "logprobs": 20, "max_tokens": 12}))
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [" Paris", " and", " the", " answer", "</s>"]
    assert logprobs["text_offset"] == [0, 6, 10, 14, 21]
    assert all(len(top) == 20 for top in logprobs["top_logprobs"])
    bias = {str(spaces.tokenizer.hugging_face.convert_tokens_to_ids(t)): 50 for t in ("x", "<0x78>")}
    (biased,) = batch(spaces, (COMPLETIONS, {"prompt": "x", "logit_bias": bias, "logprobs": 20, "max_tokens": 1}))
    assert biased["text"] == "x"
    tops = biased["logprobs"]["top_logprobs"][0]
    assert len(tops) == 20
    # The last token of a text that is cut by a stop string has no place in it.
    (cut,) = batch(spaces, (COMPLETIONS, {"prompt": QUESTION, "logprobs": 0, "stop": "aris and", "max_tokens": 12}))
    assert (cut["text"], cut["logprobs"]["text_offset"]) == (" P", [0, 2])


# -- scores


PAIRS = [
    (QUESTION, " yes and"), (QUESTION + " ", "yes and"), (QUESTION + "  ", "yes"), (QUESTION, " yes"),
    (QUESTION + " ", "yes"), (QUESTION + "\n", "yes"), ("", "yes and"), ("", " Paris"), (" ", "yes"), (" \n", "x"),
    ("The cap", "ital of"), ("The capital of Fran", "ce is"), ("yes", "\n"), (CODE, "    return x"),
]  # fmt: skip


def test_a_space_at_the_end_of_a_context_belongs_to_the_continuation(spaces: LLM) -> None:
    """The first word of the continuation counts: the runner-up is scored as one."""
    scores = spaces.score(PAIRS[:2] + PAIRS[3:5], use_tqdm=False)
    assert {is_greedy for _, is_greedy in scores} == {False}
    assert scores[0] == scores[1] and scores[2] == scores[3]
    assert scores[2][0] < -2


@pytest.mark.parametrize("which", ["spaces", "bytes_"])
def test_scores_are_those_of_lm_evaluation_harness(which: str, request: pytest.FixtureRequest, caplog: Any) -> None:
    """Same tokens on the same side of the border, whatever stands there."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the lm-eval extra)")
    from lm_eval.api.instance import Instance

    from nanoflow_jax.evaluate.lm_eval import NanoflowLM

    llm: LLM = request.getfixturevalue(which)
    harness = NanoflowLM(llm=llm)
    for context, continuation in PAIRS:
        if context:
            head, tail = harness._encode_pair(context, continuation)
            tokens, border = llm.tokenizer.encode_pair(context, continuation)
            if context.strip():
                assert (tokens[:border], tokens[border:]) == (head, tail), (context, continuation)
    asked: Any = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    wanted = harness.loglikelihood(asked, disable_tqdm=True)
    for pair, found, want in zip(PAIRS, llm.score(PAIRS, use_tqdm=False), wanted, strict=True):
        assert found == (pytest.approx(want[0], abs=1e-3), want[1]), pair


def test_a_token_that_spans_the_border_is_told(spaces: LLM, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-evaluation-harness leaves it out; here, nothing is dropped without a word."""
    monkeypatch.setattr(spaces.tokenizer, "_told_of_borders", False)
    spaces.score([("the cap", " is"), ("the", " capital")], use_tqdm=False)
    assert caplog.records == []
    for _ in range(2):
        spaces.score([("the answ", "er is")], use_tqdm=False)
    (record,) = caplog.records
    assert "'the answ' and the beginning of 'er is': what it adds is left out" in record.getMessage()
    with pytest.raises(ValueError, match="has no token of its own after its context"):
        spaces.score([("the answ", "er")], use_tqdm=False)


@pytest.fixture(autouse=True)
def quiet_until_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "nanoflow_jax")
