"""From tokens to the text of an output: one way for `generate`, streams, batches and stop strings.

The text is what the tokens add to the text of the prompt. It is made from the tokens' bytes, so it only grows, and
characters that are split over tokens come when they are whole.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what stands for bytes that are no character
MOST_BYTES = 4  # of a character


class GrowingText:
    """The text of a sequence's output. `text` holds whole characters only, and ends in no replacement character, until
    `finish`."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""
        self._held = ""  # replacement characters at the end
        self._is_first = True  # nothing precedes the next token
        tail = b""
        for token in reversed(prompt_token_ids):
            if token not in self._skipped:
                self._is_first = False
                tail = tokenizer.token_bytes(token) + tail
                if len(tail) >= MOST_BYTES:
                    break
        self._decoder.decode(tail)  # a character that the prompt has begun is the output's, if it is completed
        self._begun = bool(self._decoder.getstate()[0])

    def add(self, token: int) -> str:
        """Takes a token; returns what it adds to `text`, which may be nothing yet."""
        return self.extend((token,))

    def extend(self, tokens: Iterable[int]) -> str:
        """Takes tokens; returns what they add to `text`."""
        shown = [token for token in tokens if token not in self._skipped]
        pieces = list(map(self._tokenizer.token_bytes, shown))
        if self._is_first and shown:
            pieces[0], self._is_first = self._tokenizer.first_bytes(shown[0]), False
        data = b"".join(pieces)
        if self._begun and data:
            if not 0x80 <= data[0] < 0xC0:  # it does not go on with the prompt's character
                self._decoder.reset()
            self._begun = False
        return self._grow(self._decoder.decode(data))

    def finish(self) -> str:
        """No token follows: bytes that wait for the rest of a character become a replacement character."""
        if self._begun:
            self._decoder.reset()
        return self._grow(self._decoder.decode(b"", final=True), final=True)

    @property
    def length(self) -> int:
        """Characters so far, with those that are held back."""
        return len(self.text) + len(self._held)

    def _grow(self, more: str, final: bool = False) -> str:
        if not more and not final:
            return ""
        added = self._held + more
        whole = added if final else added.rstrip(REPLACEMENT)
        self._held = added[len(whole) :]
        self.text += whole
        return whole


def output_text(
    tokenizer: Tokenizer, prompt_token_ids: Sequence[int], token_ids: Iterable[int], skip_special_tokens: bool
) -> str:
    """The text of an output that has ended."""
    text = GrowingText(tokenizer, prompt_token_ids, skip_special_tokens)
    text.extend(token_ids)
    text.finish()
    return text.text


def text_offsets(
    tokenizer: Tokenizer, prompt_token_ids: Sequence[int], token_ids: Iterable[int], skip_special_tokens: bool
) -> list[int]:
    """For each token of an output, where in its text the token's character, or its first one, begins."""
    text, found = GrowingText(tokenizer, prompt_token_ids, skip_special_tokens), []
    for token in token_ids:
        found.append(text.length)
        text.add(token)
    return found


class WatchedText:
    """The text of an output that is looked at while it grows: by a stream, or for stop strings.

    A stop string that holds the text of a special token is found where that token is, also where the text shows no
    special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams):
        self._shown = GrowingText(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._keep_stop = params.include_stop_str_in_output
        self._special_ids = tokenizer.special_ids
        special = []
        if params.skip_special_tokens:
            special = [stop for stop in params.stop_strings if any(t in stop for t in tokenizer.special_texts)]
        self._special = tuple(special)
        self._stops = tuple(stop for stop in params.stop_strings if stop not in special)
        self._whole = GrowingText(tokenizer, prompt_token_ids, False) if special else None
        self._hidden: list[tuple[int, int]] = []  # where in the whole text special tokens are
        self.text = ""

    def add(self, token: int, may_stop: bool = True) -> str | None:
        """Takes a token; returns the stop string that it completes, at which `text` then ends."""
        added = len(self._shown.add(token))
        self.text = self._shown.text
        found = find_stop(self._shown.text, added, self._stops) if added and may_stop else None
        if found is not None:
            at, stop = found
            self.text = self.text[:at] + (stop if self._keep_stop else "")
        if self._whole is not None and (hidden := self._find_special(token)) is not None and may_stop:
            at, stop = hidden
            if found is None or at < found[0]:
                self.text = self._shown.text[:at] + (stop if self._keep_stop else "")
                return stop
        return None if found is None else found[1]

    def _find_special(self, token: int) -> tuple[int, str] | None:
        """A stop string with a special token that `token` completes, and where in the shown text it begins."""
        assert self._whole is not None
        before = len(self._whole.text)
        added = len(self._whole.add(token))
        if token in self._special_ids:
            self._hidden.append((before, before + added))
        found = find_stop(self._whole.text, added, self._special) if added else None
        if found is None:
            return None
        at, stop = found
        return at - sum(min(end, at) - min(start, at) for start, end in self._hidden), stop


def find_stop(text: str, added: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the earliest of `stops` begins, given that it must touch the last `added` characters of text; and which."""
    found = ((text.find(stop, max(0, len(text) - added - len(stop) + 1)), stop) for stop in stops)
    return min((place for place in found if place[0] >= 0), default=None)
