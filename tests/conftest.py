"""Every test runs on eight CPU devices, with strict dtype promotion; warnings are errors (pyproject.toml)."""

from __future__ import annotations

import gc
import os
import signal
from collections import Counter
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# XLA's former code generator for fusions on CPUs: compiles in half the time, to code as fast. GPUs' is as it is.
os.environ["XLA_FLAGS"] = " ".join(
    [*os.environ.get("XLA_FLAGS", "").split(), "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true"]
)

import hypothesis
import jax
import pytest

from nanoflow_jax.system.platform import without_compile_cache
from tests import interpreter

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs; some tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
interpreter.on_the_host()

# On a busy machine a draw may be slow; that says nothing about the code.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("busy")


LONG = ("test_notebooks.py", "test_gpu_session_whole.py", "test_families_on_gpus.py", "test_readme.py")  # few tests


def pytest_configure() -> None:
    """Each test process keeps to a processor of its own where there are as many: threads of two on the same ones wake
    and take turns on all of them, which costs up to a fifth of the time of an engine's step."""
    workers, name = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), os.environ.get("PYTEST_XDIST_WORKER", "")
    processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if workers > 1 and len(processors) == workers:
        os.sched_setaffinity(0, {processors[int(name.removeprefix("gw")) % workers]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, then those with many tests: whole files go to test processes in this order, and a long one that
    came last would leave the other processes idle."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONG, -tests[item.path], str(item.path)))


def pytest_collection_finish() -> None:
    """What is there before the first test stays: the garbage collector need not look at it again, nor often at what is
    traced and dropped."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def no_leak(request: pytest.FixtureRequest) -> Iterator[None]:
    """After the test the engine of the module's `llm` is idle, and every page is available."""
    from tests.engine.engine_driver import assert_idle

    llm = request.getfixturevalue("llm")
    yield
    assert_idle(llm)


@pytest.fixture(autouse=True)
def no_compile_cache_for_gpus(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that compile for a GPU that is not there; others of the same process may have put the cache on."""
    if request.node.get_closest_marker("aot") is None or "compile_cache" in request.node.name:
        yield
        return
    with without_compile_cache():
        yield
