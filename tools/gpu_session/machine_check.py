"""Whether this machine can run anything: the driver, ptxas, and a tiny program compiled and run. JSON.

python -m tools.gpu_session.machine_check          # exit status 1 where JAX sees no GPU or ptxas is missing
python -m tools.gpu_session.machine_check --tiny   # anywhere
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from nanoflow_jax.engine.memory import GIB
from nanoflow_jax.system.platform import find_ptxas


def _lines(*command: str) -> list[str]:
    """What a program says; nothing where it is not there."""
    if not shutil.which(command[0]):
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return [f"{command[0]} did not answer in 20 s"]
    return done.stdout.strip().splitlines()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.gpu_session.machine_check", description=__doc__, allow_abbrev=False)
    parser.add_argument("--tiny", action="store_true", help="a CPU will do")
    tiny = parser.parse_args(arguments).tiny
    ptxas, device = find_ptxas(), jax.devices()[0]
    began = time.perf_counter()
    x = jnp.arange(64.0).reshape(8, 8)
    right = bool((jax.jit(lambda x: x @ x.T + 1)(x) == x @ x.T + 1).all())
    limit = (device.memory_stats() or {}).get("bytes_limit")
    found = {
        "device": device.device_kind,
        "platform": device.platform,
        "driver": _lines("nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader"),
        "ptxas": None if ptxas is None else str(ptxas),
        "ptxas_version": [] if ptxas is None else _lines(str(ptxas), "--version")[-2:],
        "sanitizer": shutil.which("compute-sanitizer"),
        "memory_gib": None if limit is None else round(limit / GIB, 1),
        "jit_seconds": round(time.perf_counter() - began, 2),
        "right": right,
        "package": str(Path(__file__).parents[2]),
    }
    print(json.dumps(found, indent=1))
    if not tiny and (device.platform != "gpu" or ptxas is None):
        why = f"JAX runs on {device.platform!r}" if device.platform != "gpu" else "ptxas was not found"
        print(f"tools.gpu_session.machine_check: {why}", file=sys.stderr)
        return 1
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
