"""How a message says what to install."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).parents[2]


def install_command(extra: str, root: Path = _ROOT) -> str:
    """What installs an extra of pyproject.toml beside this copy of the library, from any folder: of a checkout, with
    the versions that were tested; else for the package as it is installed, which pip then does not look for
    elsewhere."""
    if (root / "pyproject.toml").is_file() and (root / "constraints.txt").is_file():
        return f'pip install -e "{root}[{extra}]" -c "{root / "constraints.txt"}"'
    return f'pip install "nanoflow_jax[{extra}]"'
