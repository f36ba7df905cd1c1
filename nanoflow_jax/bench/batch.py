"""What a batch file costs beside the engine alone: the same requests both ways, in turns, in one process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from nanoflow_jax.api import LLM
from nanoflow_jax.bench.throughput import drive, usual_running, warm_up
from nanoflow_jax.bench.timeline import StepClock, TimedStep, Window, steady_window
from nanoflow_jax.workload import BenchRequest, Workload
from nanoflow_jax.evaluate.batch import Settings, answer, parse_lines
from nanoflow_jax.evaluate.journal import Journal
from nanoflow_jax.evaluate.lines import read_lines
from nanoflow_jax.evaluate.manifest import Manifest
from nanoflow_jax.evaluate.response import Json, encode_record


@dataclass(frozen=True)
class Pair:
    """Tokens per second (prompt + output) of the steady state, of the bare engine and of a batch file; and seconds from
    the first step to the last result on the disk of the batch file."""

    bare: float
    batch: float
    batch_seconds: float

    @property
    def ratio(self) -> float:
        return self.batch / self.bare


@dataclass(frozen=True)
class BatchCost:
    """pairs  of runs, one after the other
    ratio  batch over bare, the median of the pairs'"""

    model: str
    workload: str
    requests: int
    pairs: tuple[Pair, ...]

    @property
    def ratio(self) -> float:
        return median(pair.ratio for pair in self.pairs)


def measure_batch(llm: LLM, workload: Workload, count: int | None, repeats: int, seed: int = 0) -> BatchCost:
    """Pairs of runs with the same `count` requests (None: enough for a steady state). Use an LLM without prefix
    caching: the second run would find what the first computed. Raises ConfigError for too few requests."""
    enough = 6 * usual_running(llm.engine, workload)
    requests = workload.requests(count or enough, llm.max_model_len, llm.config.vocab_size, seed)
    warm_up(llm.engine)
    pairs = []
    with TemporaryDirectory() as folder:
        source = Path(folder) / "requests.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in _lines(requests)), encoding="utf-8")
        for turn in range(repeats):
            bare = steady_window(drive(llm.engine, requests, 0.0, progress=False), len(requests), enough)
            batch, seconds = _run_batch(llm, source, Path(folder) / f"results-{turn}.jsonl")
            window = steady_window(batch, len(requests), enough)
            pairs.append(Pair(_rate(bare), _rate(window), seconds))
    return BatchCost(str(llm.folder), workload.name, len(requests), tuple(pairs))


def _rate(window: Window) -> float:
    return window.tokens / window.seconds


def _lines(requests: list[BenchRequest]) -> Iterator[dict[str, Any]]:
    for i, request in enumerate(requests):
        body = {"prompt": request.prompt_token_ids, "max_tokens": request.output_tokens, "ignore_eos": True}
        yield {"custom_id": f"request-{i}", **body, "temperature": 0.0}


def _run_batch(llm: LLM, source: Path, output: Path) -> tuple[list[TimedStep], float]:
    """What `nanoflow batch` does, with the clock of the benchmark on the engine."""
    started = time.perf_counter()
    with StepClock(llm.engine) as clock, Journal.open(output, Manifest("batch", {})) as journal:

        def emit(record: Json) -> None:
            journal.write(encode_record(record))
            clock.ended += 1

        settings = Settings("bench")
        answer(llm, parse_lines(read_lines(source), (settings.model,), journal.done), settings, emit)
        journal.close()
    return clock.steps, time.perf_counter() - started
