"""The OpenAPI description says what is accepted and answered, and no input makes the server fail: by schemathesis, a
few seconds of examples. `python -m tests.serve.test_schema` takes minutes of them."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the serve extra is not installed")
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (the dev extra)")
