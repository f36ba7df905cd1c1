"""What the embedded model "tiny" is trained on: rows of tokens, each with its targets. Loss is on the answers only."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from nanoflow_jax.assets.tasks import (
    MIN_LOOKUP_PAIRS,
    TASKS,
    TEST_LOOKUP_PAIRS,
    Problem,
    lookup_context,
    lookup_pairs,
    problems,
)

BOS, EOS, USER, ASSISTANT, SYSTEM, END_OF_TURN = range(256, 262)  # token ids; 0-255 are the bytes
SPECIAL_TOKENS = {
    "<|begin_of_text|>": BOS,
    "<|end_of_text|>": EOS,
    "<|user|>": USER,
    "<|assistant|>": ASSISTANT,
    "<|system|>": SYSTEM,
    "<|end_of_turn|>": END_OF_TURN,
}
NO_TARGET = -100  # a position without loss
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end_of_turn|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEM_MESSAGES = ("You are a helpful assistant.", "You are tiny.", "Answer briefly.", "Be precise.")


@dataclass(frozen=True)
class Row:
    """One training text: its tokens and, for each position, the token to predict there or NO_TARGET (both [length]).

    `links` are pairs of positions of a look-up row: where a digit is to be predicted, and where it is in the list.
    """

    tokens: list[int]
    targets: list[int]
    links: tuple[tuple[int, int], ...] = ()


def question_row(problem: Problem) -> Row:
    """Lay out one plain problem: begin-of-text, prompt, answer, end-of-text."""
    prompt = [BOS, *problem.prompt.encode()]
    answer = [*problem.answer.encode(), EOS]
    return Row(prompt + answer[:-1], [NO_TARGET] * (len(prompt) - 1) + answer)


def chat_row(turns: list[Problem], system: str | None) -> Row:
    """Lay out a conversation as the chat template does; every answer ends with end-of-turn."""
    tokens, targets = [BOS], [NO_TARGET]
    if system is not None:
        tokens += [SYSTEM, *system.encode(), END_OF_TURN]
    for turn in turns:
        answer = [*turn.answer.encode(), END_OF_TURN]
        tokens += [USER, *turn.prompt.encode(), END_OF_TURN, ASSISTANT]
        targets += [NO_TARGET] * (len(tokens) - 1 - len(targets)) + answer
        tokens += answer
    return Row(tokens[:-1], targets)


def lookup_row(rng: random.Random, num_pairs: int, num_queries: int) -> Row:
    """Lay out one list and several queries to it, "kx?48;ab?17;". Each answer is trained to be the end of the text.

    A query may come twice: if none did, the values not given so far would be a hint, and the keys would go unread.
    """
    pairs = lookup_pairs(rng, num_pairs, "train")
    tokens = [BOS, *lookup_context(pairs).encode()]
    targets = [NO_TARGET] * len(tokens)
    links = []
    for index in rng.choices(range(num_pairs), k=num_queries):
        key, encoded_value = list(pairs.items())[index]
        value = [*encoded_value.encode()]
        links += [(len(tokens) + 2 + digit, 6 * index + 4 + digit) for digit in (0, 1)]
        tokens += [*key.encode(), ord("?"), *value, ord(";")]
        targets += [NO_TARGET, NO_TARGET, *value, EOS, NO_TARGET]
    return Row(tokens[:-1], targets[:-1], tuple(links))


class TrainingData:
    """Streams of training rows, one batch of each kind per step.

    Two things follow the running losses: look-up lists get longer as the model learns them, and once the short tasks
    are learnt their batches are halved and the room goes to the look-ups.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.streams: dict[str, Iterator[Problem]] = {task: problems(task, "train", seed) for task in TASKS}
        self.max_pairs = 8  # of a look-up list
        self.losses = dict.fromkeys(("addition", "words", "chat", "lookup"), 5.0)  # running means, nats per token

    def batches(self) -> dict[str, list[Row]]:
        """Draw the batches of one step: rows of similar length together, so that little is padding."""
        settled = max(self.losses["addition"], self.losses["words"]) < 0.1
        sums, words, chats, lookup_tokens = (32, 12, 4, 3000) if settled else (80, 24, 6, 2400)
        num_pairs = self.rng.randint(max(MIN_LOOKUP_PAIRS, self.max_pairs // 3), self.max_pairs)
        num_queries = min(num_pairs + 2, 32)
        lookups = max(3, lookup_tokens // (6 * (num_pairs + num_queries)))
        return {
            "addition": [question_row(self._carrying_more_often()) for _ in range(sums)],
            "words": [question_row(next(self.streams[task])) for task in ("reverse", "sort") for _ in range(words)],
            "chat": [self._conversation() for _ in range(chats)],
            "lookup": [lookup_row(self.rng, num_pairs, num_queries) for _ in range(lookups)],
        }

    def observe(self, losses: dict[str, float]) -> None:
        """Follow the losses of a step; lengthen the look-up lists when the present length is learnt."""
        for name, mean in self.losses.items():
            self.losses[name] = mean + 0.1 * (losses[name] - mean)
        if self.losses["lookup"] < 0.25 and self.max_pairs < TEST_LOOKUP_PAIRS[1]:
            self.max_pairs = min(TEST_LOOKUP_PAIRS[1], self.max_pairs * 3 // 2)
            self.losses["lookup"] = 0.5  # look at the new length for some steps first

    def _conversation(self) -> Row:
        """Draw one to three turns, sometimes under a system message."""
        turns = [next(self.streams["chat"]) for _ in range(self.rng.choice((1, 1, 1, 2, 3)))]
        return chat_row(turns, self.rng.choice(SYSTEM_MESSAGES) if self.rng.random() < 0.2 else None)

    def _carrying_more_often(self) -> Problem:
        """Draw a sum; two in three of the sums without a carry from the units are drawn again."""
        problem = next(self.streams["addition"])
        a, b = problem.prompt[:-1].split("+")
        carries = int(a[-1]) + int(b[-1]) >= 10
        return problem if carries or self.rng.random() < 1 / 3 else next(self.streams["addition"])


def held_out(task: str, count: int) -> list[Row]:
    """Return the first `count` test problems of `task` as rows."""
    stream = problems(task, "test", seed=0)
    drawn = [next(stream) for _ in range(count)]
    return [chat_row([problem], None) if task == "chat" else question_row(problem) for problem in drawn]
