"""Files made under or beside an output: never through a link that someone else has put in their place."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from nanoflow_jax.system.reading import ConfigError


def followed(path: str | Path) -> Path:
    """Where an output is that the user names: links of his own are followed, once, and what belongs to the output is
    made beside where they lead."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def create(path: Path) -> BinaryIO:
    """A new file, open to write, in place of whatever has the name: a draft of a run that was killed, or a link."""
    path.unlink(missing_ok=True)
    return open(path, "xb")  # which follows no link


def open_to_append(path: Path) -> BinaryIO:
    """The file, made when there is none, open to read and append, unbuffered. Raises ConfigError for a link, a device
    and the like."""
    if os.path.islink(path):
        raise ConfigError(f"{path} is a link, which is not followed here; remove it")
    file = open(path, "a+b", buffering=0, opener=no_link)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ConfigError(f"{path} is not a file; name another output")
    return file  # type: ignore[return-value]  # a raw file is one


def no_link(path: str, flags: int) -> int:
    """For `open(..., opener=no_link)`: fails on a link instead of following it."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
