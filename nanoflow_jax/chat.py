"""What a conversation is rendered with, checked: messages, and what is said to a chat template beside them.

All that reaches a template is plain JSON data of bounded size, because templates run in a process of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow_jax.system.reading import ConfigError, one_line, read_text, refused

MOST_BYTES = 4 * 2**20  # of a template, and as JSON of each thing that is passed to one
# What has an argument of its own, and what a template is never given.
RESERVED = (
    "messages", "conversation", "conversations", "tools", "documents", "chat_template", "chat_template_kwargs",
    "add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "tokenize", "time_directives",
)  # fmt: skip
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")  # of OpenAI's reasoning_effort


@dataclass(frozen=True)
class ChatSettings:
    """How one conversation is rendered, by the names of vLLM and of `transformers`' apply_chat_template.

    chat_template           Jinja text, or the name of one of the model's templates; None: that of the run
    chat_template_kwargs    variables of the template (enable_thinking, reasoning_effort, date_string, ...), over those
                            of the run. One that a template does not know changes nothing
    tools                   JSON objects that describe functions, as the template wants them
    documents               JSON objects, usually with title and text
    add_generation_prompt   end with what begins the assistant's turn
    continue_final_message  leave the last message open: the output goes on with it. Instead of add_generation_prompt

    Raises ValueError, one line, that begins with the name at fault.
    """

    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def __post_init__(self) -> None:
        for name in ("add_generation_prompt", "continue_final_message"):
            if not isinstance(getattr(self, name), bool):
                raise refused(name, getattr(self, name), "true or false")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message: it does not go together with add_generation_prompt, which begins a new "
                "message; accepted: add_generation_prompt false"
            )
        if self.chat_template is not None and not isinstance(self.chat_template, str):
            raise refused("chat_template", self.chat_template, "a text")
        check_kwargs(self.chat_template_kwargs)
        for name in ("tools", "documents"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
                raise refused(name, value, "a list of JSON objects")
            _check_plain(name, list(map(dict, value)))

    def variables(self, defaults: Mapping[str, Any] | None) -> dict[str, Any]:
        """All that the template is given beside the messages; `defaults`: chat_template_kwargs of the run."""
        return {
            **(defaults or {}), **(self.chat_template_kwargs or {}), "tools": self.tools, "documents": self.documents,
            "add_generation_prompt": self.add_generation_prompt, "continue_final_message": self.continue_final_message,
        }  # fmt: skip


def check_kwargs(value: Any) -> None:
    """Raises ValueError, one line, for variables of a template that cannot be passed to it; None is none."""
    if value is None:
        return
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise refused("chat_template_kwargs", value, "a JSON object")
    for key in value:
        if key in RESERVED:
            raise ValueError(
                f"chat_template_kwargs: {key!r} is not accepted; accepted: variables of the template. messages, tools, "
                "documents, chat_template, add_generation_prompt and continue_final_message are arguments of their own"
            )
        _check_plain(f"chat_template_kwargs: {one_line(key, 60)!r}", value[key])


def _check_plain(name: str, value: Any) -> None:
    try:
        size = len(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{name}: not plain data ({one_line(str(error), 120)}); accepted: what JSON can hold"
        ) from None
    if size > MOST_BYTES:
        raise ValueError(f"{name}: {size} bytes as JSON; accepted: at most {MOST_BYTES >> 20} MiB")


PLAIN = ChatSettings()


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages as a template gets them: what is None counts as left out, text parts are one text, and the arguments
    of tool calls, which the OpenAI interface writes as JSON text, are objects. Raises ValueError, one line."""
    if not isinstance(messages, list | tuple):
        raise _refused(messages, "a conversation is a list of dicts with texts 'role' and 'content'")
    if not messages:
        raise ValueError("messages: the conversation is empty; at least one message is needed")
    return [_message(message) for message in messages]


def as_conversations(messages: Any) -> list[Any]:
    """One conversation, or several, as a list of them. Raises ValueError, one line."""
    if not isinstance(messages, list | tuple):
        raise _refused(messages, "it must be a list of {'role': ..., 'content': ...}, or a list of such lists")
    return [messages] if messages and isinstance(messages[0], Mapping) else list(messages)


def _message(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
        raise _refused(given, "each is a dict with texts 'role' and 'content'")
    message = {name: value for name, value in given.items() if value is not None}
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list | tuple):
        message["content"] = "".join(_text_part(part) for part in content)
    elif not isinstance(content, str) and not (content is None and calls):
        raise _refused(given, "its 'content' must be a text or a list of text parts; it may be missing with tool_calls")
    if calls is not None:
        if not isinstance(calls, list | tuple):
            raise _refused(given, "its 'tool_calls' must be a list of JSON objects")
        message["tool_calls"] = [_tool_call(call) for call in calls]
    return message


def _text_part(part: Any) -> str:
    found = {name: value for name, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    if set(found) != {"type", "text"} or found["type"] != "text" or not isinstance(found["text"], str):
        raise _refused(part, 'parts are {"type": "text", "text": ...}: only text can be read')
    return found["text"]


def _tool_call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise _refused(call, "a tool call is a JSON object")
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        raise _refused(call, "its 'arguments' must be a JSON object, or one as text") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _refused(part: Any, accepted: str) -> ValueError:
    return ValueError(one_line(f"messages: {part!r} is not accepted; {accepted}"))


def read_template(given: str | Path | None) -> str | None:
    """The text of a template that is given as the path of a file, or itself: text with Jinja's marks. Raises
    ConfigError, one line."""
    if given is None or (isinstance(given, str) and _is_jinja(given)):
        return given
    try:
        text = read_text(given, MOST_BYTES)
        if not _is_jinja(text):
            raise ConfigError(f"{given}: holds no {{{{ or {{%")
    except (ConfigError, ValueError) as error:  # ValueError: a path with a NUL
        raise ConfigError(f"chat_template: {error}; accepted: the path of a Jinja file, or a template itself") from None
    return text


def _is_jinja(text: str) -> bool:
    return "{{" in text or "{%" in text
