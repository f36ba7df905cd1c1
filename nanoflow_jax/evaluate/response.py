"""What is written for a line: a response or an error, in the shape of the OpenAI batch output.

The same run gives the same bytes: ids come from line numbers, and `created` is 0.
"""

from __future__ import annotations

import json
from typing import Any

from nanoflow_jax.engine.request import CompletionOutput, Logprob, RequestOutput
from nanoflow_jax.evaluate.journal import UTF8
from nanoflow_jax.evaluate.records import CHAT, Problem, Record

Json = dict[str, Any]


def encode_record(record: Json) -> bytes:
    """One line with its end."""
    return json.dumps(record, ensure_ascii=False).encode(*UTF8) + b"\n"


def error_record(found: Problem) -> Json:
    """The record of a line that could not be served."""
    error = {"code": found.code, "message": found.message, "param": found.param, "line": found.line}
    record = {"id": f"batch_req_{found.line}", "error": error, "custom_id": found.custom_id, "response": None}
    return record | _digest(found)


def response_record(record: Record, output: RequestOutput, model: str) -> Json:
    """The record of a line that was served; an error record where the engine failed on it."""
    if failed := [o.error for o in output.outputs if o.finish_reason == "error"]:
        message = failed[0] or "the request failed"
        return error_record(Problem(record.line, record.custom_id, "server_error", message, digest=record.digest))
    chat = record.endpoint == CHAT
    made = sum(len(o.token_ids) for o in output.outputs)
    asked = len(output.prompt_token_ids)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{record.line}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": model,
        "choices": [(_chat_choice if chat else _choice)(o, record.sampling.get("logprobs", 0)) for o in output.outputs],
        "usage": {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made},
    }
    response = {"status_code": 200, "request_id": f"req_{record.line}", "body": body}
    made_of = {"id": f"batch_req_{record.line}", "error": None, "custom_id": record.custom_id, "response": response}
    return made_of | _digest(record)


def _digest(of: Record | Problem) -> Json:
    """By which a result is known again when the input has changed."""
    return {"request_digest": of.digest} if of.digest else {}


def _chat_choice(output: CompletionOutput, top: int) -> Json:
    logprobs = None
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


def _choice(output: CompletionOutput, top: int) -> Json:
    logprobs = None
    if output.logprobs is not None:
        steps = list(zip(output.token_ids, output.logprobs, strict=True))
        logprobs = {
            "tokens": [_text(step[token].token_bytes, "bytes:") for token, step in steps],
            "token_logprobs": [step[token].logprob for token, step in steps],
            "top_logprobs": [_by_text(step, top) for _, step in steps],
            "text_offset": output.text_offsets,
        }
    return {"index": output.index, "text": output.text, "logprobs": logprobs, "finish_reason": output.finish_reason}


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
