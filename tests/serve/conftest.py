"""One small deterministic "tiny" for all of these tests."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow_jax import LLM
from tests.evaluate.flags import OPTIONS


@pytest.fixture(scope="session")
def llm() -> LLM:
    options: dict[str, Any] = OPTIONS
    return LLM("tiny", progress=False, **options)
