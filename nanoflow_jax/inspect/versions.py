"""What compiled a step: the versions that a report's program depends on."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from nanoflow_jax.system.platform import find_ptxas

# XLA for CUDA comes in the pjrt package, Mosaic GPU's compiler in the plugin's.
PACKAGES = tuple(f"jax-cuda{major}-{part}" for major in (13, 12) for part in ("pjrt", "plugin"))


@cache
def compiler_versions() -> dict[str, str]:
    """By name: jax, jaxlib, the CUDA packages that are installed, and ptxas where it is found."""
    found = {name: version(name) for name in ("jax", "jaxlib")}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if (ptxas := find_ptxas()) is not None:
        told = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=False).stdout
        release = re.search(r"\bV(\d[\d.]*)", told)
        found["ptxas"] = release.group(1) if release else "of an unknown version"
    return found


def text(versions: Mapping[str, str]) -> str:
    """A line of a report."""
    return "compiled by " + ", ".join(f"{name} {number}" for name, number in versions.items())
