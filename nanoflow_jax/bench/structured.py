"""What structured outputs cost: the requests beside them, and the host per constrained row.

The same requests run twice in turns, all without a form and with a form for a share of them; all sample, and all have
the same length, so that what differs is the masks. The host's part is measured apart, also for a vocabulary that the
model at hand does not have.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
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
    """Two runs up to the end of the last request without a form: one in which none has a form, and the mixed one.
    Processor seconds are of all threads: on a CPU the device's, too, so that nothing is hidden behind anything."""

    free_seconds: float
    mixed_seconds: float
    free_cpu: float
    mixed_cpu: float
    steps: tuple[int, int]
    mask_us: float  # of the host, for each constrained row and step: taking tokens and computing masks

    @property
    def ratio(self) -> float:
        """Throughput of a request without a form beside those with one, over that beside others without."""
        return self.free_seconds / self.mixed_seconds

    @property
    def cpu_ratio(self) -> float:
        return self.free_cpu / self.mixed_cpu


@dataclass(frozen=True)
class HostCost:
    """Microseconds for each constrained row and step, with a vocabulary of `vocab` made-up tokens."""

    vocab: int
    rows: int
    form: str
    mask_us: float  # on a processor, rows one after another
    take_us: float  # as well
    both_us: float  # by the clock, all rows of a step at once, by as many threads as the engine takes
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

    @property
    def cpu_ratio(self) -> float:
        return median(pair.cpu_ratio for pair in self.pairs)


def measure_structured(
    llm: LLM, share: float, prompt: int, output: int, repeats: int, device_ms: float | None = None
) -> StructuredCost:
    """As many requests as there are slots, of `prompt` tokens, `share` of them constrained; one run to warm up.
    device_ms: `PacedRunner`'s; None: the device as it is."""
    count = llm.engine.running.count
    every = round(1 / share)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, min(200, llm.config.vocab_size), prompt).tolist() for _ in range(count)]
    constrained = [number % every == every - 1 for number in range(count)]

    def run(mixed: bool) -> tuple[float, float, int, float]:
        engine = llm.engine
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
            before, start, start_cpu = engine.num_steps, time.perf_counter(), time.process_time()
            while waiting:
                waiting.difference_update(engine.step())
            seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
            steps, spent = engine.num_steps - before, timed.seconds / max(1, timed.rows) * 1e6
            engine.abort_all()
        return seconds, cpu, steps, spent

    if device_ms is not None:
        paced: Any = PacedRunner(llm.engine.runner, device_ms / 1e3)
        llm.engine.runner = paced
    for mixed in (False, True):  # what is compiled when first wanted
        run(mixed)
    pairs = []
    for _ in range(repeats):
        free, mixed = run(False), run(True)
        pairs.append(Pair(free[0], mixed[0], free[1], mixed[1], (free[2], mixed[2]), mixed[3]))
    return StructuredCost(count, sum(constrained), output, tuple(pairs))


class PacedRunner:
    """A runner whose steps seem to take `seconds` of a device that shares no processor with the host: a step's layers
    begin when they are dispatched and the step before has ended, and what follows them when that is dispatched, too;
    whoever reads the tokens waits until then. What the device waits for the host shows in the time of a run."""

    def __init__(self, runner: Any, seconds: float):
        self._runner, self._seconds, self._free = runner, seconds, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def dispatch(self, *step: Any) -> Any:
        return self.finish(self.begin(*step))

    def begin(self, *step: Any) -> Any:
        self._free = max(self._free, time.perf_counter()) + self._seconds
        return self._runner.begin(*step)

    def finish(self, *begun: Any) -> Any:
        output = self._runner.finish(*begun)
        self._free = max(self._free, time.perf_counter())
        return replace(output, sampled=replace(output.sampled, tokens=_Late(output.sampled.tokens, self._free)))


class _Late:
    def __init__(self, tokens: Any, ready: float):
        self._tokens, self._ready = tokens, ready

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        tokens = np.asarray(self._tokens, dtype)
        time.sleep(max(0.0, self._ready - time.perf_counter()))
        return tokens


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
                start = time.thread_time()
                copy.compute_bitmask()
                alone += time.thread_time() - start
            start = time.perf_counter()
            masks = grammars.masks(constraints)
            together += time.perf_counter() - start
            some = [np.flatnonzero(np.unpackbits(mask, bitorder="little")) for mask in masks]
            tokens = [int(rng.choice(few)) if len(few) else 0 for few in some]
            for constraint, token in zip(constraints, tokens, strict=True):
                copy = constraint.matcher.deep_copy()
                start = time.thread_time()
                copy.consume_token(token)
                taking += time.thread_time() - start
            start = time.perf_counter()
            grammars.advance(constraints, tokens)
            together += time.perf_counter() - start
            count += len(constraints)
        each = 1e6 / max(1, count)
        found.append(HostCost(vocab, rows, name, alone * each, taking * each, together * each, build))
    return found
