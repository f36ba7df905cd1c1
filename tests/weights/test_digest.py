"""The digest by which processes find out whether they have the same model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nanoflow_jax.weights.hub import EMBEDDED
from nanoflow_jax.weights.load import model_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED["tiny"], tmp_path / "model"))


def test_a_copy_has_the_same_digest(folder: Path) -> None:
    assert model_digest(folder) == model_digest(EMBEDDED["tiny"])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_one_changed_byte_gives_another(folder: Path, name: str) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    if name == "model.safetensors":
        data[8 + int.from_bytes(data[:8], "little")] ^= 1  # of the first tensor
    else:
        data += b"\n"
    path.write_bytes(bytes(data))
    assert model_digest(folder) != model_digest(EMBEDDED["tiny"])
