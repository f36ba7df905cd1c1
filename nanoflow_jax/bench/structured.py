"""What structured outputs cost: the requests beside them, and the host per constrained row.

The same requests run twice in turns, all without a form and with a form for a share of them; all sample, and all have
the same length, so that what differs is the masks. The host's part is measured apart, also for a vocabulary that the
model at hand does not have.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from nanoflow_jax.api import LLM
from nanoflow_jax.engine.structured import Grammars
from nanoflow_jax.sampling_params import SamplingParams, StructuredOutputsParams

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"items": {"type": "string"}}},
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ENDLESS = StructuredOutputsParams(json={"type": "array", "items": PERSON, "minItems": 10_000})


@dataclass(frozen=True)
class Pair:
    """Seconds until the last request without a form had ended, those requests' tokens per second in the run of all
    without a form and in the mixed one, and what of a mixed run's time the host spent on masks."""

    free_seconds: float
    mixed_seconds: float
    steps: tuple[int, int]  # of the two runs
    mask_us: float  # of the host, for each constrained row and step: taking tokens and computing masks

    @property
    def ratio(self) -> float:
        """Throughput of a request without a form beside those with one, over that beside others without."""
        return self.free_seconds / self.mixed_seconds


@dataclass(frozen=True)
class HostCost:
    """Microseconds of the host for each constrained row and step, with a vocabulary of `vocab` made-up tokens."""

    vocab: int
    rows: int
    form: str
    mask_us: float  # rows one after another
    take_us: float
    both_us: float  # all rows of a step at once, by as many threads as the engine takes
    build_seconds: float  # of the tokenizer, once


@dataclass(frozen=True)
class StructuredCost:
    requests: int
    constrained: int
    output_tokens: int
    pairs: tuple[Pair, ...]

    @property
    def ratio(self) -> float:
        return median(pair.ratio for pair in self.pairs)


def measure_structured(llm: LLM, share: float, prompt: int, output: int, repeats: int) -> StructuredCost:
    """As many requests as there are slots, of `prompt` tokens, `share` of them constrained; one run to warm up."""
    count = llm.engine.running.count
    every = round(1 / share)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, min(200, llm.config.vocab_size), prompt).tolist() for _ in range(count)]
    constrained = [number % every == every - 1 for number in range(count)]

    def run(mixed: bool) -> tuple[float, int, float]:
        engine, spent = llm.engine, 0.0
        with _Timed(engine.grammars) as timed:
            waiting = set()
            for number, (tokens, one) in enumerate(zip(prompts, constrained, strict=True)):
                form = ENDLESS if mixed and one else None
                params = SamplingParams(
                    temperature=1.0, seed=number, max_tokens=output, ignore_eos=True, detokenize=False,
                    structured_outputs=form,
                )  # fmt: skip
                request = engine.add(None, tokens, params)
                if not one:
                    waiting.add(request)
            before, start = engine.num_steps, time.perf_counter()
            while waiting:
                waiting.difference_update(engine.step())
            seconds, steps = time.perf_counter() - start, engine.num_steps - before
            spent = timed.seconds / max(1, timed.rows) * 1e6
            engine.abort_all()
        return seconds, steps, spent

    run(False), run(True)
    pairs = []
    for _ in range(repeats):
        free, mixed = run(False), run(True)
        pairs.append(Pair(free[0], mixed[0], (free[1], mixed[1]), mixed[2]))
    return StructuredCost(count, sum(constrained), output, tuple(pairs))


class _Timed:
    """Adds up the time of an engine's masks, while it is entered."""

    def __init__(self, grammars: Any):
        self._grammars, self.seconds, self.rows = grammars, 0.0, 0

    def __enter__(self) -> _Timed:
        real = {name: getattr(self._grammars, name) for name in ("masks", "advance")}

        def timed(name: str) -> Any:
            def call(constraints: Sequence[Any], *args: Any) -> Any:
                start = time.perf_counter()
                found = real[name](constraints, *args)
                self.seconds += time.perf_counter() - start
                self.rows += len(constraints) if name == "masks" else 0
                return found

            return call

        for name in real:
            setattr(self._grammars, name, timed(name))
        return self

    def __exit__(self, *_: object) -> None:
        del self._grammars.masks, self._grammars.advance


class MadeUpTokenizer:
    """All bytes, and words of letters with what stands between words in JSON, until there are `size` tokens."""

    def __init__(self, size: int, special: int = 256):
        rng = np.random.default_rng(0)
        words = [bytes([byte]) for byte in range(256)]
        known, ends = set(words), (b"", b"", b"", b'"', b'",', b",", b".", b'":', b"s", b"ing")
        while len(words) < size - special:
            body = rng.integers(97, 123, int(rng.integers(1, 9)), np.uint8).tobytes()
            word = (b" " if rng.random() < 0.5 else b"") + body + ends[int(rng.integers(len(ends)))]
            if word not in known:
                known.add(word)
                words.append(word)
        self._words = [*words, *(b"<|%d|>" % i for i in range(special))]
        self.special_ids: Collection[int] = range(size - special, size)

    def token_bytes(self, token: int) -> bytes:
        return self._words[token]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


def measure_host(vocab: int, rows: int, steps: int = 40) -> list[HostCost]:
    """For texts that take their tokens evenly from what is allowed, which is harder than what a model writes."""
    tokenizer: Any = MadeUpTokenizer(vocab)
    grammars = Grammars(tokenizer, vocab, (vocab - 1,))
    start = time.perf_counter()
    grammars.constraint(ENDLESS)
    build = time.perf_counter() - start
    forms = {
        "json": ENDLESS,
        "json_object": StructuredOutputsParams(json_object=True),
        "regex": StructuredOutputsParams(regex=r"([A-Z][a-z ]+: [0-9]{1,5}\n)+"),
    }
    found = []
    for name, form in forms.items():
        constraints = [grammars.constraint(form, stop_tokens=()) for _ in range(rows)]
        rng, alone, taking, together, count = np.random.default_rng(0), 0.0, 0.0, 0.0, 0
        for _ in range(steps):
            constraints = [constraint for constraint in constraints if not constraint.is_complete]
            for constraint in constraints:
                copy = constraint.matcher.deep_copy()
                start = time.perf_counter()
                copy.compute_bitmask()
                alone += time.perf_counter() - start
            start = time.perf_counter()
            masks = grammars.masks(constraints)
            together += time.perf_counter() - start
            some = [np.flatnonzero(np.unpackbits(mask, bitorder="little")) for mask in masks]
            tokens = [int(rng.choice(few)) if len(few) else 0 for few in some]
            for constraint, token in zip(constraints, tokens, strict=True):
                copy = constraint.matcher.deep_copy()
                start = time.perf_counter()
                copy.consume_token(token)
                taking += time.perf_counter() - start
            start = time.perf_counter()
            grammars.advance(constraints, tokens)
            together += time.perf_counter() - start
            count += len(constraints)
        each = 1e6 / max(1, count)
        found.append(HostCost(vocab, rows, name, alone * each, taking * each, together * each, build))
    return found
