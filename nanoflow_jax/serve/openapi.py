"""The OpenAPI description of the endpoints (https://spec.openapis.org/oas/v3.1.0): what bodies hold is read from the
tables by which they are parsed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoflow_jax.chat import EFFORTS
from nanoflow_jax.evaluate.records import (
    CHAT,
    COMPLETIONS,
    EMPTY_IN_MESSAGES,
    LABELS,
    MESSAGE_TEXTS,
    SAMPLING,
    STREAMING,
    SWITCHED_OFF,
    SWITCHED_OFF_IN,
)
from nanoflow_jax.sampling_params import MAX_FLOAT, MAX_INT, MAX_LOGPROBS, MAX_N
from nanoflow_jax.version import __version__

Schema = dict[str, Any]


def _whole(low: int, high: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def _number(low: float, high: float) -> Schema:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": ["array", "null"], "items": items, **more}


_SWITCH: Schema = {"type": ["boolean", "null"]}
_TOKEN: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_INT}
_TEXT: Schema = {"type": "string"}
_OBJECT: Schema = {"type": "object"}
_EMPTY: Schema = {"enum": list(EMPTY_IN_MESSAGES)}
_PART: Schema = {  # of a message's content
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": _TEXT},
    "additionalProperties": False,
}
# Of the fields that are SamplingParams'.
_SAMPLING: Mapping[str, Schema] = {
    "n": _whole(1, MAX_N),
    "temperature": _number(0, MAX_FLOAT),
    "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
    "top_k": _whole(-1, MAX_INT),
    "min_p": _number(0, 1),
    "seed": _whole(0, 2**63 - 1),
    "max_tokens": _whole(0, MAX_INT),
    "min_tokens": _whole(0, MAX_INT),
    "stop": {"anyOf": [{"type": "string", "minLength": 1}, _list({"type": "string", "minLength": 1})]},
    "stop_token_ids": _list(_TOKEN),
    "ignore_eos": _SWITCH,
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(1 / MAX_FLOAT, MAX_FLOAT),
    "logit_bias": {
        "type": ["object", "null"],
        "propertyNames": {"pattern": "^[0-9]{1,11}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "allowed_token_ids": _list(_TOKEN, minItems=1),
    "include_stop_str_in_output": _SWITCH,
    "skip_special_tokens": _SWITCH,
}
_STREAMING: Mapping[str, Schema] = {
    "stream": _SWITCH,
    "stream_options": {
        "type": ["object", "null"],
        "properties": {"include_usage": _SWITCH, "include_obfuscation": {"enum": [False, None]}},
        "additionalProperties": False,
    },
}
_OWN: Mapping[str, Mapping[str, Schema]] = {
    COMPLETIONS: {
        "prompt": {
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _TOKEN, "minItems": 1},
                {"type": "array", "items": _TEXT, "minItems": 1},
                {"type": "array", "items": {"type": "array", "items": _TOKEN, "minItems": 1}, "minItems": 1},
            ]
        },
        "logprobs": {"anyOf": [_whole(0, MAX_LOGPROBS), {"const": False}]},
        "echo": _SWITCH,
    },
    CHAT: {
        "messages": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role"],
                "properties": {
                    "role": _TEXT,
                    "content": {"anyOf": [_TEXT, {"type": "array", "items": _PART}]},
                    "tool_calls": {"anyOf": [{"type": "array", "items": _OBJECT}, _EMPTY]},
                    **{name: {"anyOf": [_TEXT, _EMPTY]} for name in MESSAGE_TEXTS},
                },
                "additionalProperties": _EMPTY,
            },
        },
        "logprobs": _SWITCH,
        "top_logprobs": _whole(0, MAX_LOGPROBS),
        "max_completion_tokens": _whole(1, MAX_INT),
        "reasoning_effort": {"enum": [*EFFORTS, None]},
        "chat_template_kwargs": {"type": ["object", "null"]},
        "tools": _list(_OBJECT),
        "documents": _list(_OBJECT),
        "add_generation_prompt": _SWITCH,
        "continue_final_message": _SWITCH,
    },
}


def body_schema(endpoint: str, model: str, prompts: int) -> Schema:
    """Of what an endpoint accepts; any other field is refused."""
    own = dict(_OWN[endpoint])
    if endpoint == COMPLETIONS:
        one, several = own["prompt"]["anyOf"][:2], own["prompt"]["anyOf"][2:]
        own["prompt"] = {"anyOf": [*one, *({**some, "maxItems": prompts} for some in several)]}
    off = {**SWITCHED_OFF, **SWITCHED_OFF_IN[endpoint]}
    fields: dict[str, Schema] = {
        "model": {"enum": [model, None]},
        **{name: {"enum": [*off[name], None]} for name in off},
        **{name: {} for name in LABELS},
        **{name: _SAMPLING[name] for name in SAMPLING},
        **{name: _STREAMING[name] for name in STREAMING},
        **own,
    }
    needed = "messages" if endpoint == CHAT else "prompt"
    return {"type": "object", "required": [needed], "properties": fields, "additionalProperties": False}


_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_USAGE: Schema = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "additionalProperties": {"type": "integer", "minimum": 0},
}
_ENDS: Schema = {"enum": ["stop", "length"]}
_CHOICES: Mapping[str, Schema] = {
    COMPLETIONS: {
        "type": "object",
        "required": ["index", "text", "logprobs", "finish_reason"],
        "properties": {
            "index": {"type": "integer"},
            "text": _TEXT,
            "logprobs": {"type": ["object", "null"]},
            "finish_reason": _ENDS,
        },
    },
    CHAT: {
        "type": "object",
        "required": ["index", "message", "logprobs", "finish_reason"],
        "properties": {
            "index": {"type": "integer"},
            "message": {
                "type": "object",
                "required": ["role", "content"],
                "properties": {
                    "role": {"const": "assistant"},
                    "content": {"type": ["string", "null"]},
                    "reasoning_content": _TEXT,
                },
            },
            "logprobs": {"type": ["object", "null"]},
            "finish_reason": _ENDS,
        },
    },
}
_TOLD = {
    400: "a field is not accepted",
    401: "the key is missing or wrong",
    404: "there is no such model or path",
    413: "the body is too large",
    415: "the body is no JSON",
    429: "too many completions are waiting",
    500: "the request failed",
    503: "the server is shutting down",
}


def _answer(told: str, found: Schema, kind: str = "application/json") -> Schema:
    return {"description": told, "content": {kind: {"schema": found}}}


def _errors(*statuses: int) -> Schema:
    return {str(status): _answer(_TOLD[status], {"$ref": "#/components/schemas/Error"}) for status in statuses}


def _post(endpoint: str, model: str, prompts: int) -> Schema:
    response = {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": _TEXT,
            "object": {"const": "chat.completion" if endpoint == CHAT else "text_completion"},
            "created": {"type": "integer"},
            "model": {"const": model},
            "choices": {"type": "array", "minItems": 1, "items": _CHOICES[endpoint]},
            "usage": _USAGE,
        },
    }
    done = _answer("the response; with stream: true as events", response)
    done["content"]["text/event-stream"] = {"schema": _TEXT}
    return {
        "post": {
            "summary": "Answer a conversation" if endpoint == CHAT else "Complete prompts",
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": body_schema(endpoint, model, prompts)}},
            },
            "responses": {"200": done, **_errors(*_TOLD)},
        }
    }


def _get(summary: str, found: Schema, *errors: int, **more: Any) -> Schema:
    return {"get": {"summary": summary, "responses": {"200": found, **_errors(*errors)}, **more}}


def schema(model: str, prompts: int) -> Schema:
    """Of a server of `model`, at whose completions a request has at most so many prompts."""
    card = {"type": "object", "required": ["id", "object", "created", "owned_by"]}
    name = {"name": "name", "in": "path", "required": True, "schema": _TEXT}
    models = {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"data": {"type": "array", "items": card}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "nanoflow_jax", "version": __version__},
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "paths": {
            CHAT: _post(CHAT, model, prompts),
            COMPLETIONS: _post(COMPLETIONS, model, prompts),
            "/v1/models": _get("The model", _answer("it", models), 401),
            "/v1/models/{name}": _get("The model", _answer("it", card), 401, 404, parameters=[name]),
            "/health": _get("Whether requests are served", _answer("they are", _OBJECT), 503),
            "/metrics": _get("For Prometheus", _answer("counts", _TEXT, "text/plain"), 401),
        },
    }
