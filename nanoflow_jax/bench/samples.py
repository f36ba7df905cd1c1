"""Host memory of many samples of each prompt: `python -m nanoflow_jax.bench.samples PROMPTS N`, a process for each N.

All that a batch file does with them is real (engine, texts, records) but the model, a stand-in that returns tokens.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanoflow_jax.bench.host import stand_in_engine
from nanoflow_jax.engine.calls import Calls
from nanoflow_jax.engine.feed import Work
from nanoflow_jax.engine.outputs import run_steps
from nanoflow_jax.engine.request import RequestOutput
from nanoflow_jax.evaluate.lines import Line
from nanoflow_jax.evaluate.records import Record, parse_line
from nanoflow_jax.evaluate.response import encode_record, response_record
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.tokenizer import Tokenizer
from nanoflow_jax.weights.hub import resolve_model

SLOTS, ROWS, PROMPT, OUTPUT = 256, 512, 512, 8


@dataclass(frozen=True)
class Memory:
    """before, peak  MiB of the process, resident, before the first prompt and at most
    most            completions that were requests at once"""

    prompts: int
    n: int
    samples: int
    record_bytes: int
    most: int
    before: float
    peak: float
    seconds: float


def measure(prompts: int, n: int) -> Memory:
    """Runs so many prompts of 512 tokens with n samples of 8 tokens each, each prompt a record that is encoded and
    let go of."""
    folder = resolve_model("tiny", None)
    config, tokenizer = read_config(folder / "config.json"), Tokenizer(folder)
    engine = stand_in_engine(config, SLOTS, ROWS, PROMPT + OUTPUT, tokenizer, tokens=250)
    # As `nanoflow bench host` samples: its stand-in has no other program.
    params = SamplingParams(n=n, temperature=1.0, top_p=0.9, seed=1, max_tokens=OUTPUT, ignore_eos=True)

    def work() -> Any:
        for i in range(prompts):
            tokens = [1 + (i * 7 + j * (1 + i % 5)) % 200 for j in range(PROMPT)]
            yield Work(parse_line(Line(i + 1, b'{"prompt": "x"}')), None, tokens, params)

    calls = Calls(engine)
    samples = size = most = 0
    before = peak = resident()
    started = time.perf_counter()
    for ended in run_steps(calls, work(), tokenizer, None):
        most, peak = max(most, len(calls._call_of)), max(peak, resident())
        for item, output in ended:
            assert isinstance(item.key, Record) and isinstance(output, RequestOutput)
            size += len(encode_record(response_record(item.key, output, "tiny", tokenizer)))
            samples += len(output.outputs)
    return Memory(prompts, n, samples, size, most, before, peak, time.perf_counter() - started)


def resident() -> float:
    """MiB of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if len(sys.argv) != 3 or not all(word.isdecimal() and int(word) for word in sys.argv[1:]):
        sys.exit("usage: python -m nanoflow_jax.bench.samples PROMPTS N")
    print(asdict(measure(int(sys.argv[1]), int(sys.argv[2]))))
