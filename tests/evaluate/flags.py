"""The options of the small deterministic "tiny" that these tests share, as an LLM takes them and as flags."""

from __future__ import annotations

from collections.abc import Callable

OPTIONS = {
    "tensor_parallel_size": 1,
    "max_model_len": 128,
    "decode_slots": 8,
    "tokens_per_step": 40,
    "page_size": 16,
    "kv_cache_tokens": 2048,
    "deterministic": True,
}
FLAGS = [
    *("--tensor-parallel-size", "1", "--max-model-len", "128", "--decode-slots", "8", "--tokens-per-step", "40"),
    *("--page-size", "16", "--kv-cache-tokens", "2048", "--deterministic", "--quiet", "--cpu-devices", "8"),
]

Cli = Callable[..., tuple[int, str, str]]
