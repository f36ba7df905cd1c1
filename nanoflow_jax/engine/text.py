"""Text that grows token by token: for streams and stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from nanoflow_jax.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # how a tokenizer shows bytes that do not make a character yet
CONTEXT = 5  # tokens before the new ones that are decoded with them: spaces and characters may depend on neighbours


class GrowingText:
    """The text of a sequence's output. `text` holds whole characters only."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._tokens = list(prompt_token_ids[-CONTEXT:])
        self._start = 0  # of the tokens that are decoded together
        self._read = len(self._tokens)  # tokens before it are in `text`
        self.text = ""

    def add(self, token: int) -> str:
        """Takes a token; returns what it adds to `text`, which may be nothing yet."""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._start : self._read], self._skip)
        now = self._tokenizer.decode(self._tokens[self._start :], self._skip)
        if len(now) <= len(before) or now.endswith(REPLACEMENT):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        self.text += now[len(before) :]
        return now[len(before) :]


def find_stop(text: str, added: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the earliest of `stops` begins, given that it must touch the last `added` characters of text; and which."""
    found = ((text.find(stop, max(0, len(text) - added - len(stop) + 1)), stop) for stop in stops)
    return min((place for place in found if place[0] >= 0), default=None)
