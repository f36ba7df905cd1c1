"""The command that measures the server, at a tiny size."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
def test_it_runs(stream: list[str]) -> None:
    sizes = ["--requests", "20", "--output-tokens", "6", "--slots", "8", "--device-ms", "20", *stream]
    command = [sys.executable, "-m", "tools.serve_throughput", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    wall = r"generate ([\d.]+) s, served ([\d.]+) s, ratio [\d.]+"
    each = r"generate ([\d.]+), served ([\d.]+), its client ([\d.]+)"
    found = re.fullmatch(rf"{wall}; processor ms per request: {each}\n", done.stdout)
    assert found is not None, done.stdout
    # Twenty requests on eight slots take three rounds of six steps: the stand-in's time is in both.
    assert min(map(float, found.groups()[:2])) > 3 * 5 * 0.02
    assert min(map(float, found.groups()[2:])) > 0
