"""A line of a batch file, or the body of a request to a server, parsed strictly: a `Record` to run, or a `Problem` that
names the field at fault.

Accepted are the OpenAI batch format (`custom_id`, `method`, `url`, `body`) for chat and plain completions, and plain
lines `{"prompt": ...}` with an optional `custom_id` and the same fields as a completion's body.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, NoReturn

import numpy as np

from nanoflow_jax.chat import EFFORTS, PLAIN, ChatSettings, checked_messages
from nanoflow_jax.evaluate.forms import FORMS, form_of
from nanoflow_jax.evaluate.lines import Line
from nanoflow_jax.sampling_params import MAX_LOGPROBS, MAX_N
from nanoflow_jax.system.reading import Malformed, one_line, parse_json

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MAX_ID = 512  # characters

# Fields of a body that are fields of SamplingParams, under the same name and with the same meaning.
SAMPLING = (
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "stop", "stop_token_ids",
    "ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids",
    "include_stop_str_in_output", "skip_special_tokens",
)  # fmt: skip
WHOLE = ("n", "top_k", "seed", "max_tokens", "max_completion_tokens", "min_tokens", "logprobs", "top_logprobs")
# Fields that name or place a request; there is nothing to apply.
LABELS = (
    "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "request_id", "priority", "cache_salt", "parallel_tool_calls", "spaces_between_special_tokens",
)  # fmt: skip
# Fields accepted only where they change nothing: client libraries write their defaults out.
SWITCHED_OFF: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,), "stream_options": ({},), "store": (False,), "best_of": (1,), "suffix": ("",),
    "modalities": (["text"],), "verbosity": ("medium",),
    "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "use_beam_search": (False,), "num_beams": (1,), "num_return_sequences": (1,), "length_penalty": (1,),
    "early_stopping": (False,), "no_repeat_ngram_size": (0,), "typical_p": (1,), "epsilon_cutoff": (0,),
    "eta_cutoff": (0,), "penalty_alpha": (0,), "encoder_repetition_penalty": (1,), "guidance_scale": (1,),
    "bad_words": ([],), "logits_processors": ([],), "detokenize": (True,), "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,), "mm_processor_kwargs": ({},),
}  # fmt: skip
SWITCHED_OFF_IN: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    CHAT: {"add_special_tokens": (False,), "echo": (False,)},
    COMPLETIONS: {
        "add_special_tokens": (True,), "tools": ([],), "documents": ([],), "chat_template_kwargs": ({},),
    },
}  # fmt: skip
STREAMING = ("stream", "stream_options")  # of a body that may be streamed
# Fields of a chat's body that say how it is rendered (`ChatSettings`), besides reasoning_effort.
RENDERING = ("chat_template_kwargs", "tools", "documents", "add_generation_prompt", "continue_final_message")
# Fields of a message; others must be empty, as in answers that are sent back.
MESSAGE_TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
MESSAGE = ("role", "content", "tool_calls", *MESSAGE_TEXTS)
EMPTY_IN_MESSAGES: tuple[Any, ...] = (None, [], {}, "")


@dataclass(frozen=True)
class Problem:
    """Why a line has no response. param: the field at fault, where there is one. digest: of the line's content."""

    line: int
    custom_id: str | None
    code: str  # "invalid_request", or "server_error" when the engine failed on it
    message: str  # one line
    param: str | None = None
    digest: str = field(default="", compare=False)


@dataclass(frozen=True)
class Record:
    """A request. Either `prompt` (text or token ids) or `messages` is set; `sampling` holds what the line asks for,
    by the names of SamplingParams, `chat` how the messages are rendered. digest: of the line's content, however it is
    spaced and ordered.

    echo         the response begins with the prompt
    prompt_only  nothing is generated: max_tokens 0, with echo
    """

    line: int
    custom_id: str | None
    endpoint: str
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    sampling: dict[str, Any] = field(default_factory=dict)
    num_bytes: int = 0  # of its line
    digest: str = field(default="", compare=False)
    chat: ChatSettings = PLAIN
    echo: bool = False
    prompt_only: bool = False

    def refused(self, error: ValueError) -> Problem:
        """What came of an error that was told about this record's prompt or settings."""
        name, colon, _ = str(error).partition(": ")
        found = problem(self.line, self.custom_id, str(error), name if colon and name.isidentifier() else None)
        return replace(found, digest=self.digest)


@dataclass(frozen=True)
class Body:
    """What was asked of an endpoint: a record of each prompt, and how they are answered.

    stream         as they grow
    include_usage  at the end of a stream
    """

    records: list[Record]
    stream: bool = False
    include_usage: bool = False


class _Refused(Exception):
    def __init__(self, name: str | None, message: str):
        super().__init__(message)
        self.name = name


def problem(line: int, custom_id: str | None, message: str, param: str | None = None) -> Problem:
    """A refused request; the message becomes one line of bounded length."""
    return Problem(line, custom_id, "invalid_request", one_line(" ".join(message.split())), param)


def parse_line(line: Line, models: Collection[str] = ()) -> Record | Problem:
    """`models`: names that a body's `model` may have; a body without one is always accepted. Never raises."""
    custom_id: str | None = None
    content = line.data or (line.problem or "").encode()
    try:
        if line.problem is not None:
            _refuse(None, line.problem)
        fields = _json_object(line.data)
        content = json.dumps(fields, sort_keys=True).encode()
        custom_id = _custom_id(fields)
        openai = any(fields.get(name) is not None for name in ("body", "url", "method"))
        found = (_openai if openai else _plain)(line, custom_id, fields, models)
    except _Refused as error:
        found = problem(line.number, custom_id, str(error), error.name)
    return replace(found, digest=hashlib.blake2b(content, digest_size=8).hexdigest())


def parse_body(endpoint: str, data: bytes, number: int, models: Collection[str], most_prompts: int) -> Body | Problem:
    """The body of a request to an endpoint, which may be streamed and have several prompts. Never raises.

    number  of its first record, as lines of a file have one; the others follow
    """
    line = Line(number, data)
    try:
        body = _json_object(data, "the body")
        if endpoint == CHAT:
            records = [_chat(line, None, _without(body, STREAMING), models)]
        else:
            prompts = _prompts(body.get("prompt"), most_prompts)
            first = _completion(line, None, {**_without(body, STREAMING), "prompt": prompts[0]}, models)
            records = [replace(first, line=number + i, prompt=_prompt(p)) for i, p in enumerate(prompts)]
        return Body(records, *_streaming(body))
    except _Refused as error:
        return problem(number, None, str(error), error.name)


def _without(body: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in names}


def _streaming(body: dict[str, Any]) -> tuple[bool, bool]:
    """Whether to stream, and whether to tell the usage at the end."""
    stream, options = body.get("stream"), body.get("stream_options")
    if stream is not None and not isinstance(stream, bool):
        _wrong("stream", stream, "true or false")
    if options is None or options == {}:
        return bool(stream), False
    given = {name: value for name, value in options.items() if value is not None} if isinstance(options, dict) else {}
    usage = given.pop("include_usage", False)
    others_off = given in ({}, {"include_obfuscation": False})
    if not isinstance(options, dict) or not isinstance(usage, bool) or not others_off:
        _wrong("stream_options", options, '{"include_usage": true}, or false')
    if not stream:
        _refuse("stream_options", "it needs stream: true")
    return True, usage


def _prompts(given: Any, most: int) -> list[Any]:
    """The prompts of a body that has one or several."""
    if not isinstance(given, list) or not given or isinstance(given[0], int | float):
        return [given]
    if len(given) > most:
        _refuse("prompt", f"{len(given)} prompts; accepted: at most {most} in a request")
    return given


def _refuse(name: str | None, message: str) -> NoReturn:
    raise _Refused(name, f"{name}: {message}" if name else message)


def _wrong(name: str, value: Any, accepted: str) -> NoReturn:
    _refuse(name, f"{value!r} is not accepted; it must be {accepted}")


def _json_object(data: bytes, what: str = "the line") -> dict[str, Any]:
    if not data.strip():
        _refuse(None, f"{what} is empty; a JSON object is needed")
    try:
        value = parse_json(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        _refuse(None, f"not UTF-8 text (byte {error.start} of {what})")
    except Malformed as error:
        _refuse(error.field, str(error) if error.field else f"not JSON ({error})")
    if not isinstance(value, dict):
        _refuse(None, f"not a JSON object but {type(value).__name__}")
    return value


def _custom_id(fields: dict[str, Any]) -> str | None:
    custom_id = fields.get("custom_id")
    if custom_id is None:
        return None
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID:
        _wrong("custom_id", custom_id, f"a text of 1 to {MAX_ID} characters")
    return custom_id


def _plain(line: Line, custom_id: str | None, fields: dict[str, Any], models: Collection[str]) -> Record:
    body = {name: value for name, value in fields.items() if name != "custom_id"}
    if "prompt" not in body:
        _refuse("prompt", 'it is missing; accepted: {"prompt": ...}, or custom_id, method, url and body')
    return _completion(line, custom_id, body, models)


def _openai(line: Line, custom_id: str | None, fields: dict[str, Any], models: Collection[str]) -> Record:
    if unknown := sorted({n for n, v in fields.items() if v is not None} - {"custom_id", "method", "url", "body"}):
        _refuse(unknown[0], "unknown field; accepted: custom_id, method, url, body")
    if custom_id is None:
        _refuse("custom_id", "it is missing; every request needs its own")
    if fields.get("method") != "POST":
        _wrong("method", fields.get("method"), "'POST'")
    endpoint, body = fields.get("url"), fields.get("body")
    if endpoint not in (CHAT, COMPLETIONS):
        _wrong("url", endpoint, f"{CHAT!r} or {COMPLETIONS!r}")
    if not isinstance(body, dict):
        _wrong("body", body, "a JSON object")
    return (_chat if endpoint == CHAT else _completion)(line, custom_id, body, models)


def _completion(line: Line, custom_id: str | None, body: dict[str, Any], models: Collection[str]) -> Record:
    body = {name: _whole(value) if name in WHOLE else value for name, value in body.items()}
    sampling = _body(COMPLETIONS, body, models, ("prompt", "logprobs", "echo"))
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int | float):
        _refuse("prompt", "a list of prompts is not accepted; give each its own line")
    prompt, echo = _prompt(prompt), body.get("echo") or False
    if not isinstance(echo, bool):
        _wrong("echo", echo, "true or false")
    if prompt_only := echo and sampling.get("max_tokens") == 0:
        sampling["max_tokens"] = 1  # as far as SamplingParams is concerned
    if (wanted := body.get("logprobs")) is not None and wanted is not False:  # a chat's way to want none
        sampling["logprobs"] = wanted
    return Record(
        line.number, custom_id, COMPLETIONS, prompt, None, sampling, len(line.data), echo=echo, prompt_only=prompt_only
    )


def _prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, list):
        prompt = [_whole(token) for token in prompt]
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(t) is int for t in prompt)):
        _wrong("prompt", prompt, "a text or a list of token ids")
    return prompt


def _chat(line: Line, custom_id: str | None, body: dict[str, Any], models: Collection[str]) -> Record:
    body = {name: _whole(value) if name in WHOLE else value for name, value in body.items()}
    own = ("messages", "logprobs", "top_logprobs", "max_completion_tokens", "reasoning_effort", *RENDERING)
    sampling = _body(CHAT, body, models, own)
    if (limit := body.get("max_completion_tokens")) is not None:
        if sampling.get("max_tokens", limit) != limit:
            _refuse("max_completion_tokens", f"{limit!r}, but max_tokens is {sampling['max_tokens']!r}; give one")
        sampling["max_tokens"] = limit
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if wanted is not None and not isinstance(wanted, bool):
        _wrong("logprobs", wanted, "true or false; top_logprobs says how many")
    if top and not wanted:
        _refuse("top_logprobs", "it needs logprobs: true")
    if wanted:
        if top is not None and (type(top) is not int or not 0 <= top <= MAX_LOGPROBS):
            _wrong("top_logprobs", top, f"a whole number from 0 to {MAX_LOGPROBS}")
        sampling["logprobs"] = top or 0
    messages, chat = _messages(body.get("messages")), _rendering(body)
    return Record(line.number, custom_id, CHAT, None, messages, sampling, len(line.data), chat=chat)


def _rendering(body: dict[str, Any]) -> ChatSettings:
    given = {name: body[name] for name in RENDERING if body.get(name) not in (None, [])}
    if (effort := body.get("reasoning_effort")) is not None:  # which templates know as a variable
        if effort not in EFFORTS:
            _wrong("reasoning_effort", effort, f"one of {', '.join(EFFORTS)}")
        kwargs = given.get("chat_template_kwargs", {})
        if isinstance(kwargs, dict):
            if kwargs.get("reasoning_effort", effort) != effort:
                _refuse("reasoning_effort", f"{effort!r}, but chat_template_kwargs has another; give one")
            given["chat_template_kwargs"] = {**kwargs, "reasoning_effort": effort}
    return _checked(lambda: ChatSettings(**given))


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        _wrong("messages", messages, "a list of at least one message")
    kept = []
    for message in messages:
        if not isinstance(message, dict):
            _wrong("messages", message, 'objects {"role": ..., "content": ...}')
        given = {name: value for name, value in message.items() if value not in EMPTY_IN_MESSAGES}
        if unknown := sorted(set(given) - set(MESSAGE)):
            _refuse("messages", f"field {unknown[0]!r} of a message is not supported; accepted: {', '.join(MESSAGE)}")
        for name in MESSAGE_TEXTS:
            if not isinstance(given.get(name, ""), str):
                _wrong("messages", message, f"messages whose {name} is a text")
        kept.append({**given, **{name: message[name] for name in ("role", "content") if name in message}})
    return _checked(lambda: checked_messages(kept))


def _checked[T](make: Callable[[], T]) -> T:
    """What `make` makes; its error is about the name with which it begins."""
    try:
        return make()
    except ValueError as error:
        raise _Refused(str(error).partition(":")[0], str(error)) from None


def _body(endpoint: str, body: dict[str, Any], models: Collection[str], own: tuple[str, ...]) -> dict[str, Any]:
    """The sampling fields of a body. A field that is null counts as not given."""
    off = {**SWITCHED_OFF, **SWITCHED_OFF_IN[endpoint]}
    for name, value in body.items():
        if value is None:
            continue
        if name in off:
            if not any(_is_same(value, neutral) for neutral in off[name]):
                told = " or ".join(json.dumps(neutral) for neutral in off[name])
                _refuse(name, f"{value!r} is not supported; accepted: {told}, or leave it out")
        elif name not in (accepted := (*SAMPLING, *FORMS, *LABELS, *off, *own, "model")):
            near = get_close_matches(name, accepted, 1)
            known = ", ".join(sorted((*own, *SAMPLING, *FORMS, "model")))
            told = f"did you mean {near[0]!r}?" if near else f"accepted: {known}"
            _refuse(name, f"unknown or unsupported field; {told}")
    model = body.get("model")
    if model is not None and models and model not in models:
        _wrong("model", model, " or ".join(map(repr, models)) + ", the model of this run, or left out")
    sampling = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    for name in ("stop_token_ids", "allowed_token_ids"):
        if isinstance(sampling.get(name), list):
            sampling[name] = [_whole(token) for token in sampling[name]]
    if type(seed := sampling.get("seed")) is int and 2**32 <= seed < 2**63:
        sampling["seed"] = int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0])
    n = sampling.get("n", 1)
    if type(n) is not int or not 1 <= n <= MAX_N:
        _wrong("n", n, f"a whole number from 1 to {MAX_N}")
    if "logit_bias" in sampling:
        sampling["logit_bias"] = _logit_bias(sampling["logit_bias"])
    if (form := _checked(lambda: form_of(body))) is not None:
        sampling["structured_outputs"] = form
    return sampling


def _whole(value: Any) -> Any:
    """8.0 is 8: some languages have one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_off(name: str, value: Any) -> bool:
    """Whether a field that there is not changes nothing at this value: num_beams 1, best_of 1 and the like."""
    return value is None or any(_is_same(value, neutral) for neutral in SWITCHED_OFF.get(name, ()))


def _is_same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) is isinstance(neutral, bool)


def _logit_bias(value: Any) -> Any:
    """JSON has texts for keys; SamplingParams has token ids."""
    if not isinstance(value, dict):
        return value  # SamplingParams refuses it
    for token in value:
        if not (token.isascii() and token.isdecimal() and len(token) < 12):
            _refuse("logit_bias", f"{token!r} is not accepted; keys are token ids")
    return {int(token): bias for token, bias in value.items()}
