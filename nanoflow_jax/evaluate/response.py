"""What is written for a line: a response or an error, in the shape of the OpenAI batch output.

The same run gives the same bytes: ids come from line numbers, and `created` is 0.
"""

from __future__ import annotations

import json
from typing import Any

from nanoflow_jax.engine.request import CompletionOutput, Logprob, RequestOutput
from nanoflow_jax.evaluate.records import CHAT, Problem, Record

Json = dict[str, Any]


def encode_record(record: Json) -> bytes:
    """One line with its end. Half surrogate pairs, which UTF-8 cannot hold, stay as JSON escapes."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def error_record(found: Problem) -> Json:
    """The record of a line that could not be served."""
    error = {"code": found.code, "message": found.message, "param": found.param, "line": found.line}
    return {"id": f"batch_req_{found.line}", "error": error, "custom_id": found.custom_id, "response": None}


def response_record(record: Record, output: RequestOutput, model: str) -> Json:
    """The record of a line that was served; an error record where the engine failed on it."""
    if failed := [o.error for o in output.outputs if o.finish_reason == "error"]:
        message = failed[0] or "the request failed"
        return error_record(Problem(record.line, record.custom_id, "server_error", message))
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
    return {"id": f"batch_req_{record.line}", "error": None, "custom_id": record.custom_id, "response": response}


def _chat_choice(output: CompletionOutput, top: int) -> Json:
    logprobs = None
    if output.logprobs is not None:
        content = []
        for token, step in zip(output.token_ids, output.logprobs, strict=True):
            likeliest = [_entry(lp) for lp in _likeliest(step, top)]
            content.append({**_entry(step[token]), "top_logprobs": likeliest})
        logprobs = {"content": content, "refusal": None}
    return {
        "index": output.index,
        "message": {"role": "assistant", "content": output.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": output.finish_reason,
    }


def _choice(output: CompletionOutput, top: int) -> Json:
    logprobs = None
    if output.logprobs is not None:
        steps = list(zip(output.token_ids, output.logprobs, strict=True))
        tokens = [step[token].decoded_token or "" for token, step in steps]
        offsets = [0]
        for text in tokens:
            offsets.append(offsets[-1] + len(text))
        logprobs = {
            "tokens": tokens,
            "token_logprobs": [step[token].logprob for token, step in steps],
            "top_logprobs": [{lp.decoded_token or "": lp.logprob for lp in _likeliest(step, top)} for _, step in steps],
            "text_offset": offsets[:-1],
        }
    return {"index": output.index, "text": output.text, "logprobs": logprobs, "finish_reason": output.finish_reason}


def _likeliest(step: dict[int, Logprob], top: int) -> list[Logprob]:
    """The `top` likeliest tokens of a step, which also holds the sampled one."""
    return sorted((lp for lp in step.values() if lp.rank <= top), key=lambda lp: lp.rank)[:top]


def _entry(logprob: Logprob) -> Json:
    text = logprob.decoded_token or ""
    return {"token": text, "logprob": logprob.logprob, "bytes": list(text.encode("utf-8", "replace"))}
