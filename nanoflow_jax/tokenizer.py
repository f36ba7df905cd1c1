"""The tokenizer and chat template of a model.

Token ids are what tokenizer.json says, whatever class tokenizer_config.json names: Hugging Face `tokenizers` reads it
as it stands. `transformers` (without torch) only reads the special tokens and renders the chat template. Text is made
from the bytes of tokens, not by decoding some of them: it grows token by token, and is the same however it is made.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from nanoflow_jax.chat import PLAIN, ChatSettings, checked_messages
from nanoflow_jax.config import ConfigError
from nanoflow_jax.system import limited
from nanoflow_jax.system.reading import one_line

logger = logging.getLogger("nanoflow_jax")


class Tokenizer:
    """Loads from a folder or Hub id. Raises ConfigError, one line, when there is no usable tokenizer.

    chat_template         Jinja text in place of the model's own
    chat_template_kwargs  variables of the template, where a conversation brings none of the same name
    """

    def __init__(
        self,
        source: str | Path,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
        # Not AutoTokenizer: the classes that it picks by name rebuild normalizer and decoder, and ids change with them.
        from transformers import PreTrainedTokenizerFast

        try:
            self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(
                str(source),
                trust_remote_code=False,  # and no question whether it may be
                clean_up_tokenization_spaces=False,  # which would take spaces from the text before "!" and the like
            )
            self._ids = self._tokenizer.backend_tokenizer
            self._ids.no_truncation()
            self._ids.no_padding()
            self._added = self._ids.get_added_tokens_decoder()
            self._ids.encode("a", add_special_tokens=True)  # what is wrong with the special tokens is told here
        except BaseException as error:  # the library raises whatever a malformed file leads to, and Rust's panics
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            first = (str(error).strip().splitlines() or [""])[0]
            first = first if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {first}"
            raise ConfigError(
                f"tokenizer: {source} has none that loads ({first}); a tokenizer.json is needed"
            ) from None
        if self._tokenizer.init_kwargs.get("auto_map"):
            logger.warning("tokenizer: %s names code of its own (auto_map), which is not run", source)
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self._chat_defaults = chat_template_kwargs
        self._bytes: dict[int, bytes] = {}
        self._told_of_borders = False
        try:
            self._spelling = _Spelling(self._ids.decoder)
        except ConfigError as error:
            raise ConfigError(f"tokenizer: {source}: {error}") from None

    @property
    def hugging_face(self) -> Any:
        """The library's own object."""
        return self._tokenizer

    # -- text to tokens

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._encoding(text, add_special_tokens).ids

    def _encoding(self, text: str, add_special_tokens: bool) -> Any:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt: character {error.start} is half of a surrogate pair; accepted: text that UTF-8 can hold"
            ) from None
        try:
            return self._ids.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            raise ValueError(f"prompt: the tokenizer fails on it ({one_line(str(error), 200)})") from None

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Tokens of both together, and where the continuation begins, as lm-evaluation-harness has it
        (`TemplateLM._encode_pair`): spaces at the end of the context belong to the continuation, because tokens begin
        with them; an empty context is the model's first token. A token that spans the border is told once."""
        kept = context.rstrip()
        context, continuation = kept, context[len(kept) :] + continuation
        if context:
            both, before = self._encoding(context + continuation, True), self.encode(context, True)
            border = len(before)
            if 0 < border < len(both.ids) and both.offsets[border - 1][1] > len(context) and not self._told_of_borders:
                self._told_of_borders = True
                logger.warning(
                    "a token spans the end of %r and the beginning of %r: what it adds is left out, as in "
                    "lm-evaluation-harness; let continuations begin with a space or a line",
                    context[-20:], continuation[:20],
                )  # fmt: skip
            return [*before, *both.ids[border:]], border
        tokens = self.encode(continuation, False)
        first = [] if tokens[:1] == [self.first_token_id] else [self.first_token_id]
        return [*first, *tokens], 1

    @property
    def first_token_id(self) -> int:
        """What a text without context begins with: the beginning-of-sequence token, else the end token."""
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ValueError("tokenizer: it has neither a first nor an end token to stand for an empty context")

    @property
    def end_token_id(self) -> int | None:
        """Of tokenizer_config.json: what the model ends its turn with."""
        return self._tokenizer.eos_token_id

    # -- tokens to text

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """A text by itself. What a model has added to a prompt is `engine.text.output_text`."""
        return self._ids.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text's UTF-8; nothing for an id that the tokenizer does not have."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._spell(token)
        return found

    def first_bytes(self, token: int) -> bytes:
        """The same of the first token of a text, from which some tokenizers take a space."""
        data = self.token_bytes(token)
        return data if token in self._added else self._spelling.first(data)

    def _spell(self, token: int) -> bytes:
        if (added := self._added.get(token)) is not None:
            return self._spelling.added(added.content)
        text = self._ids.id_to_token(token)
        return b"" if text is None else self._spelling.bytes_of(text)

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        return tuple(self._added[i].content for i in self.special_ids)

    # -- conversations

    def chat(self, messages: Sequence[Any], settings: ChatSettings = PLAIN, now: datetime | None = None) -> str:
        """The conversation as the template renders it: what `transformers`' apply_chat_template makes of it, in a
        process with limits, because templates are programs. Raises ValueError, one line.

        now  the time for templates that write it (`strftime_now`); the clock's when not given
        """
        conversation = checked_messages(messages)
        if self._tokenizer.chat_template is None and settings.chat_template is None:
            raise ValueError("messages: this model has no chat template; use generate, or name one: chat_template")
        try:
            template = self._tokenizer.get_chat_template(settings.chat_template, settings.tools)
        except ValueError as error:  # several, and none by that name
            raise ValueError(f"chat_template: {one_line(str(error), 300)}") from None
        special = {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}
        variables = {**special, **settings.variables(self._chat_defaults)}
        if now is not None:
            template = _FIXED_TIME + template
            variables["time_directives"] = _directives(now)
        try:
            return limited.ask("chat", template=template, messages=conversation, settings=variables)
        except limited.LimitedError as error:  # also how a template refuses a role, or an order of roles
            raise ValueError(f"messages: the model's chat template refuses them ({error})") from None

    @property
    def chat_template(self) -> str:
        """Text of the template, of all of them where there are several; empty without one."""
        found = self._tokenizer.chat_template
        return "\n".join(found.values()) if isinstance(found, Mapping) else found or ""

    @property
    def writes_the_time(self) -> bool:
        """Whether a chat template asks for the time, so that a prompt depends on the day."""
        return "strftime_now" in self.chat_template

    @cached_property
    def added_tokens(self) -> dict[int, str]:
        """Texts of the tokens that were added to the vocabulary, special or not, by their ids."""
        return {i: token.content for i, token in self._added.items()}


def _is_panic(error: BaseException) -> bool:
    """Of a library in Rust; such as at the limit of a regular expression's steps."""
    return type(error).__name__ == "PanicException"


# Takes the place of the library's strftime_now, which reads the clock; a template is given plain data, no functions.
_FIXED_TIME = (
    "{% macro strftime_now(format) %}{% set now = namespace(text=format) %}"
    "{% for directive, value in time_directives.items() %}{% set now.text = now.text.replace(directive, value) %}"
    "{% endfor %}{{ now.text }}{% endmacro %}\n"
)


def _directives(now: datetime) -> dict[str, str]:
    """What strftime makes of each directive, those without padding ("%-d") first."""
    names = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBcdfGHIjmMpSuUVwWxXyYzZ"]
    return {name: now.strftime(name) for name in names} | {"%%": "%"}


class _Spelling:
    """How a tokenizer writes bytes in the names of its tokens, read from its decoder. Raises ConfigError for one that
    is not known: text made by guessing would be silently wrong."""

    def __init__(self, decoder: Any):
        parts = [] if decoder is None else _parts(json.loads(decoder.__getstate__()))
        kinds = [part["type"] for part in parts]
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._joined_by_spaces = decoder is None  # each token but the first has one before it
        self._replaced: list[tuple[str, str]] = []
        self._all_spaces = False  # the first token loses all its spaces, not one
        self._takes_space = decoder is None
        known = {"ByteLevel", "ByteFallback", "Fuse"}
        for at, part in enumerate(parts):
            match part:
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                    self._replaced.append((old, new))
                case {"type": "Metaspace", "replacement": str(old)}:
                    self._replaced.append((old, " "))
                    self._all_spaces = self._takes_space = part.get("prepend_scheme", "always") != "never"
                case {"type": "Strip", "content": " ", "start": 0 | 1, "stop": 0} if "Fuse" in kinds[:at]:
                    self._takes_space = self._takes_space or part["start"] == 1
                case _ if part["type"] not in known:
                    raise ConfigError(
                        f"decoder {json.dumps(part)} in tokenizer.json is not supported; accepted: ByteLevel, "
                        "Metaspace, or Replace, ByteFallback, Fuse and Strip of one space, as Llama 2 has them"
                    )
        if self._byte_level and (self._replaced or self._takes_space):
            raise ConfigError(
                f"decoder {'+'.join(kinds)} in tokenizer.json is not supported; accepted: ByteLevel alone"
            )

    def bytes_of(self, token: str) -> bytes:
        if self._byte_level:
            if all(character in _BYTE_OF for character in token):
                return bytes(_BYTE_OF[character] for character in token)
            return token.encode()
        for old, new in self._replaced:
            token = token.replace(old, new)
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return (" " + token if self._joined_by_spaces else token).encode()

    def added(self, content: str) -> bytes:
        """Of a token that was added to the vocabulary, which is written as it is."""
        return (" " + content if self._joined_by_spaces else content).encode()

    def first(self, data: bytes) -> bytes:
        if not self._takes_space:
            return data
        return data.replace(b" ", b"") if self._all_spaces else data.removeprefix(b" ")


def _parts(decoder: Any) -> list[dict[str, Any]]:
    """A decoder's steps, in order."""
    if decoder["type"] == "Sequence":
        return [part for inner in decoder["decoders"] for part in _parts(inner)]
    return [decoder]


def _bytes_of_characters() -> dict[str, int]:
    """Byte-level tokenizers write a byte as a character: printable ones as themselves, the others from U+0100 on, in
    order (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _bytes_of_characters()
