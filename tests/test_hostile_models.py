"""What a model folder can do to whoever loads it: run no code, ask nothing, take no memory that it does not need."""

from __future__ import annotations

import ast
import builtins
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

import nanoflow_jax
from nanoflow_jax.config import EMBEDDED
from nanoflow_jax.tokenizer import Tokenizer
from nanoflow_jax.weights import orbax_files
from nanoflow_jax.weights.orbax_files import OrbaxFiles
from nanoflow_jax.weights.source import WeightsError

TINY = EMBEDDED["tiny"]


def model_folder(folder: Path, **fields: dict[str, Any]) -> Path:
    """A copy of the embedded model; fields: of its config.json or tokenizer_config.json."""
    shutil.copytree(TINY, folder)
    for name, changed in fields.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return folder


def test_code_in_a_model_folder_is_not_run_and_not_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda text="": asked.append(text) or "y")
    code = {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}
    folder = model_folder(
        tmp_path / "model", config={"model_type": "own", "auto_map": code}, tokenizer_config={"auto_map": code}
    )
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Tokenizer: pass\n")
    with caplog.at_level(logging.WARNING, "nanoflow_jax"):
        found = Tokenizer(folder)
    assert found.encode("12+30=", True) == Tokenizer(TINY).encode("12+30=", True)
    assert not asked and not (tmp_path / "ran").exists()
    assert [r.getMessage() for r in caplog.records] == [
        f"tokenizer: {folder} names code of its own (auto_map), which is not run"
    ]


def test_transformers_is_never_left_to_ask():
    """Left out, its default may be a question on standard input, which differs by class and version."""
    found = []
    for path in Path(nanoflow_jax.__file__).parent.rglob("*.py"):
        if path.name == "train_tiny_llama.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "from_config"):
                given = {k.arg: k.value for k in node.keywords}
                trusted = given.get("trust_remote_code")
                assert isinstance(trusted, ast.Constant) and trusted.value is False, f"{path.name}:{node.lineno}"
                found.append(path.name)
    assert sorted(found) == ["tokenizer.py", "transformers_worker.py"]


@pytest.mark.parametrize("block", ["/etc", "../weights/a", "..", "", "a/../../b", None, ["a"]])
def test_a_checkpoint_reads_nothing_outside_its_folder(block: Any, tmp_path: Path):
    tensors = {"a": {"shape": [2], "dtype": "float32", "block": block, "sample_sha256": ""}}
    manifest = {
        "format": orbax_files.FORMAT, "version": orbax_files.VERSION, "tensors": tensors, "files": {},
        "fingerprint": orbax_files.fingerprint({}, tensors),
    }  # fmt: skip
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / orbax_files.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(WeightsError, match=r"block .* of a; the name of a folder in weights is accepted"):
        OrbaxFiles(tmp_path)
