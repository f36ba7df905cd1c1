"""What a run is: written before its first result, and compared before it is continued."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow_jax.config import ConfigError
from nanoflow_jax.system.output_files import create
from nanoflow_jax.system.reading import read_json_object

if TYPE_CHECKING:
    pass

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """identity  everything that can change a bit of a result: model, settings, input. Names map to plain JSON values
    about     what is only told: versions, paths, the command"""

    kind: str  # "batch" or "eval"
    identity: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, other: Manifest) -> list[str]:
        """One text per setting that is not the same in `other`, down to the entry of a task."""
        return list(_differing("", {"kind": self.kind, **self.identity}, {"kind": other.kind, **other.identity}))

    def write(self, path: Path) -> None:
        """Atomically, and durable when this returns. Raises OSError."""
        data = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"
        write_durably(path, data.encode("utf-8", "backslashreplace"))

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises ConfigError, one line."""
        try:
            fields = read_json_object(path)
        except ConfigError as error:
            raise ConfigError(f"{path}: not the manifest of a run ({str(error).removeprefix(f'{path}: ')})") from None
        if fields.get("format", FORMAT) != FORMAT:
            raise ConfigError(f"{path}: written by another version of nanoflow; use --restart, or that version")
        wanted = {"format": int, "kind": str, "identity": dict, "about": dict}
        if set(fields) != set(wanted) or not all(isinstance(fields[name], kind) for name, kind in wanted.items()):
            raise ConfigError(f"{path}: not the manifest of a run (which holds {', '.join(wanted)})")
        return cls(fields["kind"], fields["identity"], fields["about"])


def write_durably(path: Path, data: bytes) -> None:
    """Replaces a file in one step; it is on the disk when this returns."""
    temporary = path.with_name(path.name + ".part")
    with create(temporary) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes names of new files durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _differing(name: str, mine: Any, theirs: Any) -> Iterator[str]:
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for key in [*mine, *(key for key in theirs if key not in mine)]:
            yield from _differing(f"{name}.{key}" if name else key, mine.get(key), theirs.get(key))
    elif mine != theirs:
        was, now = (json.dumps(value, ensure_ascii=False) for value in (mine, theirs))
        same = next((i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
        yield f"{name} was {_short(was, same)} and is {_short(now, same)}"


def _short(text: str, at: int) -> str:
    """At most 60 characters, with those from `at` on."""
    if len(text) <= 60:
        return text
    begin = max(0, min(at - 20, len(text) - 54))
    return ("..." if begin else "") + text[begin : begin + 54] + ("..." if begin + 54 < len(text) else "")
