"""A device simulated in NumPy, for tests of the real engine without a model.

It keeps what a device keeps: the contents of the pages, and per slot the latest token, the page tables and the token
counts. A "key and value" is a digest of its token, its position and the one before it *as found through the page
tables*; a sampled token is a digest of all contents found so, in tables with a window of those that it holds. Whatever
the host gets wrong (a page, a table, a slot, a token, a prefix that is not there) gives another token than `alone`,
which knows nothing of pages.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanoflow_jax.sampling_params import MAX_LOGPROBS, SamplingParams
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.logprobs import TokenLogprobs
from nanoflow_jax.step.sampler import Sampled, StepOutput
from nanoflow_jax.step.slots import SlotSizes, StepInputs, empty_inputs

VOCAB = 40
EOS = 7
LONGEST = 512
_MASK = 2**64 - 1
_WEIGHTS = np.random.default_rng(0).integers(1, 2**63, LONGEST, np.uint64)

Windows = tuple[int | None, ...]
Bias = tuple[frozenset[int], tuple[tuple[int, float], ...]]  # forbidden tokens, and the others' biases
NO_BIAS: Bias = (frozenset(), ())


def mix(*values: int) -> int:
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = ((state ^ (value & _MASK)) * 0xBF58476D1CE4E5B9) & _MASK
        state ^= state >> 29
    return state


def key_value(before: int, token: int, position: int, decoded: bool, table: int) -> int:
    return mix(before, token, position, decoded + 2 * table)


def sees_before(window: int | None) -> bool:
    """Whether a row sees the one before it."""
    return window is None or window > 1


def attend(contents: np.ndarray, window: int | None = None) -> int:
    """contents [n] uint64, of positions 0 to n - 1; the last `window` of them count."""
    first = 0 if window is None else max(0, len(contents) - window)
    return int((contents[first:] * _WEIGHTS[first : len(contents)]).sum())


def choose(attention: int, settings: Sequence[float], bias: Bias, history: int) -> int:
    forbidden, others = bias
    start = mix(attention, hash(tuple(settings)), hash(others), history)
    return next(token for i in range(VOCAB) if (token := (start + i) % VOCAB) not in forbidden)


def score(attention: int, token: int) -> float:
    return float(mix(attention, token) % 1000)


def history_of(prompt: Collection[int], output: Collection[int]) -> int:
    return (sum(mix(token) for token in set(prompt)) + sum(mix(token, 1) for token in output)) & _MASK


def bias_of(params: SamplingParams, forbidden: Collection[int]) -> Bias:
    return frozenset(forbidden), tuple(sorted((params.logit_bias or {}).items()))


def settings_of(params: SamplingParams, seed: int, position: int) -> tuple[float, ...]:
    floats = [
        float(np.float32(x))
        for x in (
            params.temperature, params.top_p, params.min_p, params.presence_penalty, params.frequency_penalty,
            params.repetition_penalty,
        )
    ]  # fmt: skip
    return (*floats, max(params.top_k, 0), seed, position)


@dataclass
class Answer:
    """What a request gives when it has the device to itself."""

    output: list[int]
    finish_reason: str
    logprobs: list[float]  # of the output
    prompt_scores: list[float]  # of the prompt, but the first


def letters(tokens: Sequence[int]) -> str:
    return "".join(chr(ord("A") + token) for token in tokens)


class Letters:
    """A tokenizer whose tokens are one character each."""

    special_ids: frozenset[int] = frozenset()
    special_texts: tuple[str, ...] = ()

    def token_bytes(self, token: int) -> bytes:
        return letters([token]).encode()

    first_bytes = token_bytes

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(character) - ord("A") for character in text]


def alone(
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    seed: int,
    max_length: int,
    phases: bool,
    scored_from: int = 0,
    windows: Windows = (None,),
) -> Answer:
    """max_length: of prompt and output; phases: rows that decode round differently; windows: of each page table."""
    answer = Answer([], "length", [], [])
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    strings = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
    penalised = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)
    contents: list[list[int]] = [[] for _ in windows]
    tokens = list(prompt)
    for position in range(max_length):
        decoded = phases and position >= len(prompt)
        before = sum(of[-1] for of, window in zip(contents, windows, strict=True) if of and sees_before(window))
        for table, of in enumerate(contents):
            of.append(key_value(before, tokens[position], position, decoded, table))
        attention = sum(attend(np.array(of, np.uint64), window) for of, window in zip(contents, windows, strict=True))
        if position + 1 < len(prompt):
            answer.prompt_scores.append(score(attention, tokens[position + 1]))
        elif len(tokens) < max_length:
            output = len(answer.output)
            bias = bias_of(params, stops if output < params.min_tokens else ())
            history = history_of(prompt, answer.output) if penalised else 0
            token = choose(attention, settings_of(params, seed, len(tokens)), bias, history)
            tokens.append(token)
            answer.output.append(token)
            answer.logprobs.append(score(attention, token))
            ended = len(answer.output) >= params.min_tokens and any(letters(answer.output).endswith(s) for s in strings)
            if token in stops or ended:
                answer.finish_reason = "stop"
                break
    answer.prompt_scores = answer.prompt_scores[scored_from:] if params.prompt_logprobs is not None else []
    return answer


class _Unreadable:
    """Tokens of a step that failed on the device: the host sees it when it reads them."""

    def __init__(self, error: Exception):
        self._error = error

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise self._error


class FakeRunner:
    """As `Runner`, with the device in NumPy.

    phases   rows that decode give other contents than rows that prefill: the rounding that deterministic mode avoids
    fails    asked before each step whether it fails, with its inputs
    at_once  a failing step raises when it is dispatched; else when its tokens are read
    """

    def __init__(
        self, sizes: SlotSizes, num_pages: int, page_size: int, phases: bool = False, windows: Windows = (None,)
    ):
        self.sizes, self.num_pages, self.page_size, self.phases = sizes, num_pages, page_size, phases
        self.windows = windows
        self.fails: Callable[[StepInputs], bool] = lambda inputs: False
        self.at_once = True
        self.allowed: dict[int, np.ndarray] = {}  # of rows, while a step runs: bits of the tokens
        self.num_steps = 0
        self.reset()

    def reset(self) -> None:
        """What was there is lost: anything may be there."""
        rng, slots = np.random.default_rng(1), self.sizes.slots
        self.contents = rng.integers(1, 2**63, (self.num_pages, self.page_size), np.uint64)
        self.tokens = rng.integers(0, VOCAB, slots, np.int32)
        shape = (slots, len(self.windows), self.sizes.table_width // len(self.windows))
        self.tables = rng.integers(0, self.num_pages, shape, np.int32)
        self.history = [mix(slot, 5) for slot in range(slots)]
        self.biases: list[Bias] = [(frozenset(), ((0, float(row)),)) for row in range(self.sizes.bias_rows)]
        self.broken = False

    def extract(self, pages: Sequence[int]) -> list[np.ndarray]:
        return [self.contents[page].copy() for page in pages]

    def insert(self, pages: Sequence[int], contents: Sequence[np.ndarray]) -> None:
        for page, content in zip(pages, contents, strict=True):
            self.contents[page] = content

    def begin(self, shape: StepShape, inputs: StepInputs) -> tuple[StepShape, StepInputs]:
        return shape, inputs

    def finish(self, begun: tuple[StepShape, StepInputs], allowed: dict[int, np.ndarray]) -> StepOutput:
        self.allowed = {row: np.unpackbits(mask, bitorder="little") for row, mask in allowed.items()}
        try:
            return self.dispatch(*begun)
        finally:
            self.allowed = {}

    def dispatch(self, shape: StepShape, inputs: StepInputs) -> StepOutput:
        self.num_steps += 1
        assert not self.broken or not self.at_once, "a step after one that failed, without a reset"
        self._check(shape, inputs)
        if self.broken or self.fails(inputs):
            self.broken = True
            error = RuntimeError("the device failed\nand here is why")
            if self.at_once:
                raise error
            return StepOutput(Sampled(_Unreadable(error), _no_logprobs(0)), _no_logprobs(0))
        return self._step(shape, inputs)

    def _check(self, shape: StepShape, inputs: StepInputs) -> None:
        like = empty_inputs(shape, self.num_pages, self.sizes.slots, self.sizes.bias_rows)
        for name in ("token_ids", "positions", "write_pages", "slots", "prefill_table", "prefill_starts", "targets"):
            mine, wanted = getattr(inputs, name), getattr(like, name)
            assert mine.shape == wanted.shape and mine.dtype == wanted.dtype, name
        written = np.flatnonzero(inputs.write_pages != self.num_pages)
        assert ((inputs.write_pages >= 0) & (inputs.write_pages <= self.num_pages)).all()
        slots = np.tile(inputs.positions % self.page_size, len(self.windows))
        places = inputs.write_pages[written] * self.page_size + slots[written]
        assert len(set(places.tolist())) == len(places), "two rows write to the same place"
        slots = inputs.slots[inputs.slots != self.sizes.slots].tolist()
        assert len(set(slots)) == len(slots), "a slot is in the step twice"

    def _step(self, shape: StepShape, inputs: StepInputs) -> StepOutput:
        size, decode = self.page_size, shape.decode_rows
        write_pages = inputs.write_pages.reshape(len(self.windows), -1)
        sampled = np.zeros(shape.sampled_rows, np.int32)
        logprobs, scores = _no_logprobs(shape.sampled_rows), _no_logprobs(shape.prefill_rows)
        rows: list[tuple[int, range]] = [(place, range(place, place + 1)) for place in range(decode)]
        starts = (inputs.prefill_starts + decode).tolist()
        rows += [(decode + i, range(starts[i], starts[i + 1])) for i in range(shape.prefill_segments)]
        for place, its_rows in rows:
            slot = int(inputs.slots[place])
            if slot == self.sizes.slots:
                assert place < decode or not its_rows, "rows of no slot"
                continue
            if place >= decode:
                self.tables[slot] = inputs.prefill_table[place - decode].reshape(len(self.windows), -1)
            attention = 0
            for row in its_rows:
                position, pages = int(inputs.positions[row]), write_pages[:, row]
                token = int(inputs.token_ids[row])
                if place < decode:
                    self.tables[slot, :, position // size] = pages
                    token = int(self.tokens[slot]) if token < 0 else token
                before = 0
                for table, window in zip(self.tables[slot], self.windows, strict=True):
                    if position and sees_before(window):
                        before += int(self.contents[table[(position - 1) // size], (position - 1) % size])
                decoded = self.phases and place < decode
                for number, page in enumerate(pages):
                    self.contents[page, position % size] = key_value(before, token, position, decoded, number)
                target = int(inputs.targets[row - decode]) if place >= decode else -1
                if target >= 0 or row == its_rows[-1]:
                    attention = sum(
                        attend(self.contents[table[: position // size + 1]].reshape(-1)[: position + 1], window)
                        for table, window in zip(self.tables[slot], self.windows, strict=True)
                    )
                if target >= 0:
                    scores.logprob[row - decode] = score(attention, target)
                    scores.top_tokens[row - decode, : int(inputs.target_logprobs[0])] = target
            sampled[place] = self._sample(inputs, place, attention)
            self.tokens[slot] = sampled[place]
            if inputs.sampling.top_logprobs[place] >= 0:
                logprobs.logprob[place] = score(attention, int(sampled[place]))
        return StepOutput(Sampled(sampled, logprobs), scores)

    def _sample(self, inputs: StepInputs, place: int, attention: int) -> int:
        s = inputs.sampling
        names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        settings = [float(getattr(s, name)[place]) for name in names]
        settings += [int(s.top_k[place]), int(s.seed[place]), int(s.position[place])]
        row, history = int(s.bias[place]), int(s.history[place])
        counted = history != self.sizes.slots
        bias = NO_BIAS if row == self.sizes.bias_rows else self.biases[row]
        if (mask := self.allowed.get(place)) is not None:
            bias = bias[0] | set(np.flatnonzero(mask[:VOCAB] == 0).tolist()), bias[1]
        token = choose(attention, settings, bias, self.history[history] if counted else 0)
        if counted:
            self.history[history] = (self.history[history] + mix(token, 1)) & _MASK
        return token


def _no_logprobs(rows: int) -> TokenLogprobs:
    return TokenLogprobs(
        logprob=np.zeros(rows, np.float32),
        rank=np.zeros(rows, np.int32),
        top_tokens=np.zeros((rows, MAX_LOGPROBS), np.int32),
        top_logprobs=np.zeros((rows, MAX_LOGPROBS), np.float32),
    )


class FakeTables:
    """As `SamplerTables`."""

    def __init__(self, runner: FakeRunner):
        self._runner = runner
        self.refuses: Callable[[SamplingParams], bool] = lambda params: False  # raises at the admission of these
        self.reset()

    def reset(self) -> None:
        self.users: Counter[int] = Counter()
        self._rows: dict[Bias, int] = {}

    def acquire(self, params: SamplingParams, stop_tokens: Collection[int]) -> tuple[int, int] | None:
        if self.refuses(params):
            raise ValueError("not this one")
        count = self._runner.sizes.bias_rows
        then = bias_of(params, ())
        wanted = (bias_of(params, stop_tokens) if params.min_tokens else then, then)
        taken: list[int] = []
        for bias in wanted:
            row = count if bias == NO_BIAS else self._rows.get(bias)
            if row is None:
                row = next((i for i in range(count) if not self.users[i]), None)
                if row is None:
                    for other in taken:
                        self.release(other)
                    return None
                self._rows = {b: r for b, r in self._rows.items() if r != row} | {bias: row}
                self._runner.biases[row] = bias
            self.users[row] += row != count
            taken.append(row)
        return taken[0], taken[1]

    def release(self, row: int) -> None:
        if row != self._runner.sizes.bias_rows:
            assert self.users[row] > 0, "released twice"
            self.users[row] -= 1

    def write_history(self, row: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        self._runner.history[row] = history_of(prompt, output)


@dataclass
class FakeStore:
    """As `OffloadStore`: so many pages, the one unused longest goes first. Every `damage`-th page that is asked for
    turns out to be unreadable."""

    most: int
    damage: int = 0
    pages: OrderedDict[bytes, np.ndarray] = field(default_factory=OrderedDict)
    asked: int = 0
    given: int = 0

    def put(self, keys: Sequence[bytes], contents: Sequence[np.ndarray]) -> None:
        for key, content in zip(keys, contents, strict=True):
            self.pages[key] = content.copy()
            self.pages.move_to_end(key)
        while len(self.pages) > self.most:
            self.pages.popitem(last=False)

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        for key in keys:
            if key in self.pages:
                self.pages.move_to_end(key)
        return [i for i, key in enumerate(keys) if key not in self.pages]

    def count(self, keys: Sequence[bytes]) -> int:
        return next((i for i, key in enumerate(keys) if key not in self.pages), len(keys))

    def get(self, keys: Sequence[bytes]) -> list[np.ndarray]:
        found = []
        for key in keys[: self.count(keys)]:
            self.asked += 1
            if self.damage and self.asked % self.damage == 0:
                del self.pages[key]
                break
            self.pages.move_to_end(key)
            found.append(self.pages[key])
        self.given += len(found)
        return found
