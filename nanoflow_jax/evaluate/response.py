"""What is answered to a request, in OpenAI's shape: a response, the chunks of a streamed one, or, of a line of a batch
file, a record with either a response or an error.

The same batch gives the same bytes: ids come from line numbers, and `created` is 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanoflow_jax.engine.request import CompletionOutput, Logprob, RequestOutput
from nanoflow_jax.engine.text import output_text, text_offsets
from nanoflow_jax.evaluate.journal import UTF8
from nanoflow_jax.evaluate.records import CHAT, Problem, Record
from nanoflow_jax.tokenizer import Tokenizer

Json = dict[str, Any]


def encode_json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode(*UTF8)


def encode_record(record: Json) -> bytes:
    """One line with its end."""
    return encode_json(record) + b"\n"


def error_record(found: Problem) -> Json:
    """The record of a line that could not be served."""
    error = {"code": found.code, "message": found.message, "param": found.param, "line": found.line}
    record = {"id": f"batch_req_{found.line}", "error": error, "custom_id": found.custom_id, "response": None}
    return record | _digest(found)


def response_record(record: Record, output: RequestOutput, model: str, tokenizer: Tokenizer) -> Json:
    """The record of a line that was served; an error record where the engine failed on it."""
    if failed := [o.error for o in output.outputs if o.finish_reason == "error"]:
        message = failed[0] or "the request failed"
        return error_record(Problem(record.line, record.custom_id, "server_error", message, digest=record.digest))
    body = response_body([record], [output], model, tokenizer, str(record.line), 0)
    response = {"status_code": 200, "request_id": f"req_{record.line}", "body": body}
    made_of = {"id": f"batch_req_{record.line}", "error": None, "custom_id": record.custom_id, "response": response}
    return made_of | _digest(record)


def response_body(
    records: Sequence[Record],
    outputs: Sequence[RequestOutput],
    model: str,
    tokenizer: Tokenizer,
    name: str,
    created: int,
) -> Json:
    """The response to one or several prompts of a request; the choices of a prompt follow those of the one before it.
    name: its id, behind that of its kind."""
    chat = records[0].endpoint == CHAT
    choices = []
    for record, output in zip(records, outputs, strict=True):
        echo = echo_of(record, output, tokenizer)
        for done in output.outputs:
            choice = _chat_choice(record, done) if chat else _choice(record, done, echo)
            choices.append({**choice, "index": len(choices)})
    asked = sum(len(output.prompt_token_ids) for output in outputs)
    made = sum(len(done.token_ids) for output in outputs for done in output.outputs)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage(asked, made),
    }


def usage(asked: int, made: int) -> Json:
    """Of tokens of prompts and of outputs."""
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


def chunk_head(record: Record, model: str, name: str, created: int) -> Json:
    """What all chunks of a streamed response begin with; `choices` follow."""
    chat = record.endpoint == CHAT
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": created,
        "model": model,
    }


def chunk_choice(
    record: Record, part: CompletionOutput, index: int, first: bool = False, echo: Echo | None = None
) -> Json:
    """The choice of a chunk. part: what has come since the one before (`engine.outputs.GrowingOutput`); echo, with the
    `first` one: the prompt."""
    if record.endpoint != CHAT:
        return {**_choice(record, part, echo, first), "index": index}
    choice = _chat_choice(record, part)
    message = choice.pop("message")
    delta = {"role": "assistant", "content": ""} if first else {}
    delta |= {name: message[name] for name in ("reasoning_content", "content") if message.get(name)}
    return {"index": index, "delta": delta, "logprobs": choice["logprobs"], "finish_reason": part.finish_reason}


@dataclass(frozen=True)
class Echo:
    """A prompt that a response begins with: its text, and the logprobs that are asked for."""

    text: str
    logprobs: Json | None


def echo_of(record: Record, output: RequestOutput, tokenizer: Tokenizer) -> Echo | None:
    """None: the record wants none."""
    if not record.echo:
        return None
    ids, skip = output.prompt_token_ids, record.sampling.get("skip_special_tokens", True)
    text = record.prompt if isinstance(record.prompt, str) else output_text(tokenizer, [], ids, skip)
    if output.prompt_logprobs is None:
        return Echo(text, None)
    top, steps = record.sampling.get("logprobs", 0), output.prompt_logprobs
    logprobs = {
        "tokens": [_text(tokenizer.token_bytes(token), "bytes:") for token in ids],
        "token_logprobs": [step and step[token].logprob for token, step in zip(ids, steps, strict=True)],
        "top_logprobs": [step and _by_text(step, top) for step in steps],
        "text_offset": [min(at, len(text)) for at in text_offsets(tokenizer, [], ids, skip)],
    }
    return Echo(text, logprobs)


def _digest(of: Record | Problem) -> Json:
    """By which a result is known again when the input has changed."""
    return {"request_digest": of.digest} if of.digest else {}


def _chat_choice(record: Record, output: CompletionOutput) -> Json:
    logprobs, top = None, record.sampling.get("logprobs", 0)
    if output.logprobs is not None:
        content = []
        for token, step in zip(output.token_ids, output.logprobs, strict=True):
            likeliest = [_entry(lp) for _, lp in _likeliest(step, top)]
            content.append({**_entry(step[token]), "top_logprobs": likeliest})
        logprobs = {"content": content, "refusal": None}
    message = {"role": "assistant", "content": output.content, "refusal": None}
    if output.reasoning_content is not None:
        message["reasoning_content"] = output.reasoning_content
    return {
        "index": output.index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": output.finish_reason,
    }


def _choice(record: Record, output: CompletionOutput, echo: Echo | None, first: bool = True) -> Json:
    """echo: what the text begins with, where this is the first part of it."""
    logprobs, text, top = None, output.text, record.sampling.get("logprobs", 0)
    if output.logprobs is not None:
        steps, shift = list(zip(output.token_ids, output.logprobs, strict=True)), len(echo.text) if echo else 0
        logprobs = {
            "tokens": [_text(step[token].token_bytes, "bytes:") for token, step in steps],
            "token_logprobs": [step[token].logprob for token, step in steps],
            "top_logprobs": [_by_text(step, top) for _, step in steps],
            "text_offset": [at + shift for at in output.text_offsets or ()],
        }
    if echo is not None and first:
        text = echo.text + text
        if logprobs is not None and echo.logprobs is not None:
            logprobs = {name: echo.logprobs[name] + logprobs[name] for name in logprobs}
    return {"index": output.index, "text": text, "logprobs": logprobs, "finish_reason": output.finish_reason}


def _by_text(step: dict[int, Logprob], top: int) -> dict[str, float]:
    """The `top` likeliest tokens by their text; of two with the same text (a byte's own token and the character's) the
    less likely one by its id."""
    found: dict[str, float] = {}
    for token, logprob in _likeliest(step, top):
        text = _text(logprob.token_bytes, "bytes:")
        found[text if text not in found else f"token_id:{token}"] = logprob.logprob
    return found


def _likeliest(step: dict[int, Logprob], top: int) -> list[tuple[int, Logprob]]:
    """The `top` likeliest tokens of a step, which also holds the sampled one."""
    return sorted(((t, lp) for t, lp in step.items() if lp.rank <= top), key=lambda item: item[1].rank)[:top]


def _entry(logprob: Logprob) -> Json:
    return {"token": _text(logprob.token_bytes), "logprob": logprob.logprob, "bytes": list(logprob.token_bytes)}


def _text(data: bytes, mark: str = "") -> str:
    """A token's bytes as text; bytes that are no whole characters escaped, as OpenAI writes them."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return mark + "".join(f"\\x{byte:02x}" for byte in data)
