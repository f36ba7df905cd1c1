"""The tokenizer and chat template of a model: Hugging Face `transformers`, without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanoflow_jax.config import ConfigError


class Tokenizer:
    """Loads from a folder or Hub id. Raises ConfigError, one line, when there is no usable tokenizer."""

    def __init__(self, source: str | Path):
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(source))
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(f"tokenizer: {source} has none that loads ({first}); a tokenizer.json is needed") from None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[Any]) -> str:
        """The conversation as the model's template renders it, ready for the assistant's turn."""
        for message in messages:
            if not isinstance(message, dict) or not {"role", "content"} <= set(message):
                raise ValueError(f"messages: {message!r} is not accepted; each is a dict with 'role' and 'content'")
        if self._tokenizer.chat_template is None:
            raise ValueError("messages: this model has no chat template; use generate")
        return self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
