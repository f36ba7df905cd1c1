"""An output's thought, apart from its answer: by a pair of tags, or by the channels of the harmony format.

Where a thought begins and ends is found by the tags' own tokens where the tokenizer has them, also where the text does
not show them; else by their text. The parts are slices of the output's text, so a stream's parts only grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.text import GrowingText
from nanoflow_jax.tokenizer import Tokenizer

PAIRS = (
    ("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"), ("<thinking>", "</thinking>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)  # fmt: skip
START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
RETURN, CALL = "<|return|>", "<|call|>"
FINAL = "final"  # the channel of answers


class Thought:
    """Follows an output's tokens to where its answer begins. `may_begin`: tokens that begin a thought as the output's
    first one; where none of them comes, the answer begins at once.

    inside  the output begins inside a thought
    ended   whether tokens of a thought, of which the latest was added, end there
    """

    def __init__(self, may_begin: Sequence[int], inside: bool, ended: Callable[[list[int]], bool]):
        self.may_begin: Sequence[int] = () if inside else may_begin
        self.goes_on = inside
        self._ended, self._tokens = ended, list[int]()

    def take(self, token: int) -> bool:
        """Whether the token is of the thought; none is after one that is not."""
        begins, self.may_begin = token in self.may_begin, ()
        if not begins and not self.goes_on:
            return False
        self._tokens.append(token)
        self.goes_on = not self._ended(self._tokens)
        return True


Parts = tuple[str | None, str | None]  # thought and answer; None: there was none, and not yet one


class Marks:
    """Where given tokens stand in an output's text. Takes tokens as they come."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool, wanted: frozenset[int]):
        self._text, self._wanted = GrowingText(tokenizer, prompt, skip_special_tokens), wanted
        self._looked = self._read = 0
        self.found: list[tuple[int, int, int]] = []  # token, where its text begins, where it ends

    def take(self, tokens: Sequence[int]) -> list[tuple[int, int, int]]:
        """All marks of an output so far, which is `tokens`."""
        for at in range(self._looked, len(tokens)):
            if tokens[at] in self._wanted:
                self._text.extend(tokens[self._read : at])
                begin = self._text.length
                self._text.add(tokens[at])
                self._read = at + 1
                self.found.append((tokens[at], begin, self._text.length))
        self._looked = len(tokens)
        return self.found


@dataclass(frozen=True)
class Tags:
    """A pair of tags; with ids where each is a token of its own. A thought stands at the beginning of an output, alone
    in it or with an answer behind; the prompt may have begun it."""

    begin: str
    end: str
    ids: tuple[int, int] | None

    def __str__(self) -> str:
        return f"{self.begin} {self.end}"

    @property
    def marks(self) -> frozenset[int]:
        return frozenset(self.ids or ())

    def split(
        self, tokenizer: Tokenizer, prompt: Sequence[int], marks: list[tuple[int, int, int]], text: str, ended: bool
    ) -> Parts:
        inside = self._is_inside(tokenizer, prompt)
        if self.ids is None:
            return self._split_text(text, inside, ended)
        begin, (opened, closed) = 0, self.ids
        if not inside:
            if not marks or marks[0][0] != opened or text[: marks[0][1]].strip():
                return None, text
            begin, marks = marks[0][2], marks[1:]
        for token, at, after in marks:
            if token == closed:
                return text[begin:at].strip(), text[after:].lstrip()
        return text[begin:].strip(), None

    def thought(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> Thought:
        """Raises ValueError where it could not be told where the thought ends."""
        inside = self._is_inside(tokenizer, prompt)
        if self.ids is None:
            if inside:
                raise ValueError(f"{self.end}, at which the prompt's thought ends, is no token of its own")
            return Thought((), False, lambda tokens: True)
        opened, closed = self.ids
        return Thought((opened,), inside, lambda tokens: tokens[-1] == closed)

    def _split_text(self, text: str, inside: bool, ended: bool) -> Parts:
        begin = 0
        if not inside:
            start = text.lstrip()
            if not start.startswith(self.begin):
                may_become = not ended and self.begin.startswith(start)
                return None, "" if may_become else text
            begin = len(text) - len(start) + len(self.begin)
        at = text.find(self.end, begin)
        if at >= 0:
            return text[begin:at].strip(), text[at + len(self.end) :].lstrip()
        thought = text[begin:]
        if not ended:  # a part of the tag may be there already
            held = next((n for n in range(len(self.end) - 1, 0, -1) if thought.endswith(self.end[:n])), 0)
            thought = thought[: len(thought) - held]
        return thought.strip(), None

    def _is_inside(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
        """Whether the prompt ends inside a thought: templates begin one, and so may a message that is continued. In
        what a user writes no tag counts, because an added token (whose turn it is) follows."""
        tail: list[int] = []
        for token in reversed(prompt):
            if self.ids is not None and token == self.ids[0]:
                return True
            if tokenizer.added_tokens.get(token, self.begin) != self.begin:
                break
            tail.append(token)
        if self.ids is not None:
            return False
        return tokenizer.decode(tail[::-1]).rstrip().endswith(self.begin)


@dataclass(frozen=True)
class Harmony:
    """Messages in channels, as gpt-oss writes them: `<|channel|>NAME<|message|>text<|end|>`. What is in "final" is the
    answer, and what is elsewhere the thought."""

    start: int
    channel: int
    message: int
    ends: frozenset[int]

    def __str__(self) -> str:
        return "harmony"

    @property
    def marks(self) -> frozenset[int]:
        return self.ends | {self.start, self.channel, self.message}

    def split(
        self, tokenizer: Tokenizer, prompt: Sequence[int], marks: list[tuple[int, int, int]], text: str, ended: bool
    ) -> Parts:
        opening = self._opening(prompt)
        if opening is None:  # the prompt has no message open: text without any header is an answer
            header, named, name = None, False, FINAL
        else:
            header, named, name = "", False, None
            for token in opening:
                if token == self.channel:
                    header, named = "", True
                elif token == self.message:
                    header, name = None, _channel(header or "", named)
                elif header is not None:
                    header += tokenizer.decode([token])
        begin, parts = 0, list[tuple[str, str]]()
        for token, at, after in marks:
            if token == self.message:
                if header is None:
                    continue
                name, header = _channel(header + text[begin:at], named), None
            else:
                if name is not None and (name != FINAL or text[begin:at].strip()):
                    parts.append((name, text[begin:at]))
                name, named = None, token == self.channel
                header = None if token in self.ends else ""
            begin = after
        if name is not None:
            parts.append((name, text[begin:]))
        thoughts = [part.strip() for channel, part in parts if channel != FINAL]
        answers = [part for channel, part in parts if channel == FINAL]
        return "\n".join(filter(None, thoughts)) if thoughts else None, "\n".join(answers) if answers else None

    def thought(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> Thought:
        """The answer begins behind the header of a message in the channel of answers."""
        opening = self._opening(prompt)

        def ended(tokens: list[int]) -> bool:
            if tokens and tokens[-1] != self.message:
                return False
            tokens = [*(opening or ()), *tokens]
            if self.channel not in tokens:
                return False
            at = len(tokens) - 1 - tokens[::-1].index(self.channel)
            return _channel(tokenizer.decode(tokens[at + 1 : -1]), True) == FINAL

        if opening is not None and self.message in opening:
            return Thought((), not ended([]), ended)
        return Thought((self.channel,), opening is not None, ended)

    def _opening(self, prompt: Sequence[int]) -> Sequence[int] | None:
        """The beginning of a message that the prompt leaves open, behind its start; None: it leaves none open."""
        for at in range(len(prompt) - 1, -1, -1):
            if prompt[at] == self.start:
                return prompt[at + 1 :]
            if prompt[at] in self.ends:
                return None
        return None


def _channel(header: str, named: bool) -> str:
    """Of a message, by the text behind <|channel|> in its header; without that it is an answer."""
    words = header.split()
    return words[0] if named and words else FINAL


Reasoning = Tags | Harmony


def find_reasoning(tokenizer: Tokenizer, parser: str | None) -> Reasoning | None:
    """What keeps thoughts and answers apart: as the option `reasoning_parser` says, else by the tokens that the
    tokenizer has, else by the tags that the chat template names; None: nothing does. Raises ConfigError."""
    added = {text: token for token, text in tokenizer.added_tokens.items()}
    if parser == "none":
        return None
    if parser == "harmony" or (parser is None and all(token in added for token in (START, CHANNEL, MESSAGE, END))):
        if missing := [token for token in (START, CHANNEL, MESSAGE, END) if token not in added]:
            raise ConfigError(f"reasoning_parser: 'harmony' needs the token {missing[0]}, which the tokenizer has not")
        ends = frozenset(added[token] for token in (END, RETURN, CALL) if token in added)
        return Harmony(added[START], added[CHANNEL], added[MESSAGE], ends)
    if parser is not None:
        begin, end = parser.split()
        return _tags(added, begin, end)
    for begin, end in PAIRS:
        if begin in added and end in added:
            return _tags(added, begin, end)
    for begin, end in PAIRS:
        if end in tokenizer.chat_template:  # which takes thoughts out of earlier turns, and may not name the beginning
            return _tags(added, begin, end)
    return None


def _tags(added: Mapping[str, int], begin: str, end: str) -> Tags:
    return Tags(begin, end, (added[begin], added[end]) if begin in added and end in added else None)
