"""Folders of safetensors: slices are views of the mapped file, and everything wrong with a folder is one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nanoflow_jax.config import ConfigError
from nanoflow_jax.models.registry import parse_config
from nanoflow_jax.weights import WeightsError, open_weights
from tests.reference.checkpoints import CASES, make_weights, write_checkpoint
from tests.weights.unfuse import assert_same_tensors, hugging_face_tensors, load

SINGLE, SHARDED = "biases", "linear_new_rope_sharded"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.mark.parametrize("case", CASES)
def test_table_and_slices_of_every_case(case: str, tmp_path: Path) -> None:
    source = open_weights(write_checkpoint(case, tmp_path))
    for name, values in make_weights(case).items():
        tensor = source.table[name]
        assert (tensor.shape, tensor.dtype) == (values.shape, CASES[case].file_dtype)
        index = tuple(slice(size // 3, size - size // 4) for size in values.shape)
        part = source.read_slice(name, index)
        assert part.dtype == (ml_dtypes.bfloat16 if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype))
        np.testing.assert_array_equal(part.astype(np.float32), values[index])


def test_reads_no_more_than_the_slice(tmp_path: Path) -> None:
    rows, columns = 1 << 20, 1 << 14  # 32 GiB in bfloat16, of which the disk holds the header only
    header = {"a": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, 2 * rows * columns]}}
    text = json.dumps(header).encode() + b" "  # data at an odd offset
    text += b" " * (len(text) % 2 == 0)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * rows * columns)
        file.seek(-2, 2)
        file.write(np.array(1.5, ml_dtypes.bfloat16).tobytes())
    part = open_weights(tmp_path).read_slice("a", (slice(rows - 2, rows), slice(columns - 3, columns)))
    assert part.astype(np.float32).tolist() == [[0, 0, 0], [0, 0, 1.5]]
    assert not part.flags.owndata


# ---- bad folders ----------------------------------------------------------------------------------------------------

Damage = Callable[[Path], object]


def _edit(change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def _edit_index(change: Callable[[dict[str, str]], object]) -> Damage:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def _cut(name: str, keep: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / name).write_bytes(keep((folder / name).read_bytes()))


def _duplicate(folder: Path) -> None:
    first, second = (load_file(folder / name) for name in SHARDS[:2])
    save_file(second | {"model.embed_tokens.weight": first["model.embed_tokens.weight"]}, folder / SHARDS[1])


def _only_torch(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _retype(dtype: str) -> Damage:
    return _edit(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(dtype)}))


def _reshape(name: str, *shape: int) -> Damage:
    return _edit(lambda t: t.update({name: np.zeros(shape, np.float32)}))


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
BAD: dict[str, tuple[str, Damage, str]] = {
    "no weights": (
        SINGLE,
        lambda f: (f / "model.safetensors").unlink(),
        "holds no weights; accepted: model.safetensors",
    ),
    "only PyTorch": (SINGLE, _only_torch, r"only PyTorch weights \(pytorch_model.bin\).*accepted: model.safetensors"),
    "shards without index": (SHARDED, lambda f: (f / INDEX).unlink(), f"holds {SHARDS[0]}, .* without {INDEX}"),
    "both layouts": (SHARDED, lambda f: save_file({}, f / "model.safetensors"), "holds both .*; keep the one"),
    "empty file": (SINGLE, _cut("model.safetensors", lambda b: b""), "model.safetensors: truncated, corrupt or not"),
    "header beyond file": (SINGLE, _cut("model.safetensors", lambda b: b[:64]), "truncated.*invalid header length"),
    "data cut short": (SINGLE, _cut("model.safetensors", lambda b: b[:-1]), "truncated.*not fully covered"),
    "data too long": (SINGLE, _cut("model.safetensors", lambda b: b + b"x"), "truncated, corrupt"),
    "not safetensors": (SINGLE, _cut("model.safetensors", lambda b: b"<html>no</html>"), "not a safetensors file"),
    "shard cut short": (SHARDED, _cut(SHARDS[1], lambda b: b[:-9]), f"{SHARDS[1]}: truncated"),
    "absent shard": (SHARDED, lambda f: (f / SHARDS[2]).unlink(), f"names absent files: {SHARDS[2]}; .* all 3"),
    "index not JSON": (SHARDED, _cut(INDEX, lambda b: b[:50]), f"{INDEX}: not valid JSON"),
    "index without map": (SHARDED, lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "index a list": (SHARDED, lambda f: (f / INDEX).write_text("[1]"), "has no weight_map"),
    "index empty": (SHARDED, _edit_index(lambda m: m.clear()), "not empty"),
    "index leaves folder": (SHARDED, _edit_index(lambda m: m.update({NORM: "../x.safetensors"})), "name of a file"),
    "index wrong shard": (SHARDED, _edit_index(lambda m: m.update({NORM: SHARDS[0]})), f"{NORM} is in .*; it is in"),
    "index wrong tensor": (
        SHARDED,
        _edit_index(lambda m: m.update({"x.y": SHARDS[0]})),
        "x.y is in .* does not hold it",
    ),
    "index incomplete": (SHARDED, _edit_index(lambda m: m.pop(NORM)), f"does not list {NORM}"),
    "tensor in two files": (SHARDED, _duplicate, "model.embed_tokens.weight is in two files"),
    "float64": (SINGLE, _retype("float64"), f"{NORM} has dtype F64; accepted: float32, bfloat16, float16"),
    "int8": (SINGLE, _retype("int8"), f"{NORM} has dtype I8; accepted"),
    "missing": (SINGLE, _edit(lambda t: t.pop(NORM)), f"missing {NORM} "),
    "missing head": (SINGLE, _edit(lambda t: t.pop("lm_head.weight")), "missing lm_head.weight .*tie_word_embeddings"),
    "many missing": (SINGLE, _edit(lambda t: [t.pop(n) for n in list(t) if "bias" in n]), r"missing .* and 11 more"),
    "unknown": (SINGLE, _edit(lambda t: t.update(extra=np.zeros(3, np.float32))), r"unknown extra \(exactly"),
    "renamed": (
        SINGLE,
        _edit(lambda t: t.update({"norm.weight": t.pop(NORM)})),
        f"missing {NORM}; unknown norm.weight",
    ),
    "wrong shape": (
        SINGLE,
        _reshape(UP, 128, 65),
        re.escape(f"{UP} has shape (128, 65); config.json asks for (128, 64)"),
    ),
    "wrong rank": (SINGLE, _reshape(NORM, 8, 8), r"has shape \(8, 8\); config.json asks for \(64,\)"),
    "transposed": (SINGLE, _reshape(UP, 64, 128), r"has shape \(64, 128\)"),
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_folder_is_one_line_before_any_allocation(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, damage, message = BAD[problem]
    write_checkpoint(case, tmp_path)
    damage(tmp_path)
    monkeypatch.setattr(jax, "make_array_from_callback", lambda *_, **__: pytest.fail("allocated before the check"))
    with pytest.raises(WeightsError, match=message) as caught:
        load(tmp_path, 2)
    assert isinstance(caught.value, ConfigError)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_absent_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere: no such folder; accepted"):
        open_weights(tmp_path / "nowhere")


@pytest.mark.parametrize("case", ["llama2_mha", "odd_vocab_tied"])
def test_inert_tensors_are_accepted(case: str, tmp_path: Path) -> None:
    """Rotary buffers of old checkpoints, and the head stored although it is tied."""
    folder = write_checkpoint(case, tmp_path)
    names = set(open_weights(folder).table)
    assert names - set(make_weights(case))
    config, _, params = load(folder, 2)
    assert_same_tensors(hugging_face_tensors(params, config), make_weights(case))


@pytest.mark.parametrize("absent_file", [False, True])
def test_index_files_as_published(tmp_path: Path, absent_file: bool) -> None:
    """A list may name a tied head that no file holds, and leave out rotary buffers that one does."""
    folder = write_checkpoint(SHARDED, tmp_path)
    config = {**json.loads((folder / "config.json").read_text()), "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    for shard in SHARDS:
        tensors = load_file(folder / shard)
        tensors.pop("lm_head.weight", None)
        tensors[f"model.layers.{shard[10]}.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        save_file(tensors, folder / shard)
    head = "model-00004-of-00004.safetensors" if absent_file else SHARDS[2]
    _edit_index(lambda m: m.update({"lm_head.weight": head}))(folder)
    _, _, params = load(folder, 2)
    wanted = {name: value for name, value in make_weights(SHARDED).items() if name != "lm_head.weight"}
    parsed = parse_config(config)
    assert_same_tensors(hugging_face_tensors(params, parsed), wanted)
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(WeightsError, match=r"missing lm_head\.weight \(needed because tie_word_embeddings is false"):
        load(folder, 2)
