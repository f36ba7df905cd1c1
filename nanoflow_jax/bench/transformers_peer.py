"""The same requests through `transformers` continuous batching: same config, random weights, dtype; one device.

It runs first, in a process that has ended before JAX takes the device's memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanoflow_jax.bench.report import ThroughputOptions
from nanoflow_jax.bench.throughput import LIFETIMES, expected_running
from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.setup import CPU_CACHE_TOKENS, CPU_DECODE_SLOTS
from nanoflow_jax.system.platform import has_gpu
from nanoflow_jax.system.progress import Progress

START_SECONDS = 900  # for importing, weights and warm-up
WORKER = Path(__file__).with_name("transformers_worker.py")


def settled(options: ThroughputOptions) -> ThroughputOptions:
    """The options with everything that the peer must know before an engine is there: requests, length limit, one
    device. Raises ConfigError for what the peer cannot run."""
    if options.rank_of is not None:
        raise ConfigError("with-transformers: it runs whole models; it does not go together with rank-of")
    if options.tensor_parallel_size not in (None, 1):
        raise ConfigError("with-transformers: it runs on one device; accepted: --tensor-parallel-size 1")
    rows, on_cpu = options.tokens_per_step, _on_cpu()
    slots = options.decode_slots or (min(CPU_DECODE_SLOTS, rows * 5 // 8) if on_cpu else rows * 5 // 8)
    pool = options.kv_cache_tokens or (CPU_CACHE_TOKENS if on_cpu else None)
    running = expected_running(
        options.workload, rows=rows, prefill=rows - slots, slots=slots, pool=pool, page_size=options.page_size
    )
    return replace(
        options,
        requests=options.requests or LIFETIMES * running,
        max_model_len=options.max_model_len or options.workload.limit(options.config.max_position_embeddings),
        tensor_parallel_size=1,
    )


def measure_transformers(
    options: ThroughputOptions, config: dict[str, Any], python: str, seconds: float
) -> dict[str, Any]:
    """One run of at most `seconds`, of `settled` options; config: the model's Hugging Face fields.

    Returns the worker's figures and tokens_per_second: prompt and output tokens, cached ones included. Raises
    ConfigError, one line.
    """
    assert options.requests is not None and options.max_model_len is not None
    if (program := shutil.which(python)) is None:
        raise ConfigError(
            f"transformers-python: {python!r} is no program; accepted: a Python with torch and transformers"
        )
    vocabulary, on_cpu = options.config.vocab_size, _on_cpu()
    requests = options.workload.requests(options.requests, options.max_model_len, vocabulary, options.seed)
    job = {
        "config": {**config, "model_type": options.config.family, "num_hidden_layers": options.config.num_layers},
        "dtype": options.config.dtype,
        "device": "cpu" if on_cpu else "cuda",
        "seed": options.seed,
        "temperature": options.temperature,
        "prefix_caching": options.enable_prefix_caching,
        # On a GPU it sizes its pool and its steps by the memory there is.
        "kv_tokens": options.kv_cache_tokens or (CPU_CACHE_TOKENS if on_cpu else None),
        "tokens_per_step": options.tokens_per_step if on_cpu else None,
        "seconds": seconds,
        "requests": [(r.prompt_token_ids, r.output_tokens) for r in requests],
    }
    found = _ask([program, "-P", str(WORKER)], job, seconds + START_SECONDS, options.progress)
    if not found["tokens"] or found["seconds"] <= 0:
        raise ConfigError(
            f"with-transformers: no token within {seconds:.0f} s; accepted: a larger --transformers-seconds"
        )
    return found | {"tokens_per_second": found["tokens"] / found["seconds"]}


def text(found: dict[str, Any], ratio: float) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"transformers continuous batching ({versions}, attention {found['attention']}, {found['device']}): "
        f"{found['tokens_per_second']:,.1f} tokens/s served, {found['measure']} of {found['seconds']:.1f} s; before "
        f"it: weights {found['weights_seconds']:.1f} s, warm-up {found['warmup_seconds']:.1f} s\n"
        f"ratio to transformers: {ratio:.3f}"
    )


def _on_cpu() -> bool:
    """Asked without JAX, which would take the GPU's memory."""
    return os.environ.get("JAX_PLATFORMS") == "cpu" or not has_gpu()


def _ask(command: list[str], job: dict[str, Any], timeout: float, progress: bool) -> dict[str, Any]:
    """Starts the worker, hands it the job, and returns its result. What it logs is kept for the case that it dies."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    result, log = None, []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as worker:
        assert worker.stdin and worker.stdout and worker.stderr
        late = threading.Timer(timeout, worker.kill)
        reader = threading.Thread(target=lambda: log.extend(worker.stderr or ()), daemon=True)
        late.start()
        reader.start()
        try:
            worker.stdin.write(json.dumps(job))
            worker.stdin.close()
            seen = 0
            with Progress(len(job["requests"]), "transformers", "requests", progress) as bar:
                for line in worker.stdout:
                    message = json.loads(line)
                    if "error" in message:
                        raise ConfigError(f"with-transformers: {message['error']}")
                    bar.advance(message.get("progress", seen) - seen)
                    seen = message.get("progress", seen)
                    result = message.get("result", result)
        except BrokenPipeError:
            pass  # it died; its log says why
        finally:
            alive = late.is_alive()
            late.cancel()
            if result is None:
                worker.kill()
            reader.join(5)
    if result is None:
        why = f"stopped after {timeout:.0f} s" if not alive else (log or ["it ended without a result"])[-1].strip()
        raise ConfigError(f"with-transformers: {why}")
    return result
