"""Choosing JAX's platform and its compile cache, before and without noise."""

from __future__ import annotations

import importlib.util
import logging
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("nanoflow_jax")


def prefer_cpu_without_gpu() -> None:
    """Sets JAX_PLATFORMS=cpu where the CUDA plugin is installed but no NVIDIA device is present.

    Otherwise the plugin prints a page of cuDNN errors before JAX falls back to the CPU. A platform the user chose is
    kept.
    """
    if (
        "JAX_PLATFORMS" in os.environ
        or os.path.exists("/dev/nvidiactl")
        or os.path.exists("/proc/driver/nvidia/version")
    ):
        return
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if (jax := sys.modules.get("jax")) is not None and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")


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
