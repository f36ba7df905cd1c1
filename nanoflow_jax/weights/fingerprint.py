"""Which model a folder holds."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_WHOLE = 2**20  # files up to twice this size are hashed whole, larger ones by their ends and their size


def model_fingerprint(folder: Path) -> str:
    """Of a model's config, tokenizer and weights: sha256 over names, sizes and contents of its files; of large files
    the first and the last MiB count. Notes (*.md) and hidden files do not."""
    digest = hashlib.sha256()
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix.lower() != ".md"]
    for path in paths:
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        size = path.stat().st_size
        digest.update(f"{name.as_posix()}\0{size}\0".encode())
        with open(path, "rb") as file:
            if size <= 2 * _WHOLE:
                digest.update(file.read())
            else:
                digest.update(file.read(_WHOLE))
                file.seek(-_WHOLE, os.SEEK_END)
                digest.update(file.read(_WHOLE))
    return digest.hexdigest()
