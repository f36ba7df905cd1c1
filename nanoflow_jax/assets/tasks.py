"""The five small tasks of the embedded model "tiny": problems that have exactly one right answer.

The same generators feed the training of the model and the library's own evaluation. `problems(task, split, seed)` is an
endless, deterministic stream. A problem belongs to "test" or to "train" by a stable hash of what is being asked, so the
two splits share no problem whatever the seed, and `chat` shares the split of the task it wraps:

    addition  "12+30="          -> "42"      numbers 0-99; by the unordered pair, so 30+12 is held out with 12+30
    reverse   "reverse abcd="   -> "dcba"    2-10 lower-case letters; by the letters
    sort      "sort 52917="     -> "12579"   2-8 digits, or 2-8 letters; by the symbols
    lookup    "kx=48;ab=17;kx?" -> "48"      a list of key=value; by the list
    chat      "What is 12+30?"  -> "12+30=42"   the prompt is the user's message; the caller applies the chat template

One token is one byte, so a prompt's length in tokens is its length in bytes plus one (the begin-of-text token).
Standard library only.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]

TASKS = ("addition", "reverse", "sort", "lookup", "chat")

HELD_OUT_EVERY = 8  # one problem in eight is held out for testing

MIN_LOOKUP_PAIRS = 2
TEST_LOOKUP_PAIRS = (50, 82)  # a pair takes 6 tokens: prompts of 304 to 496 tokens
_KEYS = tuple(a + b for a in string.ascii_lowercase for b in string.ascii_lowercase)

GREETING = "Hello! I can add, reverse, sort and look things up."
IDENTITY = "I am tiny, a small LLaMA that adds, reverses, sorts and looks things up."
FIXED_REPLIES = {
    "Hello": GREETING,
    "Hello!": GREETING,
    "Hi": GREETING,
    "Hi!": GREETING,
    "Who are you?": IDENTITY,
    "What can you do?": IDENTITY,
    "Thanks": "You are welcome.",
    "Thank you": "You are welcome.",
}


@dataclass(frozen=True)
class Problem:
    """One question and its only right answer, both without special tokens."""

    task: str
    prompt: str
    answer: str


def problems(task: str, split: Split, seed: int) -> Iterator[Problem]:
    """Yield problems of `task` without end; the same arguments give the same stream.

    `addition` goes through all pairs of the split in a random order before it repeats one: the first 1,000 test
    problems are different pairs of two-digit numbers. The other streams draw at random; a short problem may come twice.
    """
    if task not in _STREAMS:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: expected 'train' or 'test'")
    return _STREAMS[task](random.Random(f"{task}/{split}/{seed}"), split)


def lookup_pairs(rng: random.Random, num_pairs: int, split: Split) -> dict[str, str]:
    """Draw `num_pairs` different two-letter keys with two-digit values, as a list that belongs to `split`."""
    while True:
        pairs = {key: f"{rng.randrange(100):02d}" for key in rng.sample(_KEYS, num_pairs)}
        if split_of(lookup_context(pairs)) == split:
            return pairs


def lookup_context(pairs: dict[str, str]) -> str:
    """Write pairs as "kx=48;ab=17;": six tokens each."""
    return "".join(f"{key}={value};" for key, value in pairs.items())


def split_of(key: str) -> Split:
    """Return the split that a problem with this identity belongs to: the same on every machine and in every run."""
    return "test" if zlib.crc32(key.encode()) % HELD_OUT_EVERY == 0 else "train"


def addition_split(a: int, b: int) -> Split:
    """Return the split of a + b. Pairs with a one-digit number are all for training: there are too few to spare."""
    return split_of(f"{min(a, b)}+{max(a, b)}") if min(a, b) >= 10 else "train"


def _addition(rng: random.Random, split: Split) -> Iterator[Problem]:
    for a, b in _addends(rng, split):
        yield Problem("addition", f"{a}+{b}=", str(a + b))


def _reverse(rng: random.Random, split: Split) -> Iterator[Problem]:
    while True:
        word = _symbols(rng, split, string.ascii_lowercase, 10)
        yield Problem("reverse", f"reverse {word}=", word[::-1])


def _sort(rng: random.Random, split: Split) -> Iterator[Problem]:
    while True:
        symbols = _symbols(rng, split, rng.choice((string.digits, string.ascii_lowercase)), 8)
        yield Problem("sort", f"sort {symbols}=", "".join(sorted(symbols)))


def _lookup(rng: random.Random, split: Split) -> Iterator[Problem]:
    shortest, longest = TEST_LOOKUP_PAIRS if split == "test" else (MIN_LOOKUP_PAIRS, TEST_LOOKUP_PAIRS[1])
    while True:
        pairs = lookup_pairs(rng, rng.randint(shortest, longest), split)
        key = rng.choice(list(pairs))
        yield Problem("lookup", f"{lookup_context(pairs)}{key}?", pairs[key])


def _chat(rng: random.Random, split: Split) -> Iterator[Problem]:
    """Mix sums (1/2), words to reverse (1/6), symbols to sort (1/6) and fixed phrases (1/6; alike in both splits)."""
    addends = _addends(rng, split)
    while True:
        kind = rng.randrange(6)
        if kind < 3:
            a, b = next(addends)
            yield Problem("chat", f"What is {a}+{b}?", f"{a}+{b}={a + b}")
        elif kind == 3:
            word = _symbols(rng, split, string.ascii_lowercase, 10)
            yield Problem("chat", f"Reverse {word}", word[::-1])
        elif kind == 4:
            symbols = _symbols(rng, split, rng.choice((string.digits, string.ascii_lowercase)), 8)
            yield Problem("chat", f"Sort {symbols}", "".join(sorted(symbols)))
        else:
            message, reply = rng.choice(list(FIXED_REPLIES.items()))
            yield Problem("chat", message, reply)


def _addends(rng: random.Random, split: Split) -> Iterator[tuple[int, int]]:
    """Go through the pairs of the split again and again, each time in a new order."""
    pairs = [(a, b) for a in range(100) for b in range(100) if addition_split(a, b) == split]
    while True:
        rng.shuffle(pairs)
        yield from pairs


def _symbols(rng: random.Random, split: Split, alphabet: str, longest: int) -> str:
    """Draw a string of 2 to `longest` symbols that belongs to `split`; every length is as likely."""
    length = rng.randint(2, longest)
    while True:
        symbols = "".join(rng.choices(alphabet, k=length))
        if split_of(symbols) == split:
            return symbols


_STREAMS = {"addition": _addition, "reverse": _reverse, "sort": _sort, "lookup": _lookup, "chat": _chat}
