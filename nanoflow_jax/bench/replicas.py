"""Throughput of N replicas beside that of one: the same requests on one of them and on all, in turns, in one run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

from nanoflow_jax.api import LLM
from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.feed import Work
from nanoflow_jax.engine.request import RequestOutput
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.workload import Workload

ONE_REPLICA = "data_parallel_size: 1 replica has none to be measured against; accepted: at least 2"


@dataclass(frozen=True)
class Scaling:
    """one, all  tokens per second (prompt + output) of one replica and of all, of each pair of runs; from the first
                 request to the last result, so that the ramps count
    ratio        all over one, the median of the pairs'"""

    model: str
    workload: str
    requests: int
    replicas: int
    devices: int  # of each
    one: tuple[float, ...]
    all: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return median(a / o for o, a in zip(self.one, self.all, strict=True))


def measure_scaling(llm: LLM, workload: Workload, count: int | None, repeats: int, seed: int = 0) -> Scaling:
    """Pairs of runs with the same `count` requests (None: 16 for each that runs at once). Use an LLM without prefix
    caching: the second run would find what the first computed. Raises ConfigError for an LLM without replicas."""
    if llm.replicas is None:
        raise ConfigError(ONE_REPLICA)
    about = [m.about for m in llm.replicas.members if m.about is not None]
    count = count or 16 * sum(a.capacity for a in about)
    requests = workload.requests(count, llm.max_model_len, llm.config.vocab_size, seed)
    work = [
        llm.prepare(r.prompt_token_ids, SamplingParams(temperature=0.0, max_tokens=r.output_tokens, ignore_eos=True))
        for r in requests
    ]
    for most in (1, None):  # compiled steps are loaded, caches are warm
        _rate(llm, work[: len(about) * 8], most)
    pairs = [(_rate(llm, work, 1), _rate(llm, work, None)) for _ in range(repeats)]
    one, both = zip(*pairs, strict=True)
    return Scaling(str(llm.folder), workload.name, count, len(about), about[0].devices, one, both)


def _rate(llm: LLM, work: list[Work], most: int | None) -> float:
    assert llm.replicas is not None
    started, tokens = time.perf_counter(), 0
    for ended in llm.replicas.run(work, most):
        for item, output in ended:
            assert isinstance(output, RequestOutput)
            tokens += len(item.prompt_token_ids) + sum(len(o.token_ids) for o in output.outputs)
    return tokens / (time.perf_counter() - started)
