"""Runs a module as `python -m` does, and keeps in a file what compiling took: of a process that is killed too.

python -m tools.gpu_session.child TIMES MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import json
import runpy
import sys
import threading
from pathlib import Path

from nanoflow_jax.system.platform import use_compile_cache
from tools.gpu_session.archive import replace

COMPILED = "/jax/core/compile/backend_compile_duration"  # reading a program from the cache counts too
LOWERED = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")
CACHED = "/jax/compilation_cache/cache_hits"


def watch(path: Path) -> None:
    """Keeps {"programs", "compile_seconds", "lower_seconds", "cached"} in the file. Threads that compile at once add
    up."""
    import jax.monitoring

    found = {"programs": 0, "compile_seconds": 0.0, "lower_seconds": 0.0, "cached": 0}
    lock = threading.Lock()

    def lasted(event: str, duration_secs: float, **_: str | int) -> None:
        with lock:
            if event == COMPILED:
                found["programs"] += 1
                found["compile_seconds"] += duration_secs
                replace(path, json.dumps(found).encode())
            elif event in LOWERED:
                found["lower_seconds"] += duration_secs

    def happened(event: str, **_: str | int) -> None:
        with lock:
            found["cached"] += event == CACHED

    jax.monitoring.register_event_duration_secs_listener(lasted)
    jax.monitoring.register_event_listener(happened)


def main() -> None:
    _, times, module, *arguments = sys.argv
    use_compile_cache()
    watch(Path(times))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
