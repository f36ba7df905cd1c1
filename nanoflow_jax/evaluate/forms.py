"""The form that an output must have, as bodies of requests and task files say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoflow_jax.sampling_params import StructuredOutputsParams

FORMS = ("response_format", "structured_outputs")  # OpenAI's field, and vLLM's


def form_of(fields: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """Of a mapping that may have one of the fields `FORMS`; None: the output may have any. Raises ValueError, one line
    that begins with the field's name."""
    wanted, form = fields.get("response_format"), fields.get("structured_outputs")
    if form is not None:
        if wanted not in (None, {"type": "text"}):
            raise ValueError("response_format: structured_outputs is there, too; give one")
        if not isinstance(form, dict):
            raise _wrong("structured_outputs", form, 'an object, such as {"regex": ...}')
        return _made("structured_outputs", {name: value for name, value in form.items() if value is not None})
    if wanted is None:
        return None
    accepted = '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": ...}}'
    others = dict(wanted) if isinstance(wanted, dict) else {}
    kind, given = others.pop("type", None), others.pop("json_schema", None)
    if others or kind not in ("text", "json_object", "json_schema") or (given is not None) != (kind == "json_schema"):
        raise _wrong("response_format", wanted, accepted)
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict) or set(given) - {"name", "description", "strict", "schema"}:
        raise _wrong("response_format", wanted, accepted)
    return _made("response_format", {"json": schema})


def _made(name: str, fields: dict[str, Any]) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams(**fields)
    except (TypeError, ValueError) as error:
        _, _, told = str(error).partition(": ")  # behind the class, or the field of SamplingParams
        raise ValueError(f"{name}: {told}") from None


def _wrong(name: str, value: Any, accepted: str) -> ValueError:
    return ValueError(f"{name}: {value!r} is not accepted; it must be {accepted}")
