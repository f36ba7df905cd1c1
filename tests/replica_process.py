"""One of the processes of tests/test_distributed.py: python replica_process.py PORT RANK PEER_TIMEOUT OUT WHAT"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from nanoflow_jax import SamplingParams

OPTIONS: dict[str, Any] = {
    "max_model_len": 128, "tokens_per_step": 72, "decode_slots": 8, "page_size": 16, "kv_cache_tokens": 2048,
    "deterministic": True, "progress": False,
}  # fmt: skip
PROMPTS = [f"{a}+{a + 5}=" for a in range(10, 22)] + ["reverse abcdef=", "sort 52917="]
NUM_REQUESTS = 60  # of the batch
PAIRS = [("12+30=", "42"), ("12+30=", "43"), ("", "reverse")]


def params() -> list[SamplingParams]:
    """Greedy, sampled, penalised, biased, with stop strings and logprobs."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 1.5, "seed": 5, "logprobs": 0, "ignore_eos": True},
        {"temperature": 0.7, "top_p": 0.9, "logit_bias": {50: 3.0}, "presence_penalty": 0.5},
        {"temperature": 0.0, "stop": "4", "prompt_logprobs": 1},
    ]
    return [SamplingParams(max_tokens=10, **kinds[i % len(kinds)]) for i in range(len(PROMPTS))]


def answers(llm: Any) -> dict[str, Any]:
    """Everything that tests compare, for JSON: floats keep all their bits."""
    outputs = llm.generate(PROMPTS, params(), use_tqdm=False)
    streamed = [o.outputs[0].token_ids for o in llm.stream("47+85=", SamplingParams(temperature=0.0))]
    return {
        "tokens": [o.outputs[0].token_ids for o in outputs],
        "texts": [o.outputs[0].text for o in outputs],
        "reasons": [[o.outputs[0].finish_reason, o.outputs[0].stop_reason] for o in outputs],
        "logprobs": [
            [[[t, lp.logprob, lp.rank] for t, lp in step.items()] for step in o.outputs[0].logprobs or []]
            for o in outputs
        ],
        "prompt_logprobs": [
            [[[t, lp.logprob] for t, lp in step.items()] for step in o.prompt_logprobs[1:]]
            for o in outputs
            if o.prompt_logprobs
        ],
        "streamed": streamed,
        "scores": llm.score(PAIRS, use_tqdm=False),
    }


def write_batch(path: Path) -> None:
    kinds = [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0, "stop": "7"}]
    with open(path, "w") as file:
        for i in range(NUM_REQUESTS):
            wanted = {"custom_id": f"r{i}", "prompt": f"{i}+{7 * i % 90}=", "max_tokens": 5 + 13 * i % 60}
            file.write(json.dumps({**wanted, "ignore_eos": True, **kinds[i % 3]}) + "\n")


def run_batch(llm: Any, source: Path, output: Path) -> None:
    """The batch, or what is left of it."""
    from nanoflow_jax.evaluate.batch import Settings, run_batch
    from nanoflow_jax.evaluate.journal import Journal
    from nanoflow_jax.evaluate.lines import identify
    from nanoflow_jax.evaluate.manifest import Manifest

    with Journal.open(output, Manifest("batch", {})) as journal:
        run_batch(llm, source, identify(source), journal, Settings("tiny"), progress=False)


def main(port: str, rank: int, peer_timeout: float, out: Path, what: str) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts without
    from nanoflow_jax import distributed

    processes = distributed.join(f"127.0.0.1:{port}", 2, rank, peer_timeout=peer_timeout)

    def lead() -> int:
        from nanoflow_jax import LLM

        if what == "wait":
            (out / "ready").touch()
            time.sleep(300)
        if what == "refused":
            LLM("tiny", **OPTIONS, kv_offload_gib=1)
        llm = LLM("tiny", **OPTIONS)
        (out / "answers.json").write_text(json.dumps(answers(llm)))
        (out / "ready").touch()
        run_batch(llm, out / "requests.jsonl", out / "results.jsonl")
        time.sleep(300)  # the test kills a process before
        return 0

    def report(error: BaseException) -> int:
        print(f"process {processes.rank}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1

    return distributed.run(lead, report)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]), sys.argv[5]))
