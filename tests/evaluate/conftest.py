"""One small deterministic "tiny" for all of these tests, and the command line that uses it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanoflow_jax import LLM, api
from nanoflow_jax.cli import main

sys.path.insert(0, str(Path(__file__).parent))

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


@pytest.fixture(scope="session")
def llm() -> LLM:
    options: dict[str, Any] = OPTIONS
    return LLM("tiny", progress=False, **options)


@pytest.fixture
def cli(llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs `nanoflow COMMAND ... FLAGS` in this process, with the shared model; (status, stdout, stderr)."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")

    def make(model: str, **options: Any) -> LLM:
        assert model == "tiny"
        assert {name: options[name] for name in OPTIONS} == OPTIONS
        return llm

    monkeypatch.setattr(api, "LLM", make)

    def run(*arguments: str, flags: bool = True) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([*arguments, *(FLAGS if flags else [])])
        except SystemExit as stop:  # argparse's way
            assert isinstance(stop.code, int)
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run
