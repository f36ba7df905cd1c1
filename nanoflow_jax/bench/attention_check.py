"""Whether two engines give the same greedy tokens: Mosaic attention against XLA's on a GPU that has it.

    python -m nanoflow_jax.bench.attention_check            # on a Hopper GPU
    python -m nanoflow_jax.bench.attention_check --tiny     # anywhere: two plans instead, in float32

Weights are random. In bfloat16 two right kernels differ in the last bits, so a token may differ where the two likeliest
are as good as equal: that is a near tie, and the request is compared no further. Anything else is a mismatch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import jax
import numpy as np
from jax.sharding import Mesh

from nanoflow_jax.bench.report import ThroughputOptions
from nanoflow_jax.bench.throughput import build_random
from nanoflow_jax.config import ModelConfig
from nanoflow_jax.engine.request import Request
from nanoflow_jax.engine.sampling_params import SamplingParams
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.platform import use_compile_cache
from nanoflow_jax.schedule.plan import load_plan
from nanoflow_jax.weights.hub import EMBEDDED
from nanoflow_jax.workload import Lengths, Workload

NEAR = {"bfloat16": 0.1, "float32": 1e-3}  # nats between two tokens that count as a tie
OUTPUT, LONGEST = 32, 300  # tokens; prompts cross several pages and steps


@dataclass(frozen=True)
class Agreement:
    """What a comparison found. tokens: compared, of all requests together."""

    requests: int
    tokens: int
    near_ties: int
    mismatches: int


def agreement(first: Sequence[Request], second: Sequence[Request], near: float) -> Agreement:
    """Compares greedy outputs token by token; `first` must have the logprobs of its two likeliest tokens."""
    tokens = ties = wrong = 0
    for a, b in zip(first, second, strict=True):
        top_tokens = np.concatenate(a.logprobs.top_tokens)
        top = np.concatenate(a.logprobs.top_logprobs)
        for i, (x, y) in enumerate(zip(a.output_token_ids, b.output_token_ids, strict=True)):
            if x != y:
                tie = y in top_tokens[i] and top[i, 0] - top[i, 1] < near
                ties, wrong = ties + tie, wrong + (not tie)
                break
            tokens += 1
    return Agreement(len(first), tokens, ties, wrong)


def outputs(options: ThroughputOptions, plan: str, prompts: Sequence[list[int]]) -> list[Request]:
    """The requests, served on the first device."""
    mesh = Mesh(np.array(jax.devices()[:1]), (AXIS,))
    engine, _, _ = build_random(options, load_plan(plan), mesh, LONGEST + OUTPUT)
    params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True, detokenize=False, logprobs=2)
    requests = [engine.add(None, prompt, params) for prompt in prompts]
    while engine.scheduler.has_work:
        engine.step()
        if engine.failure is not None:
            raise engine.failure
    return requests


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nanoflow_jax.bench.attention_check", description=__doc__, allow_abbrev=False)
    parser.add_argument("--tiny", action="store_true", help="two plans with XLA's attention, anywhere")
    tiny = parser.parse_args(arguments).tiny
    use_compile_cache()
    config = replace(ModelConfig.from_file(EMBEDDED["tiny"] / "config.json"), num_layers=1 if tiny else 3)
    count = 4 if tiny else 48
    if not tiny:
        config = replace(config, dtype="bfloat16", head_dim=128)
    options = ThroughputOptions(
        model="tiny", config=config, model_layers=config.num_layers,
        workload=Workload("check", Lengths(1, 0), Lengths(1, 0)),
        tokens_per_step=64 if tiny else 512, decode_slots=16 if tiny else 64, kv_cache_tokens=8192 if tiny else 65536,
        attention_backend="xla", progress=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in rng.integers(1, LONGEST, count)]
    other = "sequential" if tiny else "two_gather_one_reduce"
    backend = "xla" if tiny else "mosaic"
    first = outputs(options, "two_gather_one_reduce", prompts)
    second = outputs(replace(options, attention_backend=backend), other, prompts)
    found = agreement(first, second, NEAR[config.dtype])
    compared = ["xla two_gather_one_reduce", f"{backend} {other}"]
    print(json.dumps({"compared": compared, "device": jax.devices()[0].device_kind, **asdict(found)}, indent=1))
    return int(found.mismatches > 0 or found.tokens == 0)


if __name__ == "__main__":
    sys.exit(main())
