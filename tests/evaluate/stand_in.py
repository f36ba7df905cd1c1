"""A stand-in for an LLM, without JAX, and a process that runs a batch file through it.

    python stand_in.py INPUT OUTPUT [--tear N] [--pause SECONDS]

--tear N  kills itself with SIGKILL in the middle of the N-th write to the results, which leaves a torn line.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nanoflow_jax.engine.feed import Work
from nanoflow_jax.engine.request import CompletionOutput, RequestMetrics, RequestOutput
from nanoflow_jax.evaluate import journal as journals
from nanoflow_jax.evaluate.batch import Settings, run_batch
from nanoflow_jax.evaluate.journal import Journal
from nanoflow_jax.evaluate.lines import identify
from nanoflow_jax.evaluate.manifest import Manifest
from nanoflow_jax.sampling_params import SamplingParams


class StandIn:
    """Answers a prompt with itself backwards, as many tokens as asked for. `slots` run at once, so that answers come in
    an order of their own; `most` is how many were held."""

    max_model_len = 512
    default_max_tokens = None
    prefill_rows = 64
    num_rows = 0
    replicas = None
    tokenizer = None  # nothing is echoed

    def __init__(self, slots: int = 8, pause: float = 0.0):
        self._slots, self._pause = slots, pause

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        return SamplingParams(**{"temperature": 0.0, **overrides})

    def prepare(self, prompt: str | list[int], params: SamplingParams, key: Any = None) -> Work:
        tokens = list(prompt.encode()) if isinstance(prompt, str) else prompt
        if not tokens or len(tokens) >= self.max_model_len:
            raise ValueError(f"prompt: {len(tokens)} tokens; accepted: 1 to {self.max_model_len - 1}")
        return Work(key, prompt if isinstance(prompt, str) else None, tokens, params)

    def prepare_chat(
        self, messages: Any, params: SamplingParams, key: Any = None, now: Any = None, settings: Any = None
    ) -> Work:
        return self.prepare("".join(f"{m['role']}:{m['content']};" for m in messages), params, key)

    def run_stream(self, work: Iterable[Work | None], between: Any = None) -> Iterator[tuple[Work, RequestOutput]]:
        running: list[Work] = []
        for item in work:
            running += [item] if item is not None else []
            if len(running) == self._slots:
                shortest = min(range(len(running)), key=lambda i: running[i].params.max_tokens or 0)
                yield self._answer(running.pop(shortest))
        while running:
            yield self._answer(running.pop())

    def _answer(self, work: Work) -> tuple[Work, RequestOutput]:
        time.sleep(self._pause)
        made = (work.prompt_token_ids[::-1] * 600)[: work.params.max_tokens or 16]
        text = "".join(chr(33 + t % 90) for t in made)
        text += str(work.params.seed)
        outputs = [CompletionOutput(i, text, made, "length", content=text) for i in range(work.params.n)]
        return work, RequestOutput("0", work.prompt, work.prompt_token_ids, outputs, RequestMetrics(0.0))


def answer_file(source: Path, output: Path, pause: float = 0.0) -> None:
    found = identify(source)
    with Journal.open(output, Manifest("batch", {"input": found.sha256})) as journal:
        llm: Any = StandIn(pause=pause)
        run_batch(llm, source, found, journal, Settings("tiny", window=64), progress=False)


def tear(write_number: int) -> None:
    """From now on, that write stops in its middle, and with it the process."""
    append, count = Journal._append, 0

    def torn(self: Journal, batch: list[bytes]) -> None:
        nonlocal count
        count += 1
        if count == write_number:
            data = b"".join(batch)
            self._file.write(data[: max(1, 2 * len(data) // 3)])
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, batch)

    Journal._append = torn


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tear", type=int)
    parser.add_argument("--pause", type=float, default=0.0)
    args = parser.parse_args()
    journals.SYNC_SECONDS = 0.01
    if args.tear:
        tear(args.tear)
    answer_file(args.input, args.output, args.pause)
