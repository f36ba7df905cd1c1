"""`transformers` continuous batching over a benchmark's requests, in a process and a Python of its own.

Reads one JSON object from standard input and writes JSON lines to standard output: {"progress": n}, then
{"result": ...} or {"error": "one line"}. Needs torch and transformers, and nothing of this project: `transformers_peer`
starts it by its path.

Each token is stamped when the host sees it, so the measured window is the engine's own: from when nearly as many
requests run as do later, to when no more wait. A prompt counts when its request's first token comes.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PLATEAU = 0.95  # as in bench/timeline.py
PAGE = 256  # tokens per page of its cache, its default


@dataclass(frozen=True)
class Record:
    """One request: seconds of its admission, of its end, and of each of its tokens."""

    admitted: float
    ended: float
    prompt_tokens: int
    stamps: list[float]


def measured(records: list[Record], started: float, stopped: float | None) -> dict[str, Any]:
    """Tokens and seconds of the steady window, or of the whole run where it has none.

    As in the engine, a request of P and O tokens computes P + O - 1 rows: its last token is sampled, not computed.
    stopped: when a time limit ended the run; None: it ran to its end.
    """
    records = [r for r in records if r.stamps]
    if not records:
        return {"measure": "none", "tokens": 0, "seconds": 0.0, "requests_ended": 0}
    fed = stopped or max(r.admitted for r in records)
    admissions, ends = sorted(r.admitted for r in records), sorted(r.ended for r in records)

    def running(t: float) -> int:
        return bisect_right(admissions, t) - bisect_right(ends, t)

    # After the last admission the number only falls; half of the way to it, it is what it usually is.
    times = [started + (fed - started) * (0.5 + i / 200) for i in range(100)]
    plateau = statistics.median(running(t) for t in times)
    first = next((t for t in admissions if running(t) >= PLATEAU * plateau), fed)
    ended = sum(first < t <= fed for t in ends)
    steady = fed - first >= 0.5 * (fed - started) and ended >= plateau > 0
    if not steady:
        first, fed = started, max(r.stamps[-1] for r in records)
        ended = len(records)
    tokens = 0
    for r in records:
        tokens += r.prompt_tokens * (first < r.stamps[0] <= fed)
        tokens += sum(first < t <= fed for t in r.stamps[1:])
    return {
        "measure": "steady window" if steady else "whole run",
        "tokens": tokens,
        "seconds": fed - first,
        "share_of_run": (fed - first) / (fed - started),
        "requests_ended": ended,
        "running_median": plateau,
    }


def run(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Builds the model with random weights, warms up, serves the requests. Raises ImportError without torch."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    batching: Any = importlib.import_module("transformers.generation.configuration_utils")
    hints: Any = importlib.import_module("transformers.generation.continuous_batching.utils")
    device, began = job["device"], time.perf_counter()
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} of {sys.executable} finds no GPU")
    torch.manual_seed(job["seed"])
    fields = {k: v for k, v in job["config"].items() if k not in ("model_type", "dtype", "torch_dtype", "auto_map")}
    config = transformers.AutoConfig.for_model(job["config"]["model_type"], **fields)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, job["dtype"]), trust_remote_code=False
        ).eval()
    weights = time.perf_counter() - began
    began = time.perf_counter()
    requests = job["requests"]
    longest = max(len(prompt) for prompt, _ in requests), max(output for _, output in requests)
    sampling = {"do_sample": job["temperature"] > 0} | (
        {"temperature": job["temperature"]} if job["temperature"] else {}
    )
    manager = model.init_continuous_batching(
        generation_config=transformers.GenerationConfig(eos_token_id=-1, pad_token_id=0, **sampling),
        continuous_batching_config=batching.ContinuousBatchingConfig(
            num_blocks=job["kv_tokens"] and max(1, job["kv_tokens"] // PAGE),
            max_batch_tokens=job["tokens_per_step"],
            allow_block_sharing=job["prefix_caching"],
            seed=job["seed"],
        ),
        workload_hints=hints.WorkloadHints(*longest, len(requests)),
    )
    manager.warmup()
    warmup = time.perf_counter() - began
    manager.start()
    started = time.perf_counter()
    for prompt, output in requests:
        manager.add_request(prompt, max_new_tokens=output, record_timestamps=True)
    results, stopped = [], None
    while len(results) < len(requests):
        result = manager.get_result(timeout=1)
        if result is not None:
            results.append(result)
            if len(results) % 64 == 0:
                tell({"progress": len(results)})
        elif not manager.is_running():
            break
        if stopped is None and time.perf_counter() - started > job["seconds"]:
            stopped = time.perf_counter()
            manager.stop(block=False, hard_stop=True)
    failure = manager.background_thread_status.fatal_error
    if failure is not None:
        raise failure
    if stopped is None and len(results) < len(requests):
        raise RuntimeError(f"it ended after {len(results)} of {len(requests)} requests")
    if stopped is None:
        if failed := [r.error for r in results if r.error]:
            raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
        manager.stop(block=True)
    found = measured([record(r) for r in results], started, stopped)
    resolved = manager.continuous_batching_config
    return found | {
        "requests": len(requests),
        "weights_seconds": weights,
        "warmup_seconds": warmup,
        "evicted_requests": sum(len(r.timestamps or ()) < len(r.generated_tokens) for r in results),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "attention": model.config._attn_implementation,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "options": {
            name: getattr(resolved, name)
            for name in ("num_blocks", "page_size", "max_batch_tokens", "max_requests_per_batch", "use_cuda_graph")
        },
    }


def record(result: Any) -> Record:
    """A request that was evicted and computed again has lost the stamps of its earlier tokens: they were there when it
    came back."""
    admitted, ended = result.lifespan
    stamps = list(result.timestamps or ())
    lost = len(result.generated_tokens) - len(stamps)
    return Record(admitted, ended, len(result.prompt_ids), [admitted] * lost + stamps)


def main() -> int:
    out = os.fdopen(os.dup(1), "w")  # what libraries print goes to standard error
    os.dup2(2, 1)

    def tell(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        tell({"result": run(json.load(sys.stdin), tell)})
    except ModuleNotFoundError as error:
        tell({"error": f"{error.name} is not installed for {sys.executable}"})
        return 1
    except Exception as error:  # of other projects' code: whatever it is, one line says it
        tell({"error": f"{type(error).__name__}: {error}".splitlines()[0]})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
