"""One small deterministic "tiny" for all of these tests, and the command line that uses it."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow_jax import LLM, api
from nanoflow_jax.cli import main
from tests.evaluate.flags import FLAGS, OPTIONS, Cli


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
