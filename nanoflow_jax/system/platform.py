"""How JAX is started: its platform, its share of a GPU's memory, the CUDA toolkit, the compile cache; without noise."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanoflow_jax.system.install import install_command

logger = logging.getLogger("nanoflow_jax")

FRACTIONS = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")  # environment variables
JAX_FRACTION = 0.75  # of a GPU's memory, that JAX takes for itself when none of them is set
UTILIZATION = 0.9  # of a GPU's memory, where nobody says how much may be used
SPARE = 0.02  # of it, more than may be used: no allocator hands out every byte
MOST = 0.98  # the driver, loaded programs and command buffers need some too
CUDA = Path("/usr/local/cuda")


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is present; asked without JAX, which would start."""
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/proc/driver/nvidia/version")


def num_gpus() -> int:
    """NVIDIA GPUs that this process may use; counted without JAX, which would start and take their memory."""
    if not has_gpu():
        return 0
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in visible.split(",")]
        return next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
    return sum(name.removeprefix("nvidia").isdecimal() for name in os.listdir("/dev") if name.startswith("nvidia"))


def prefer_cpu_without_gpu() -> None:
    """Sets JAX_PLATFORMS=cpu where the CUDA plugin is installed but no NVIDIA device is present.

    Otherwise the plugin prints a page of cuDNN errors before JAX falls back to the CPU. A platform the user chose is
    kept.
    """
    if "JAX_PLATFORMS" in os.environ or has_gpu():
        return
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if (jax := sys.modules.get("jax")) is not None and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")


def memory_fraction() -> float:
    """Share of a GPU's memory that JAX takes when it starts, or took."""
    for name in FRACTIONS:
        try:
            return float(os.environ[name])
        except (KeyError, ValueError):
            continue
    return JAX_FRACTION


def claim_gpu_memory(utilization: float = UTILIZATION) -> None:
    """Lets JAX take a little more of a GPU's memory than the share that may be used: its own default is less than that.

    Does nothing where no GPU is present, when the user has set a share, or once JAX has started: then
    `engine.memory.usable_memory` says what is out of reach.
    """
    if not has_gpu() or os.environ.get("JAX_PLATFORMS", "").startswith("cpu") or _jax_has_started():
        return
    ours = os.environ.get(_CLAIMED)
    if any(os.environ.get(name, ours) != ours for name in FRACTIONS):
        return
    os.environ[FRACTIONS[0]] = os.environ[_CLAIMED] = f"{min(MOST, utilization + SPARE):.3f}"


_CLAIMED = "NANOFLOW_CLAIMED_MEM_FRACTION"  # what this library set: a later, larger share may replace it


def _jax_has_started() -> bool:
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def _ptxas_of_jax() -> Path | None:
    """In the folder that JAX takes for the CUDA toolkit: CUDA_ROOT, else that of the wheels."""
    folders = [Path(os.environ["CUDA_ROOT"])] if os.environ.get("CUDA_ROOT") else []
    spec = importlib.util.find_spec("nvidia")
    folders += [Path(at) / "cu13" for at in (spec.submodule_search_locations if spec else None) or ()]
    return next((f / "bin" / "ptxas" for f in folders if (f / "bin" / "ptxas").exists()), None)


def find_ptxas() -> Path | None:
    """The assembler that XLA and Mosaic start to compile for NVIDIA GPUs: where JAX looks, else in `/usr/local/cuda` or
    on PATH."""
    usual, on_path = CUDA / "bin" / "ptxas", shutil.which("ptxas")
    return _ptxas_of_jax() or (usual if usual.exists() else Path(on_path) if on_path else None)


def use_cuda_toolkit() -> None:
    """Sets CUDA_ROOT where a GPU is present, the user has not, and ptxas is in `/usr/local/cuda` alone: with CUDA's
    runtime libraries from wheels, JAX does not look there."""
    if has_gpu() and "CUDA_ROOT" not in os.environ and find_ptxas() == CUDA / "bin" / "ptxas":
        os.environ["CUDA_ROOT"] = str(CUDA)


def warn_without_ptxas() -> None:
    """One line where nothing can be compiled for the GPU; what follows from JAX is a page."""
    if find_ptxas() is None:
        logger.warning(
            "ptxas: not found in $CUDA_ROOT/bin, on PATH or in %s/bin; nothing compiles for an NVIDIA GPU without it; "
            "%s brings it, or set CUDA_ROOT to a CUDA toolkit of version 13",
            CUDA,
            install_command("cuda"),
        )


def use_compile_cache() -> None:
    """Keeps compiled steps in a folder of the user's, so that the next start does not compile.

    `NANOFLOW_COMPILE_CACHE` names another folder, or turns the cache off when empty; a cache that JAX already has is
    kept. The files are executables: a folder that others own or can write to is not used.
    """
    import jax

    wanted = os.environ.get("NANOFLOW_COMPILE_CACHE")
    if wanted == "" or jax.config.jax_compilation_cache_dir:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(wanted) if wanted else root / "nanoflow_jax" / "xla"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.stat()
    except OSError as error:
        logger.warning("compile cache is off: %s", error)
        return
    if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        logger.warning("compile cache is off: %s is not private to this user (owner and mode 0700 wanted)", folder)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@contextmanager
def without_compile_cache() -> Iterator[None]:
    """No compile cache, in the whole process: for devices that are not there, whose executables cannot be read back.

    JAX would write them, and warn at the next compile of the same program.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    was_on = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once whether the cache is on
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was_on)
        compilation_cache.reset_cache()
