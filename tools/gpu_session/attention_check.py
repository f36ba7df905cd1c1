"""Whether two engines give the same greedy tokens: Mosaic attention against XLA's on a GPU that has it.

    python -m tools.gpu_session.attention_check --model 8b    # on a Hopper GPU
    python -m tools.gpu_session.attention_check --tiny        # anywhere: two plans instead, in float32

Weights are random. In bfloat16 two right kernels differ in the last bits, so a token may differ where the two likeliest
are as good as equal: that is a near tie, and the request is compared no further. Anything else is a mismatch.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nanoflow_jax.bench.report import ThroughputOptions
from nanoflow_jax.bench.throughput import build_random
from nanoflow_jax.engine.request import Request
from nanoflow_jax.models.registry import model_config, read_config
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.step import compile as compile_options
from nanoflow_jax.system.platform import claim_gpu_memory, use_compile_cache
from nanoflow_jax.weights.hub import EMBEDDED
from nanoflow_jax.workload import Lengths, Workload
from tools.gpu_session import new_parser
from tools.gpu_session.parts import RUN_LENGTH, RUN_TOKENS

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
        top_tokens = np.concatenate([part.top_tokens for part in a.logprobs.parts])
        top = np.concatenate([part.top_logprobs for part in a.logprobs.parts])
        for i, (x, y) in enumerate(zip(a.output_token_ids, b.output_token_ids, strict=True)):
            if x != y:
                tie = y in top_tokens[i] and top[i, 0] - top[i, 1] < near
                ties, wrong = ties + tie, wrong + (not tie)
                break
            tokens += 1
    return Agreement(len(first), tokens, ties, wrong)


@dataclass(frozen=True)
class Setting:
    """What is compared: two engines of `options`, one of attention `backend` with `other` as its plan."""

    options: ThroughputOptions
    plan: str
    other: str
    backend: str
    count: int  # of requests


def setting(model: str, tiny: bool = False, smallest: bool = False) -> Setting:
    """For "tiny" two layers of the embedded model's size. For "8b" eight layers of LLaMA-3.1-8B, and the step of call
    A's run (`gpu_session.parts`), compiled once for both. One step shape each: compiling is most of the time."""
    if model == "8b" and not tiny:
        fields: dict[str, Any] = {"kv_cache_tokens": RUN_TOKENS, "max_model_len": RUN_LENGTH}
        _, config = model_config("llama-3.1-8b")
        config = replace(config, num_layers=8)
    else:
        fields = {"tokens_per_step": 64 if tiny else 512, "decode_slots": 16 if tiny else 64}
        fields |= {"kv_cache_tokens": 8192 if tiny else 65536, "max_model_len": LONGEST + OUTPUT}
        config = read_config(EMBEDDED["tiny"] / "config.json")
        config = replace(config, num_layers=1 if tiny or smallest else 2)
    if not tiny:
        config = replace(config, dtype="bfloat16", head_dim=128)
    options = ThroughputOptions(
        model=model, config=config, model_layers=config.num_layers,
        workload=Workload("check", Lengths(1, 0), Lengths(1, 0)), attention_backend="xla", one_shape=True,
        progress=False, **fields,
    )  # fmt: skip
    backend = "xla" if tiny else "mosaic"
    other = "sequential" if tiny or model == "8b" else "two_gather_one_reduce"
    return Setting(options, "two_gather_one_reduce", other, backend, 4 if tiny or smallest else 48)


def outputs(options: ThroughputOptions, plan: str, prompts: Sequence[list[int]]) -> list[Request]:
    """The requests, served on the first device."""
    mesh = Mesh(np.array(jax.devices()[:1]), (AXIS,))
    assert options.max_model_len is not None
    engine, _, _ = build_random(options, load_plan(plan), mesh, options.max_model_len)
    params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True, detokenize=False, logprobs=2)
    requests = [engine.add(None, prompt, params) for prompt in prompts]
    while engine.scheduler.has_work:
        engine.step()
        if engine.failure is not None:
            raise engine.failure
    return requests


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("tools.gpu_session.attention_check", __doc__)
    parser.add_argument("--model", choices=("tiny", "8b"), default="tiny", help="default: tiny")
    parser.add_argument("--tiny", action="store_true", help="two plans with XLA's attention, anywhere")
    parser.add_argument("--smallest", action="store_true", help="one layer, four requests: for compute-sanitizer")
    parser.add_argument("--no-command-buffers", action="store_true", help="each kernel started on its own")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if given.no_command_buffers:  # whatever the project's own options say
        compile_options.GPU_OPTIONS = {**compile_options.GPU_OPTIONS, **compile_options.STREAM_OPTIONS}
    claim_gpu_memory()
    use_compile_cache()
    chosen = setting(given.model, given.tiny, given.smallest)
    options, config = chosen.options, chosen.options.config
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in rng.integers(1, LONGEST, chosen.count)]
    first = outputs(options, chosen.plan, prompts)
    gc.collect()  # the first engine's memory
    second = outputs(replace(options, attention_backend=chosen.backend), chosen.other, prompts)
    found = agreement(first, second, NEAR[config.dtype])
    compared = [f"xla {chosen.plan}", f"{chosen.backend} {chosen.other}"]
    device = jax.devices()[0].device_kind
    print(json.dumps({"model": given.model, "compared": compared, "device": device, **asdict(found)}, indent=1))
    return int(found.mismatches > 0 or found.tokens == 0)


if __name__ == "__main__":
    sys.exit(main())
