"""Names of models: the embedded one, folders, and Hub ids (the Hub itself is replaced)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from nanoflow_jax import LLM
from nanoflow_jax.commands.batch import run_tokenizer
from nanoflow_jax.config import ConfigError
from nanoflow_jax.weights import WeightsError, open_weights, resolve_model
from nanoflow_jax.weights.hub import resolve_tokenizer


def _answer(kind: type[Exception]) -> Exception:
    """An error of the Hub client, without the HTTP response that some of them want."""
    error = kind.__new__(kind)
    error.args = ("first line\nsecond line",)
    return error


def test_tiny_and_local_folder(tmp_path: Path) -> None:
    assert "model.norm.weight" in open_weights(resolve_model("tiny")).table
    assert resolve_model(str(tmp_path)) == tmp_path


def test_hub_id_downloads_only_what_a_model_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        asked.update(model=model, **options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("some-org/some-model", "v1.2") == tmp_path
    assert (asked["model"], asked["revision"]) == ("some-org/some-model", "v1.2")
    files = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    files += ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json"]
    refused = ["pytorch_model.bin", "pytorch_model.bin.index.json", "original/params.json", "consolidated.safetensors"]
    refused += ["original/consolidated.00.pth", "flax_model.msgpack", "README.md", "modeling_custom.py"]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(huggingface_hub.utils.filter_repo_objects(files + refused, **patterns)) == files


def test_a_tokenizer_asks_the_hub_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its own files alone; a Hub that cannot be reached is one line, not one per file."""
    asked: list[dict[str, Any]] = []

    def download(model: str, **options: Any) -> str:
        asked.append(options)
        if len(asked) > 1:
            raise errors.LocalEntryNotFoundError("first line\nsecond")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_tokenizer("some/model") == tmp_path
    files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    patterns = {name: asked[0][name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(huggingface_hub.utils.filter_repo_objects([*files, "model.safetensors"], **patterns)) == files
    with pytest.raises(ConfigError, match="tokenizer: 'some/model' is not in the local cache and the Hub") as caught:
        LLM("tiny", tokenizer="some/model", progress=False)
    assert "\n" not in str(caught.value) and len(asked) == 2
    with pytest.raises(ConfigError, match="tokenizer: 'some/model' is not in the local cache"):
        run_tokenizer(argparse.Namespace(tokenizer="some/model", chat_template=None))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, "is gated on the Hub: accept its terms"),
        (errors.RepositoryNotFoundError, "not on the Hub .or private"),
        (errors.RevisionNotFoundError, "at revision 'r' is not on the Hub; accepted: a branch, tag or commit"),
        (errors.LocalEntryNotFoundError, "the Hub cannot be reached; download it first"),
        (errors.OfflineModeIsEnabled, "the Hub cannot be reached"),
        (errors.HfHubHTTPError, "could not be downloaded: first line$"),
        (ConnectionError, "could not be downloaded: first line$"),
    ],
)
def test_hub_errors_are_one_line(error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise _answer(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(WeightsError, match=r"model: 'some/model'.*" + message) as caught:
        resolve_model("some/model", "r")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "", "two words/x", "a--b/c"]
)
def test_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(WeightsError, match="accepted: 'tiny', a local folder, or a Hub id"):
        resolve_model(name)


def test_a_file_and_a_revision_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="is not a folder"):
        resolve_model(str(tmp_path / "file"))
    with pytest.raises(WeightsError, match=r"revision: 'main' given with .*, a local folder"):
        resolve_model(str(tmp_path), "main")
    with pytest.raises(WeightsError, match="revision: 'main' given with 'tiny'"):
        resolve_model("tiny", "main")
