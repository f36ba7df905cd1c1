"""What a model folder can do to whoever loads it: run no code, ask nothing, take no memory that it does not need."""

from __future__ import annotations

import ast
import builtins
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import nanoflow_jax
from nanoflow_jax import LLM
from nanoflow_jax.config import EMBEDDED, ConfigError
from nanoflow_jax.engine.memory import check_requested, page_bytes
from nanoflow_jax.models.registry import read_config
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


def test_a_tokenizers_regular_expression_that_never_ends(tmp_path: Path):
    """It has a limit of its own, which it reports by a panic: no Exception, and so past what a run survives."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    folder = model_folder(tmp_path / "model", tokenizer={"pre_tokenizer": split})
    with pytest.raises(ValueError, match=r"^prompt: the tokenizer fails on it \(.*limit"):
        Tokenizer(folder).encode("a" * 40 + "b", True)


@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "intermediate_size", "head_dim"]
)
def test_an_absurd_size_is_refused_at_once(name: str, tmp_path: Path):
    folder = model_folder(tmp_path / "model", config={name: 10**9})
    with pytest.raises(ConfigError, match=rf"config.json: {name}: 1000000000 must be a positive integer, at most"):
        LLM(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_hidden_layers": 4000}, "num_hidden_layers is 4000 in config.json; the checkpoint has"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1 in config.json; the checkpoint has"),
        ({"intermediate_size": 2**24}, r"mlp.* has shape .*; config.json asks for \(16777216, "),
        ({"vocab_size": 2**24}, r"embed_tokens.weight has shape .*; config.json asks for \(16777216, "),
    ],
)
def test_a_size_that_the_checkpoint_has_not_is_told_as_such(changed: dict[str, int], message: str, tmp_path: Path):
    folder = model_folder(tmp_path / "model", config=changed)
    with pytest.raises(WeightsError, match=message):
        LLM(folder, tensor_parallel_size=1, progress=False)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"kv_cache_tokens": 10**12}, "kv_cache_tokens"),
        ({"tokens_per_step": 8 * 10**9}, "tokens_per_step"),
        ({"tokens_per_step": 8 * 10**8, "decode_slots": 4 * 10**8}, "tokens_per_step|decode_slots"),
        ({"kv_cache_tokens": 10**4000}, "kv_cache_tokens"),
    ],
)
def test_sizes_beyond_all_memory_are_refused_at_once(options: dict[str, Any], name: str):
    with pytest.raises(ConfigError, match=rf"^({name}): .* accepted: |^{name}: .* below 2\*\*62") as found:
        LLM("tiny", tensor_parallel_size=1, progress=False, **options)
    assert len(str(found.value)) <= 500


def test_sizes_on_a_device_are_counted():
    """What just fits is accepted: page bytes of a device, rows of the residual, counts of tokens."""
    config = read_config(TINY / "config.json")
    page = page_bytes(config, 2, 16)
    row, counts = 2 * config.hidden_size * 4, 4 + config.vocab_size
    sizes: dict[str, int] = {"kv_cache_tokens": 1600, "tokens_per_step": 1000, "decode_slots": 500}
    limit = {"kv_cache_tokens": 100 * page, "tokens_per_step": 1000 * row, "decode_slots": 500 * counts}
    for name, enough in limit.items():
        wanted: dict[str, Any] = {**dict.fromkeys(sizes, 0), name: sizes[name]}
        check_requested(replace(config, dtype="float32"), 2, enough, page=page, page_size=16, **wanted)
        with pytest.raises(ConfigError, match=rf"^{name}: {sizes[name]} take 0 GiB at least on each device"):
            check_requested(replace(config, dtype="float32"), 2, enough - 1, page=page, page_size=16, **wanted)
