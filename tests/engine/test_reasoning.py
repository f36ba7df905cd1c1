"""Thoughts and answers: told apart by tokens, text or channels, the same in every interface and at every moment."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from nanoflow_jax import LLM, SamplingParams, api
from nanoflow_jax.cli import main
from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.outputs import GrowingOutput, request_output
from nanoflow_jax.engine.reasoning import find_reasoning
from nanoflow_jax.engine.request import CompletionOutput, Request
from nanoflow_jax.engine.text import WatchedText
from nanoflow_jax.evaluate.journal import manifest_path
from nanoflow_jax.evaluate.manifest import Manifest
from nanoflow_jax.tokenizer import Tokenizer
from tests.chat_templates import DEEPSEEK_R1, GPT_OSS, LLAMA3, MISTRAL, QWEN3
from tests.scripted import LLAMA3_CONFIG, LLAMA3_SPECIAL, llama3, script, write_model, write_tokenizer

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
# Name: template, special tokens, added tokens that the text shows.
STYLES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "tokens": (QWEN3, (), ("<think>", "</think>")),
    "hidden": (MISTRAL, ("[THINK]", "[/THINK]", "[INST]", "[/INST]"), ()),
    "text": (QWEN3, (), ()),
    "begun": (DEEPSEEK_R1, (), ("<think>", "</think>", "<|User|>", "<|Assistant|>")),
    "harmony": (GPT_OSS, HARMONY, ()),
    "nothing": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), ()),
}
QUESTION = [{"role": "user", "content": "what is <think> for"}]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root, found = tmp_path_factory.mktemp("styles"), {}
    for name, (template, special, shown) in STYLES.items():
        made = llama3((*LLAMA3_SPECIAL, *special))
        made.add_tokens([AddedToken(text, special=False, normalized=False) for text in shown])
        config = {**LLAMA3_CONFIG, "chat_template": template}
        found[name] = Tokenizer(write_tokenizer(root / name, made, config))
    return found


def states(tokenizer: Tokenizer, prompt: str, output: str, **fields: Any) -> list[tuple[Any, Any]]:
    """(thought, answer) after each token of a stream, and at its end as if the output was made at once. The parts that
    a server streams come to the same."""
    reasoning = find_reasoning(tokenizer, None)
    params = SamplingParams(temperature=0.0, **fields)
    ids, tokens = tokenizer.encode(prompt, False), tokenizer.encode(output, False)

    def request(made: list[int]) -> Request:
        found = Request(0, "0", prompt, ids, params, 0, frozenset(), 999, watched=True)
        found.tokens = found.tokens.__class__((len(ids) + len(made),), found.tokens.dtype)
        found.tokens[:] = [*ids, *made]
        return found

    grown, watched, seen = request([]), WatchedText(tokenizer, ids, params), []
    streamed = request([])
    growing, parts = GrowingOutput(streamed, tokenizer, reasoning), list[CompletionOutput]()
    for number in range(len(tokens)):
        grown.tokens = request(tokens[: number + 1]).tokens
        stop = watched.add(tokens[number])
        grown.text = watched.text
        if stop is not None:
            grown.finish_reason, grown.stop_reason = "stop", stop
        done = request_output([grown], tokenizer, reasoning).outputs[0]
        seen.append((done.reasoning_content, done.content))
        if stop is not None:
            whole = grown
            break
        if number % 3:
            parts.append(growing.take(tokens[sum(len(p.token_ids) for p in parts) : number + 1]))
    else:
        whole = request(tokens)
        whole.finish_reason = "length"
    done = request_output([whole], tokenizer, reasoning).outputs[0]
    streamed.tokens, streamed.text = whole.tokens, whole.text
    streamed.finish_reason, streamed.stop_reason = whole.finish_reason, whole.stop_reason
    parts.append(growing.finish())
    assert "".join(part.text for part in parts) == done.text
    assert "".join(part.reasoning_content or "" for part in parts) == (done.reasoning_content or "")
    assert "".join(part.content or "" for part in parts).rstrip() == (done.content or "").rstrip()
    assert [token for part in parts for token in part.token_ids] == done.token_ids
    return [*seen, (done.reasoning_content, done.content)]


CASES: list[tuple[str, str | None, str, Any, Any]] = [  # style, prompt (None: the template's), output, thought, answer
    ("tokens", None, "<think>\nthe x é\n</think>\n\nyes 😀 ", "the x é", "yes 😀 "),
    ("tokens", None, "\n<think>the answer", "the answer", None),
    ("tokens", None, "<think>\n\n</think>\n\n", "", ""),
    ("tokens", None, " yes, <think> begins one</think>", None, " yes, <think> begins one</think>"),
    ("tokens", None, "<think>no</think>a <think>b</think>", "no", "a <think>b</think>"),
    ("tokens", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "yes", None, "yes"),
    ("tokens", "<|im_start|>assistant\n<think>\nthe ans", "wer\n</think>yes", "wer", "yes"),
    ("hidden", None, "[THINK]the x 😀[/THINK]yes", "the x 😀", "yes"),
    ("hidden", None, "[THINK]the x", "the x", None),
    ("hidden", None, "yes", None, "yes"),
    ("text", None, "<think>\nthe </thx é\n</think>\n\nyes <", "the </thx é", "yes <"),
    ("text", None, "<think>the</thi", "the</thi", None),
    ("text", None, "<thin", None, "<thin"),
    ("text", "<|im_start|>assistant\n<think>\n", "the x</think>yes", "the x", "yes"),
    ("begun", None, "the x\n</think>\n\nyes", "the x", "yes"),
    ("begun", None, "the x", "the x", None),
    ("begun", "<|User|>what is <think> for<|Assistant|>", "yes", None, "yes"),
    (
        "harmony", None,
        "<|channel|>analysis<|message|>the x<|end|><|start|>assistant<|channel|>final<|message|>yes 😀<|return|>",
        "the x", "yes 😀",
    ),
    ("harmony", None, "<|channel|>analysis<|message|>the x 😀", "the x 😀", None),
    ("harmony", None, "<|channel|>ana", None, None),
    (
        "harmony", None,
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary to=f json<|message|>{}<|call|>",
        "a\n{}", None,
    ),
    ("harmony", None, "<|message|>yes<|return|>", None, "yes"),
    ("harmony", "<|start|>assistant<|channel|>final<|message|>the", " x<|return|>", None, " x"),
    ("harmony", "<|start|>assistant<|channel|>analysis<|message|>the", " x", "x", None),
    ("harmony", "what is", " the answer", None, " the answer"),
    ("harmony", "<|start|>assistant<|channel|>analysis<|message|>the<|end|>", "yes", None, "yes"),
    (
        "harmony", None, "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|message|>yes<|return|>", "a", "yes",
    ),
    ("nothing", None, "<think>no</think>yes", None, "<think>no</think>yes"),
]  # fmt: skip


@pytest.mark.parametrize(("style", "prompt", "output", "thought", "answer"), CASES, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("skip", [True, False], ids=["hidden", "shown"])
def test_thought_and_answer(
    style: str, prompt: str | None, output: str, thought: Any, answer: Any, skip: bool, tokenizers: dict[str, Tokenizer]
) -> None:
    """And in a stream both only grow, and come to the same."""
    tokenizer = tokenizers[style]
    prompt = tokenizer.chat(QUESTION) if prompt is None else prompt
    seen = states(tokenizer, prompt, output, skip_special_tokens=skip)
    if not skip and output.endswith("<|return|>"):  # an end that is asked for is part of the answer
        answer = answer.removesuffix("<|return|>")
    assert seen[-1] == (thought, answer)
    for before, after in pairwise(seen):
        assert (after[0] or "").startswith(before[0] or ""), seen
        assert (after[1] or "").startswith((before[1] or "").rstrip() or ""), seen


def test_stop_strings_end_thoughts_too(tokenizers: dict[str, Tokenizer]) -> None:
    """They are looked for in the text as it is."""
    thought = "<think>the x is</think>yes x no"
    assert states(tokenizers["tokens"], "a<|im_start|>", thought, stop=[" x"])[-1] == ("the", None)
    assert states(tokenizers["tokens"], "a<|im_start|>", thought, stop=["</think>"])[-1] == ("the x is", "")
    assert states(tokenizers["tokens"], "a<|im_start|>", thought, stop=[" no"])[-1] == ("the x is", "yes x")
    assert states(tokenizers["tokens"], "a<|im_start|>", thought, stop=["is</think>yes"])[-1] == ("the x", "")


def test_what_tells_them_apart(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    found = {name: str(find_reasoning(tokenizer, None)) for name, tokenizer in tokenizers.items()}
    assert found == {
        "tokens": "<think> </think>", "hidden": "[THINK] [/THINK]", "text": "<think> </think>",
        "begun": "<think> </think>", "harmony": "harmony", "nothing": "None",
    }  # fmt: skip
    for tokenizer in tokenizers.values():
        assert find_reasoning(tokenizer, "none") is None
        assert str(find_reasoning(tokenizer, "<a> </a>")) == "<a> </a>"
    with pytest.raises(ConfigError, match=r"^reasoning_parser: 'harmony' needs the token <\|start\|>"):
        find_reasoning(tokenizers["tokens"], "harmony")
    for wrong in ("deepseek", "<a>", "<a> <a>", "<a> <b> <c>", 3):
        with pytest.raises(ConfigError, match=r'^reasoning_parser: .* it must be "none", "harmony" or two tags'):
            LLM("tiny", reasoning_parser=wrong)  # type: ignore[arg-type]


# -- a model that thinks

OPTIONS: dict[str, Any] = {
    "tokens_per_step": 32, "decode_slots": 8, "page_size": 16, "kv_cache_tokens": 1024, "max_model_len": 128,
    "tensor_parallel_size": 1, "progress": False,
}  # fmt: skip
FLAGS = ["--cpu-devices", "8", "--quiet"]
TEMPLATE = "{{ messages[0].content }}<|im_start|>{% if enable_thinking is defined and not enable_thinking %}"
TEMPLATE += "<think></think>{% endif %}"
HELLO = [{"role": "user", "content": "what"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thinks " is the", answers " yes"; after " no" it has no thought and says " x"."""
    made = llama3()
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    name: Any = made.token_to_id
    follows = script(*map(name, ("<|im_start|>", "<think>", "Ġis", "Ġthe", "</think>", "Ċ", "Ġyes", "<|im_end|>")))
    config = {**LLAMA3_CONFIG, "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    return write_model(tmp_path_factory.mktemp("thinks"), made, config, follows, name("<|im_end|>"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), **OPTIONS)


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, **fields})


def test_chat_and_streams(llm: LLM) -> None:
    (done,) = llm.chat(HELLO, greedy(logprobs=1), use_tqdm=False)[0].outputs
    assert (done.reasoning_content, done.content, done.text) == ("is the", "yes", "<think> is the</think>\n yes")
    assert done.logprobs is not None and done.text_offsets is not None
    assert len(done.logprobs) == len(done.token_ids) == 7 == len(done.text_offsets)
    (cut,) = llm.chat(HELLO, greedy(max_tokens=3), use_tqdm=False)[0].outputs
    assert (cut.reasoning_content, cut.content, cut.finish_reason) == ("is the", None, "length")
    given: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}, "use_tqdm": False}
    (off,) = llm.chat(HELLO, greedy(), **given)[0].outputs
    assert (off.reasoning_content, off.content) == (None, "\n yes")
    given = {"add_generation_prompt": False, "continue_final_message": True, "use_tqdm": False}
    open_ = [{"role": "assistant", "content": " the"}]
    (on,) = llm.chat(open_, greedy(max_tokens=2), **given, chat_template="{{ messages[0].content }}.")[0].outputs
    assert on.text == "</think>\n"
    prompt = "what<|im_start|>"
    seen = [o.outputs[0] for o in llm.stream(prompt, greedy())]
    assert (seen[-1].reasoning_content, seen[-1].content) == ("is the", "yes")
    assert [o.content for o in seen].count(None) >= 3
    for before, after in pairwise(seen):
        assert (after.reasoning_content or "").startswith(before.reasoning_content or "")
        assert (after.content or "").startswith(before.content or "")
    work: Any = [llm.prepare_chat(HELLO, greedy())]
    ((_, output),) = list(llm.run_stream(work))
    assert output.outputs[0].content == "yes"  # type: ignore[union-attr]


def run(llm: LLM, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    monkeypatch.setattr(api, "LLM", lambda model, **_: llm)
    return main([*arguments, *FLAGS])


def test_generate(llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    command = ("generate", "--model", str(folder), "--chat", "what", "one")
    assert run(llm, monkeypatch, *command) == 0
    assert capsys.readouterr() == ("yes\nyes\n", "")
    assert run(llm, monkeypatch, *command, "--json") == 0
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (line["reasoning_content"], line["content"]) == ("is the", "yes")
    assert line["text"] == "<think> is the</think>\n yes"
    assert run(llm, monkeypatch, *command, "--max-tokens", "2") == 0
    out, err = capsys.readouterr()
    assert out == "\n\n"
    (folder / "tools.json").write_text('[{"b": 2}]')
    (folder / "wrong.json").write_text('{"b": 2}')
    with monkeypatch.context() as patch:
        seen: list[Any] = []
        chat = llm.chat
        patch.setattr(llm, "chat", lambda *a, **given: (seen.append(given["tools"]), chat(*a, **given))[1])
        assert run(llm, patch, *command, "--tools", str(folder / "tools.json")) == 0
        assert seen == [[{"b": 2}]] and capsys.readouterr().out == "yes\nyes\n"
    with pytest.raises(SystemExit):
        run(llm, monkeypatch, *command, "--tools", str(folder / "wrong.json"))
    assert "wrong.json: not a list of objects; accepted: a file with a JSON list" in capsys.readouterr().err
    assert err.splitlines()[0] == "nanoflow generate: prompt 1: no answer; its thought had not ended after 2 tokens"


def test_batch(llm: LLM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Records, and what of the settings belongs to a run."""
    bodies = [
        {"max_tokens": 12}, {"max_tokens": 3}, {"chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 12},
        {"documents": [{"a": 1}], "tools": [{"b": 2}], "reasoning_effort": "low", "max_tokens": 12},
    ]  # fmt: skip
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": {"messages": HELLO, **body}}
        for i, body in enumerate(bodies)
    ]
    lines.append({"custom_id": "4", "method": "POST", "url": "/v1/completions", "body": {"prompt": "what<|im_start|>"}})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "out.jsonl"
    command = ("batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(output), "--model", str(folder), "--ordered")
    prompts: list[Any] = []
    rendered = llm.tokenizer.chat
    monkeypatch.setattr(llm.tokenizer, "chat", lambda *a: (prompts.append(a[1]), rendered(*a))[1])
    assert run(llm, monkeypatch, *command) == 0, capsys.readouterr().err
    choices = [json.loads(line)["response"]["body"]["choices"][0] for line in output.read_text().splitlines()]
    shared = {"role": "assistant", "refusal": None}
    assert [c["message"] for c in choices[:4]] == [
        {**shared, "content": "yes", "reasoning_content": "is the"},
        {**shared, "content": None, "reasoning_content": "is the"},
        {**shared, "content": "\n yes"},
        {**shared, "content": "yes", "reasoning_content": "is the"},
    ]
    assert [c["finish_reason"] for c in choices[:3]] == ["stop", "length", "stop"]
    assert choices[4]["text"] == "<think> is the</think>\n yes"
    last = next(p for p in prompts if p.documents)
    assert (last.tools, last.chat_template_kwargs) == ([{"b": 2}], {"reasoning_effort": "low"})

    prompts.clear()
    for name in ("tools", "documents"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"of": name}]))
    whole = [f"--{name}={tmp_path / name}.json" for name in ("tools", "documents")]
    assert run(llm, monkeypatch, *command, *whole) == 1
    assert "tools was null and is " in capsys.readouterr().err
    assert run(llm, monkeypatch, *command, *whole, "--restart") == 0
    assert "1 answers are missing: their thoughts had not ended" in capsys.readouterr().out
    given = [(p.tools, p.documents) for p in prompts]
    assert given.count(([{"of": "tools"}], [{"of": "documents"}])) == 3, "a line's own come before those of the run"
    assert given.count(([{"b": 2}], [{"a": 1}])) == 1
    assert run(llm, monkeypatch, *command, *whole, "--json") == 0
    assert json.loads(capsys.readouterr().out)["unfinished_thoughts"] == 1
    assert run(llm, monkeypatch, *command, "--restart") == 0
    capsys.readouterr()

    identity = Manifest.read(manifest_path(output)).identity
    assert "tools" not in identity and identity["reasoning_parser"] == "<think> </think>"
    (tmp_path / "t.jinja").write_text(TEMPLATE + " ")
    for flags, told in (
        (("--reasoning-parser", "none"), "reasoning_parser was "),
        (("--chat-template-kwargs", '{"enable_thinking": false}'), "chat_template_kwargs was null and is "),
        (("--chat-template", str(tmp_path / "t.jinja")), "chat_template was null and is "),
    ):
        assert run(llm, monkeypatch, *command, *flags) == 1
        assert told in capsys.readouterr().err
    assert run(llm, monkeypatch, *command, "--chat-template-kwargs", "{}") == 0, "which says nothing"
    with pytest.raises(SystemExit):
        run(llm, monkeypatch, *command, "--chat-template-kwargs", '{"tools": []}')
    assert "'tools' is not accepted" in capsys.readouterr().err


def test_eval(llm: LLM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The answer alone is scored; thoughts that were cut off are counted, and wrong."""
    (tmp_path / "q.jsonl").write_text('{"prompt": "what", "target": "yes"}\n{"prompt": "one", "target": "is the"}\n')
    for name, tokens, value, told in (("long", 12, 0.5, 0), ("short", 3, 0.0, 2)):
        task = tmp_path / f"{name}.yaml"
        task.write_text(
            f"data: {{file: q.jsonl}}\nprompt: '{{{{ prompt }}}}'\ntarget: '{{{{ target }}}}'\nchat: true\n"
            f"generate: {{max_tokens: {tokens}, temperature: 0}}\nextract: {{regex: '[a-z]+'}}\n"
            "metrics: [exact_match]\n"
        )
        assert run(llm, monkeypatch, "eval", str(task), "-o", str(tmp_path / name), "--model", str(folder)) == 0
        out = capsys.readouterr().out
        result = json.loads((tmp_path / name / "results.json").read_text())["results"][name]
        assert (result["metrics"]["exact_match"]["value"], result["unfinished_thoughts"]) == (value, told)
        assert (f"- {name}: 2 of 2" in out) is bool(told)
        (tmp_path / "docs.json").write_text('[{"title": "t"}]')
        again = ("eval", str(task), "-o", str(tmp_path / name), "--model", str(folder), "--documents")
        assert run(llm, monkeypatch, *again, str(tmp_path / "docs.json")) == 1, "another run"
        assert "documents was null and is " in capsys.readouterr().err
        seen: list[Any] = []
        with monkeypatch.context() as patch:
            rendered = llm.tokenizer.chat
            patch.setattr(
                llm.tokenizer,
                "chat",
                lambda *a, rendered=rendered, seen=seen: (seen.append(a[1].documents), rendered(*a))[1],
            )
            assert run(llm, patch, *again, str(tmp_path / "docs.json"), "--restart") == 0
        assert seen == [[{"title": "t"}]] * 2
        capsys.readouterr()
        first = json.loads((tmp_path / name / f"{name}.samples.jsonl").read_text().splitlines()[0])
        assert (first["output"], first["reasoning_content"]) == (None if told else "yes", "is the")


def test_options_of_a_run(folder: Path) -> None:
    """A template, its variables and the tags of a whole run."""
    template = TEMPLATE + "{% if words is defined %}{{ words }}{% endif %}"
    other = LLM(
        str(folder), **OPTIONS, chat_template=template, chat_template_kwargs={"words": "<think>"},
        reasoning_parser="<think> none",
    )  # fmt: skip
    (output,) = other.chat(HELLO, greedy(), use_tqdm=False)
    assert output.prompt == "what<|im_start|><think>"
    assert (output.outputs[0].reasoning_content, output.outputs[0].content) == ("is the</think>\n yes", None)


def test_lm_eval(llm: LLM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tasks see the answers, and its chats the variables of the run."""
    adapter = pytest.importorskip("nanoflow_jax.evaluate.lm_eval", reason="the lm-eval extra is not installed")
    from lm_eval.api.instance import Instance

    lm = adapter.NanoflowLM(llm=llm)
    prompt = lm.apply_chat_template(HELLO)
    asked = [(prompt, {"max_gen_toks": tokens}) for tokens in (12, 3)]
    requests = [Instance(request_type="generate_until", doc={}, arguments=a, idx=i) for i, a in enumerate(asked)]
    monkeypatch.setattr(logging.getLogger("nanoflow_jax"), "propagate", True)
    assert lm.generate_until(requests, disable_tqdm=True) == ["yes", ""]
    assert "1 of 2 outputs have no answer: their thoughts had not ended" in caplog.text
    given: dict[str, Any] = {}
    monkeypatch.setattr(adapter, "LLM", lambda _, **options: (given.update(options), llm)[1])
    adapter.NanoflowLM("m", chat_template_kwargs='{"enable_thinking": false}')  # as --model_args has it
    assert given == {"chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(ConfigError, match=r"^model_args: chat_template_kwargs: .*not JSON"):
        adapter.NanoflowLM("m", chat_template_kwargs="{")
