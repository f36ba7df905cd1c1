"""Experts under the names of other families, fused, and in MXFP4: the same weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nanoflow_jax.config import ConfigError, Layouts
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.parallel.mesh import make_mesh
from nanoflow_jax.weights.checkpoint import convert
from nanoflow_jax.weights.load import load_params, open_weights
from nanoflow_jax.weights.source import WeightsError
from tests.reference.checkpoints import write_checkpoint

Tensors = dict[str, np.ndarray]
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # of MXFP4, as the specification lists them; then their negatives


def params_of(folder: Path, devices: int = 1, expert_parallel: bool = False) -> list[np.ndarray]:
    config = read_config(folder / "config.json")
    infos = param_infos(config, devices, Layouts(expert_parallel=expert_parallel))
    return [np.asarray(x) for x in jax.tree.leaves(load_params(folder, config, make_mesh(config, devices), infos))]


def rewritten(folder: Path, change: Callable[[Tensors], Tensors], **fields: Any) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    for file in [*files, *folder.glob("*.index.json")]:
        file.unlink()
    save_file({n: np.ascontiguousarray(v) for n, v in change(tensors).items()}, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def as_qwen(tensors: Tensors) -> Tensors:
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    return {
        re.sub(r"\.(w[123])\.", lambda m: f".{names[m[1]]}.", n.replace("block_sparse_moe", "mlp")): value
        for n, value in tensors.items()
    }


def fused(tensors: Tensors) -> Tensors:
    """As transformers 5 holds them: all experts of a layer in one tensor."""
    found, experts = {}, {}
    for name, value in as_qwen(tensors).items():
        if at := re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name):
            experts.setdefault(at[1], {})[int(at[2]), at[3]] = value
        else:
            found[name] = value
    for prefix, parts in experts.items():
        count = 1 + max(e for e, _ in parts)
        found[f"{prefix}.gate_up_proj"] = np.stack(
            [np.concatenate([parts[e, "gate"], parts[e, "up"]]) for e in range(count)]
        )
        found[f"{prefix}.down_proj"] = np.stack([parts[e, "down"] for e in range(count)])
    return found


@pytest.mark.parametrize("style", [as_qwen, fused])
@pytest.mark.parametrize(("devices", "whole"), [(1, False), (4, True), (4, False)])
def test_names_of_experts(style: Callable[[Tensors], Tensors], devices: int, whole: bool, tmp_path: Path) -> None:
    """Mixtral's checkpoint under other names, read whole or a share at a time."""
    plain = write_checkpoint("mixtral", tmp_path / "plain")
    other = rewritten(write_checkpoint("mixtral", tmp_path / "other"), style)
    for mine, want in zip(params_of(other, devices, whole), params_of(plain, devices, whole), strict=True):
        np.testing.assert_array_equal(mine, want)


def in_mxfp4(tensors: Tensors, rng: np.random.Generator) -> tuple[Tensors, Tensors]:
    """The experts' weights as MXFP4, of values that it holds, and the same checkpoint in float32."""
    packed, plain = dict(tensors), dict(tensors)
    for name, value in tensors.items():
        if not re.search(r"experts\.(gate_up|down)_proj$", name):
            continue
        count, inputs, outputs = value.shape
        codes = rng.integers(0, 16, (count, outputs, inputs // 32, 32))
        exponents = rng.integers(120, 128, (count, outputs, inputs // 32))
        numbers = np.array([*VALUES, *(-v for v in VALUES)])[codes] * 2.0 ** (exponents[..., None] - 127)
        plain[name] = numbers.reshape(count, outputs, inputs).transpose(0, 2, 1).astype(np.float32)
        del packed[name]
        packed[f"{name}_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).astype(np.uint8)
        packed[f"{name}_scales"] = exponents.astype(np.uint8)
    return packed, plain


@pytest.fixture
def mxfp4(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint of gpt-oss whose experts have 32 and 64 inputs: in MXFP4, and not."""
    folders = []
    for at in range(2):
        folder = write_checkpoint("gpt_oss_default_layers", tmp_path / str(at))
        fields = {"dtype": "bfloat16"}
        fields |= {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}} if at == 0 else {}
        folders.append(
            rewritten(folder, lambda tensors, at=at: in_mxfp4(tensors, np.random.default_rng(1))[at], **fields)
        )
    return folders[0], folders[1]


@pytest.mark.parametrize("devices", [1, 8])
def test_mxfp4(devices: int, mxfp4: tuple[Path, Path]) -> None:
    """Bit for bit, also where a device's share begins and ends within a block of 32."""
    for mine, want in zip(*(params_of(folder, devices) for folder in mxfp4), strict=True):
        np.testing.assert_array_equal(mine, want)


def test_mxfp4_is_converted_to_bfloat16(mxfp4: tuple[Path, Path], tmp_path: Path) -> None:
    packed, plain = mxfp4
    converted = convert(packed, tmp_path / "converted")
    assert "quantization_config" not in json.loads((converted / "config.json").read_text())
    for mine, want in zip(params_of(converted), params_of(plain), strict=True):
        np.testing.assert_array_equal(mine, want)


def test_damaged_experts(mxfp4: tuple[Path, Path], tmp_path: Path) -> None:
    """One line that names the tensor."""

    def without_scales(tensors: Tensors) -> Tensors:
        return {name: value for name, value in tensors.items() if not name.endswith("_scales")}

    with pytest.raises(WeightsError, match=r"_proj_blocks needs uint8 blocks with uint8 _scales of shape \(6, "):
        open_weights(rewritten(mxfp4[0], without_scales))

    def twice(tensors: Tensors) -> Tensors:
        return tensors | {"model.layers.0.mlp.gate.weight": tensors["model.layers.0.block_sparse_moe.gate.weight"]}

    with pytest.raises(WeightsError, match=r"model.layers.0.mlp.gate.weight is there under two names"):
        open_weights(rewritten(write_checkpoint("mixtral", tmp_path / "twice"), twice))

    def flat(tensors: Tensors) -> Tensors:
        return {n: v.reshape(-1, v.shape[-1]) if n.endswith("gate_up_proj") else v for n, v in fused(tensors).items()}

    with pytest.raises(WeightsError, match=r"gate_up_proj has shape \(768, 64\); 3 dimensions are needed"):
        open_weights(rewritten(write_checkpoint("mixtral", tmp_path / "flat"), flat))


def test_a_lost_expert_is_missed(tmp_path: Path) -> None:
    def lose(tensors: Tensors) -> Tensors:
        return {name: value for name, value in tensors.items() if ".experts.3.w2" not in name}

    folder = rewritten(write_checkpoint("mixtral", tmp_path), lose)
    with pytest.raises(ConfigError, match=r"missing model.layers.0.mlp.experts.3.down_proj.weight, "):
        params_of(folder)
