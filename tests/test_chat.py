"""What reaches a chat template: as with `transformers`' apply_chat_template, checked, and named where wrong."""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from nanoflow_jax.chat import MOST_BYTES, ChatSettings, checked_messages, read_template
from nanoflow_jax.config import ConfigError
from nanoflow_jax.options import LLMOptions
from nanoflow_jax.tokenizer import Tokenizer
from tests.chat_templates import LLAMA3, QWEN3, TEMPLATES
from tests.scripted import LLAMA3_CONFIG, llama3, write_tokenizer

Json = dict[str, Any]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather", "description": "the weather <now>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "day": {"type": "number"}}},
    },
}  # fmt: skip
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "day": 1.5}}}
QUESTION = [{"role": "user", "content": "what is the answer"}]
SYSTEM = [{"role": "system", "content": " no  "}, *QUESTION]
TURNS = [
    *SYSTEM, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}, {"role": "user", "content": "x é 数"},
]  # fmt: skip
TOOLS = [
    *QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "17"},
]  # fmt: skip
OPEN = [*QUESTION, {"role": "assistant", "content": "the answer is "}]
THINKING = [*QUESTION, {"role": "assistant", "reasoning_content": "so", "thinking": "so", "content": "the answer"}]
SETTINGS: list[Json] = [
    {},
    {"add_generation_prompt": False},
    {"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "high", "date_string": "1 Jan 2031"}},
    {"chat_template_kwargs": {"enable_thinking": True, "unknown": [1, None, {"a": 0.5}], "bos_token": "<b>"}},
    {"tools": [TOOL, TOOL]},
    {"tools": [TOOL], "chat_template_kwargs": {"tools_in_user_message": False}},
    {"documents": [{"title": "one", "text": "two"}, {"title": "é", "text": ""}]},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("templates")
    return {
        name: Tokenizer(write_tokenizer(root / name, llama3(), {**LLAMA3_CONFIG, "chat_template": template}))
        for name, template in TEMPLATES.items()
    }


def of_transformers(tokenizer: Tokenizer, messages: Any, settings: Json) -> str:
    """What apply_chat_template gives; an error as its message."""
    given = {"add_generation_prompt": True, **settings}
    kwargs = given.pop("chat_template_kwargs", {})
    hugging_face: PreTrainedTokenizerFast = tokenizer.hugging_face
    try:
        return str(hugging_face.apply_chat_template(messages, tokenize=False, **given, **kwargs))
    except Exception as error:
        return f"ERROR {error}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_transformers_makes(name: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, differ = tokenizers[name], set[str]()
    for conversation in (QUESTION, SYSTEM, TURNS, TOOLS, OPEN, THINKING):
        for settings in SETTINGS:
            wanted = of_transformers(tokenizer, conversation, settings)
            try:
                found = tokenizer.chat(conversation, ChatSettings(**settings))
            except ValueError as error:
                told = wanted.removeprefix("ERROR ").split("\n")[0]
                assert wanted.startswith("ERROR ") and told[:60] in str(error), (wanted, str(error))
                continue
            assert found == wanted, (conversation, settings)
            differ.add(found)
    assert len(differ) >= 12, "the settings reach the template"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_message_is_continued_as_transformers_does(name: str, tokenizers: dict[str, Tokenizer]) -> None:
    """Without what would end it, and without the space at its end where the template trims."""
    given: Json = {"add_generation_prompt": False, "continue_final_message": True}
    for conversation in (OPEN, [*SYSTEM, {"role": "assistant", "content": "\nyes"}], THINKING):
        found = tokenizers[name].chat(conversation, ChatSettings(**given))
        assert found == of_transformers(tokenizers[name], conversation, given)
        assert found.rstrip().endswith(conversation[-1]["content"].rsplit("\n", 1)[-1].rstrip())


def test_the_time_of_a_run_and_a_named_date(tokenizers: dict[str, Tokenizer]) -> None:
    now = datetime(2031, 2, 3)
    assert "Today Date: 03 Feb 2031\n" in tokenizers["llama3"].chat(QUESTION, now=now)
    named = ChatSettings(chat_template_kwargs={"date_string": "1 Jan 1970"})
    assert "Today Date: 1 Jan 1970\n" in tokenizers["llama3"].chat(QUESTION, named, now)


def test_text_parts_are_one_text_and_arguments_as_text_are_objects(tokenizers: dict[str, Tokenizer]) -> None:
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "the answer", "cache_control": None}]
    as_parts: Any = [{"role": "user", "content": parts}, *TOOLS[1:]]
    as_text = [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Paris", "day": 1.5}'}}]
    for tokenizer in tokenizers.values():
        try:
            wanted = tokenizer.chat(TOOLS)
        except ValueError:  # its template knows no tools
            continue
        assert tokenizer.chat(as_parts) == wanted
        assert tokenizer.chat([TOOLS[0], {**TOOLS[1], "tool_calls": as_text}, TOOLS[2]]) == wanted
    assert parts[1] == {"type": "text", "text": "the answer", "cache_control": None}, "what was given stays as it is"
    assert "function" in as_text[0] and isinstance(as_text[0]["function"]["arguments"], str)


def test_a_template_of_the_run_or_the_call_comes_before_the_models(tmp_path: Path) -> None:
    """And so do variables: the conversation's, then the run's."""
    folder = write_tokenizer(tmp_path, llama3(), {**LLAMA3_CONFIG, "chat_template": LLAMA3})
    mine = "{{ messages[0].content }} {{ a }} {{ b }} {{ c is defined }}"
    tokenizer = Tokenizer(folder, mine, {"a": 1, "b": 2})
    assert tokenizer.chat(QUESTION) == "what is the answer 1 2 False"
    said = ChatSettings(chat_template_kwargs={"b": 3, "c": None})
    assert tokenizer.chat(QUESTION, said) == "what is the answer 1 3 True"
    own = ChatSettings(chat_template="{{ b }}!")
    assert tokenizer.chat(QUESTION, own) == "2!"
    assert Tokenizer(folder, mine).hugging_face.get_chat_template() == mine, "lm-eval reads it there"


def test_of_several_templates(tmp_path: Path) -> None:
    """One is named, or taken because there are tools."""
    several = [{"name": n, "template": n + "{{ messages[0].content }}"} for n in ("default", "tool_use", "rag")]
    tokenizer = Tokenizer(write_tokenizer(tmp_path, llama3(), {**LLAMA3_CONFIG, "chat_template": several}))
    assert tokenizer.chat(QUESTION) == "defaultwhat is the answer"
    assert tokenizer.chat(QUESTION, ChatSettings(tools=[TOOL])) == "tool_usewhat is the answer"
    assert tokenizer.chat(QUESTION, ChatSettings(chat_template="rag")) == "ragwhat is the answer"


DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]
WRONG: list[tuple[Json, list[str]]] = [
    ({"chat_template_kwargs": {name: 1}}, ["chat_template_kwargs: ", repr(name), "accepted: variables"])
    for name in (
        "messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
    )
] + [
    ({"chat_template_kwargs": "enable_thinking"}, ["chat_template_kwargs: 'enable_thinking'", "a JSON object"]),
    ({"chat_template_kwargs": {1: 2}}, ["chat_template_kwargs: ", "a JSON object"]),
    ({"chat_template_kwargs": {"day": datetime(2031, 1, 1)}}, ["chat_template_kwargs: 'day': not plain data"]),
    ({"chat_template_kwargs": {"p": math.nan}}, ["chat_template_kwargs: 'p': not plain data"]),
    ({"chat_template_kwargs": {"deep": DEEP}}, ["chat_template_kwargs: 'deep': not plain data"]),
    ({"chat_template_kwargs": {"long": "x" * MOST_BYTES}}, ["chat_template_kwargs: 'long': ", "at most 4 MiB"]),
    ({"tools": TOOL}, ["tools: ", "a list of JSON objects"]),
    ({"tools": [len]}, ["tools: ", "a list of JSON objects"]),
    ({"tools": [{"a": {1, 2}}]}, ["tools: not plain data"]),
    ({"documents": ["text"]}, ["documents: ", "a list of JSON objects"]),
    ({"documents": [{"text": "x" * MOST_BYTES}]}, ["documents: ", "at most 4 MiB"]),
    ({"add_generation_prompt": 1}, ["add_generation_prompt: 1", "true or false"]),
    ({"continue_final_message": "content", "add_generation_prompt": False}, ["continue_final_message: 'content'"]),
    ({"continue_final_message": True}, ["continue_final_message: ", "add_generation_prompt false"]),
    ({"chat_template": 3}, ["chat_template: 3"]),
]  # fmt: skip


def str_of(value: Any) -> str:
    return "-".join(value)[:60]


@pytest.mark.parametrize(("settings", "words"), WRONG, ids=str_of)
def test_what_cannot_be_passed_is_named_in_one_line(settings: Json, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        ChatSettings(**settings)
    said = str(error.value)
    assert "\n" not in said and len(said) < 520 and said.startswith(words[0]) and all(w in said for w in words), said
    kwargs = settings.get("chat_template_kwargs")
    if kwargs is not None:  # also those of a whole run
        with pytest.raises(ConfigError, match=r"^chat_template_kwargs: "):
            LLMOptions("tiny", chat_template_kwargs=kwargs)


@pytest.mark.parametrize(
    "content", [None, 3, [], [3], [{"type": "image_url", "image_url": "x"}], [{"type": "text"}], "long"], ids=repr
)
def test_content_is_text(content: Any) -> None:
    if content == []:
        assert checked_messages([{"role": "user", "content": content}]) == [{"role": "user", "content": ""}]
        return
    message = {"role": "user", "content": {"x" * 1000: 1} if content == "long" else content}
    with pytest.raises(ValueError, match=r"^messages: ") as error:
        checked_messages([message])
    assert len(str(error.value)) < 520


def test_a_template_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(QWEN3)
    assert read_template(path) == read_template(str(path)) == read_template(QWEN3) == QWEN3
    assert read_template(None) is None
    (tmp_path / "plain").write_text("no template")
    (tmp_path / "binary").write_bytes(b"\xff{{")
    for wrong in (tmp_path, tmp_path / "none", tmp_path / "plain", tmp_path / "binary", "chatml", "a\0b"):
        with pytest.raises(ConfigError, match=r"^chat_template: .*; accepted: the path of a Jinja file, or a template"):
            read_template(wrong)
