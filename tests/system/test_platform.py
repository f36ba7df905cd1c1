"""How JAX is started on a GPU, decided without one: the share of its memory, the CUDA toolkit."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanoflow_jax.engine.memory import GIB, usable_memory
from nanoflow_jax.system import platform
from nanoflow_jax.system.install import install_command
from nanoflow_jax.system.platform import FRACTIONS, claim_gpu_memory, find_ptxas, use_cuda_toolkit, warn_without_ptxas

H100 = int(79.1 * GIB)
NAME = FRACTIONS[0]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with a GPU, on which JAX has not started, and without a CUDA toolkit."""
    for name in (*FRACTIONS, platform._CLAIMED, "JAX_PLATFORMS", "CUDA_ROOT"):
        monkeypatch.setenv(name, "")  # so that whatever a test sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    started(monkeypatch, False)
    monkeypatch.setattr(platform, "CUDA", tmp_path / "cuda")
    monkeypatch.setattr(platform.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))


def started(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    bridge = SimpleNamespace(backends_are_initialized=lambda: yes)
    monkeypatch.setitem(platform.sys.modules, "jax._src.xla_bridge", bridge)  # pyright: ignore[reportArgumentType]


def stats() -> dict[str, int]:
    """Of the allocator of a JAX that starts now."""
    return {"bytes_limit": int(H100 * platform.memory_fraction())}


@pytest.mark.parametrize("utilization", [0.5, 0.9, 0.95])
def test_the_pool_gets_what_is_promised(utilization: float, caplog: pytest.LogCaptureFixture) -> None:
    claim_gpu_memory(utilization)
    assert usable_memory(stats(), utilization) == pytest.approx(utilization * H100, rel=1e-3)
    assert not caplog.records


def test_by_default_too_little_would_be_there_which_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """JAX was started first, with its own default: 0.75, less what an allocator cannot hand out."""
    assert usable_memory(stats(), 0.9) == pytest.approx(0.75 * 0.98 * H100)
    (record,) = caplog.records
    line = record.getMessage()
    assert record.levelno == logging.WARNING and "\n" not in line
    assert line.startswith(
        "memory_utilization: JAX runs with 0.75 of the GPU's memory (XLA_PYTHON_CLIENT_MEM_FRACTION)"
    )
    assert "13.1 of the 71.2 GiB that 0.9 allows are out of reach; set it to 0.92 before JAX starts" in line


def test_what_others_decided_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FRACTIONS:  # the user's share, under either of its names: JAX refuses both at once
        monkeypatch.setenv(name, "0.5")
        claim_gpu_memory(0.9)
        assert [os.environ.get(n) for n in FRACTIONS if n != name] == [None]
        assert platform.memory_fraction() == 0.5
        monkeypatch.delenv(name)
    started(monkeypatch, True)
    claim_gpu_memory(0.9)
    assert NAME not in os.environ
    started(monkeypatch, False)
    monkeypatch.setattr(platform, "has_gpu", lambda: False)
    claim_gpu_memory(0.9)
    assert NAME not in os.environ
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    claim_gpu_memory(0.9)
    assert NAME not in os.environ


def test_an_llm_replaces_what_the_command_line_claimed() -> None:
    claim_gpu_memory()
    assert os.environ[NAME] == "0.920"
    claim_gpu_memory(0.95)
    assert os.environ[NAME] == "0.970"
    claim_gpu_memory(1.0)
    assert os.environ[NAME] == "0.980"  # the driver needs some
    os.environ[NAME] = "0.3"  # the user's
    claim_gpu_memory(0.9)
    assert os.environ[NAME] == "0.3"


@pytest.mark.parametrize("none", [None, {}, {"bytes_in_use": 3}])
def test_a_device_without_a_limit(none: Any) -> None:
    assert usable_memory(none, 0.9) is None


def place(folder: Path) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "ptxas").write_text("#!/bin/sh\n")
    (folder / "bin" / "ptxas").chmod(0o755)
    return folder / "bin" / "ptxas"


def test_the_toolkit_is_named_where_jax_would_not_look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CUDA's runtime libraries come in wheels, without ptxas, and the toolkit is in its usual place: JAX would take the
    wheels' folder for it."""
    wheels = tmp_path / "site" / "nvidia"
    (wheels / "cu13" / "lib").mkdir(parents=True)
    spec = SimpleNamespace(submodule_search_locations=[str(wheels)])
    monkeypatch.setattr(platform.importlib.util, "find_spec", lambda name: spec)
    use_cuda_toolkit()
    assert "CUDA_ROOT" not in os.environ  # there is none yet
    in_toolkit = place(platform.CUDA)
    monkeypatch.setattr(platform, "has_gpu", lambda: False)
    use_cuda_toolkit()
    assert "CUDA_ROOT" not in os.environ
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    use_cuda_toolkit()
    assert os.environ["CUDA_ROOT"] == str(platform.CUDA)
    assert find_ptxas() == in_toolkit
    del os.environ["CUDA_ROOT"]
    with_nvcc = place(wheels / "cu13")
    use_cuda_toolkit()
    assert "CUDA_ROOT" not in os.environ
    assert find_ptxas() == with_nvcc
    monkeypatch.setenv("CUDA_ROOT", str(tmp_path / "mine"))
    assert find_ptxas() == with_nvcc
    mine = place(tmp_path / "mine")
    assert find_ptxas() == mine


def test_no_ptxas_is_one_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    warn_without_ptxas()
    (record,) = caplog.records
    assert record.getMessage().startswith("ptxas: not found in $CUDA_ROOT/bin, on PATH or in ")
    assert f"{install_command('cuda')} brings it" in record.getMessage()
    caplog.clear()
    monkeypatch.setenv("PATH", str(place(platform.CUDA.parent / "other").parent))
    warn_without_ptxas()
    assert not caplog.records
