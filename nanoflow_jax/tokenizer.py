"""The tokenizer and chat template of a model: Hugging Face `transformers`, without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from nanoflow_jax.config import ConfigError


class Tokenizer:
    """Loads from a folder or Hub id. Raises ConfigError, one line, when there is no usable tokenizer."""

    def __init__(self, source: str | Path):
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(source))
        except (
            Exception
        ) as error:  # the library raises whatever a malformed file leads to: KeyError, TypeError, Exception itself
            first = (str(error).strip().splitlines() or [""])[0]
            first = first if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {first}"
            raise ConfigError(
                f"tokenizer: {source} has none that loads ({first}); a tokenizer.json is needed"
            ) from None

    @property
    def hugging_face(self) -> Any:
        """The library's own object."""
        return self._tokenizer

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt: character {error.start} is half of a surrogate pair; accepted: text that UTF-8 can hold"
            ) from None
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    @property
    def first_token_id(self) -> int:
        """What a text without context begins with: the beginning-of-sequence token, else the end token."""
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ValueError("tokenizer: it has neither a first nor an end token to stand for an empty context")

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[Any]) -> str:
        """The conversation as the model's template renders it, ready for the assistant's turn."""
        if not messages:
            raise ValueError("messages: the conversation is empty; at least one message is needed")
        for message in messages:
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(k), str) for k in ("role", "content")
            ):
                raise ValueError(
                    f"messages: {message!r} is not accepted; each is a dict with texts 'role' and 'content'"
                )
        if self._tokenizer.chat_template is None:
            raise ValueError("messages: this model has no chat template; use generate")
        conversation = [dict(m) for m in messages]
        try:
            return self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # how a template refuses a role, or an order of roles
            raise ValueError(f"messages: the model's chat template refuses them ({error})") from None
