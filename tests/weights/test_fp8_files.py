"""fp8 checkpoints on the disk: what `convert` writes, and what is refused, in one line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from nanoflow_jax.config import ConfigError
from nanoflow_jax.models.fp8_formats import find_weight_scales
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.registry import parse_config, read_config
from nanoflow_jax.parallel.mesh import make_mesh
from nanoflow_jax.weights import convert, load_params, open_weights
from nanoflow_jax.weights.source import WeightsError
from tests.reference.checkpoints import CASES, write_checkpoint
from tests.reference.fp8_checkpoints import (
    BLOCKS,
    FORMS,
    FP8,
    Form,
    Tensors,
    compressed_tensors,
    eight_bits,
    make,
    save,
    write,
)

CASE = "biases"
LAYER = "model.layers.1"
Q, K, DOWN = f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.self_attn.k_proj.weight", f"{LAYER}.mlp.down_proj.weight"


def load(folder: Path, devices: int = 1, **changed: Any) -> Any:
    config = replace(read_config(folder / "config.json"), **changed)
    source = open_weights(folder)
    infos = param_infos(config, devices, weight_scales=find_weight_scales(source.table, config))
    return load_params(source, config, make_mesh(config, devices), infos)


def assert_same_bytes(found: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# ---- convert --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASE, "llama3_old_rope"])
def test_convert_writes_what_is_quantised_on_the_fly(case: str, tmp_path: Path) -> None:
    """Byte for byte, from float32 and bfloat16 files, and whatever the other weights are written as."""
    model = write_checkpoint(case, tmp_path / "model")
    plain, fp8 = convert(model, tmp_path / "plain"), convert(model, tmp_path / "fp8", quantization="fp8")
    narrow = convert(model, tmp_path / "narrow", "bfloat16", quantization="fp8")
    for devices in (1, 8):
        want = load(model, devices, quantization="fp8")
        assert_same_bytes(load(fp8, devices), want)
        assert_same_bytes(
            load(narrow, devices, dtype=read_config(model / "config.json").dtype).layers[0].ug, want.layers[0].ug
        )
    assert_same_bytes(load(convert(fp8, tmp_path / "again", quantization="fp8")), load(fp8))

    def stored(folder: Path) -> dict[str, int]:
        return {
            name: int(np.prod(t.shape)) * np.dtype(getattr(ml_dtypes, t.dtype, t.dtype)).itemsize
            for name, t in open_weights(folder).table.items()
        }

    before, after = stored(plain), stored(fp8)
    for name in before:
        gemm = name.endswith("_proj.weight")
        assert after[name] == (np.prod(open_weights(plain).table[name].shape) if gemm else before[name])
    assert set(after) == set(before) | {f"{n}_scale" for n in before if n.endswith("_proj.weight")}
    assert "ignore" in json.loads((fp8 / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", ["static", "modelopt", "fp8_blocks"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_convert_keeps_what_is_fp8_already(name: str, dtype: str, tmp_path: Path) -> None:
    form: Form = (FORMS | BLOCKS)[name]
    write(CASE, form, tmp_path / "model")
    converted = convert(tmp_path / "model", tmp_path / "converted", dtype)
    stored = make(CASE, form)[0]
    table = open_weights(converted)
    for tensor, info in table.table.items():
        if "_proj.weight" in tensor:
            assert (
                table.read_slice(tensor, tuple(slice(0, n) for n in info.shape)).tobytes() == stored[tensor].tobytes()
            )
    assert "input_scale" not in " ".join(table.table)
    if dtype == "auto":
        assert_same_bytes(load(converted, 8), load(tmp_path / "model", 8))


def test_convert_refuses_another_quantization(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"^quantization: 'int8' is not supported; accepted: None \(as stored\), 'fp8'$"
    ):
        convert(write_checkpoint(CASE, tmp_path / "model"), tmp_path / "converted", quantization="int8")


# ---- schemes --------------------------------------------------------------------------------------------------------


def group(**weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {**eight_bits(strategy="channel"), **weights}}}
    return {**compressed_tensors("channel", True), "config_groups": groups}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "awq": ({"quant_method": "awq", "bits": 4}, r"\.quant_method: 'awq' .* 'compressed-tensors', 'fbgemm_fp8', 'fp8',"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, r"\.quant_method: 'gptq'"),
    "bitsandbytes": ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, r"\.quant_method: 'bitsandbytes'"),
    "mxfp4": ({"quant_method": "mxfp4"}, r"\.quant_method: 'mxfp4'"),
    "no method": ({"bits": 4}, r"\.quant_method: None"),
    "a list": ({"quant_method": ["fp8"]}, r"\.quant_method: \['fp8'\]"),
    "int4": ({**group(num_bits=4, type="int"), "format": "pack-quantized"}, r"\.format: 'pack-quantized' .*'float-q"),
    "nvfp4": ({**group(num_bits=4), "format": "nvfp4-pack-quantized"}, r"\.format: 'nvfp4-pack-quantized'"),
    "int8": (group(type="int"), r"\.config_groups\.group_0\.weights: 8 bits of type 'int' .*accepted: 8 of 'float'"),
    "a group that is not": (
        {**group(), "config_groups": {**group()["config_groups"], "b": {"weights": {"num_bits": 4, "type": "int"}}}},
        r"\.config_groups\.b\.weights: 4 bits of type 'int'",
    ),
    "groups of columns": (group(strategy="group"), r"\.weights\.strategy: 'group' .*'channel', 'block'"),
    "of a size": (group(group_size=128), r"\.weights\.group_size: 128 is not supported; accepted: None"),
    "asymmetric": (group(symmetric=False), r"\.weights\.symmetric: False"),
    "blocks of no size": (group(strategy="block", block_structure="128"), r"\.block_structure: '128' must be two"),
    "int8 activations": (
        {**group(), "config_groups": {"g": {"weights": eight_bits(), "input_activations": eight_bits(type="int")}}},
        r"\.config_groups\.g\.input_activations: 8 bits of type 'int'",
    ),
    "outputs": (
        {**group(), "config_groups": {"g": {"weights": eight_bits(), "output_activations": eight_bits()}}},
        r"\.config_groups\.g\.output_activations: .* accepted: None",
    ),
    "no group": ({**group(), "config_groups": {}}, r"\.config_groups: empty"),
    "sparse": ({**group(), "sparsity_config": {"format": "sparse-24-bitmask"}}, r"\.sparsity_config: .*'dense'"),
    "rotated": ({**group(), "transform_config": {"config_groups": {"R1": {}}}}, r"\.transform_config: "),
    "int8 pages": ({**group(), "kv_cache_scheme": eight_bits(type="int")}, r"\.kv_cache_scheme: 8 bits of type 'int'"),
    "unknown": ({**group(), "outliers": 3}, r"\.outliers: unknown field \(value 3\)"),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"\.quant_algo: 'NVFP4' .*'FP8', 'FP8_PER"),
    "modelopt's int8 pages": (
        {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}},
        r"^hf_quant_config\.json\.kv_cache_quant_algo: 'INT8'",
    ),
    "e5m2": ({"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e5m2"}, r"\.fmt: 'e5m2' .*'e4m3'"),
    "powers of two": ({"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, r"\.scale_fmt: "),
    "a block": ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"\.weight_block_size: \[0, 128\] must be two"),
    "a bound": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": -1}, r"\.activation_scale_ub: -1 must be a"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_another_scheme_is_one_line_that_names_it(name: str) -> None:
    config, said = REFUSED[name]
    with pytest.raises(ConfigError, match=said) as found:
        parse_config({**CASES[CASE].config, "quantization_config": config})
    assert "\n" not in str(found.value) and "quant" in str(found.value)


def test_other_spellings_are_accepted() -> None:
    for config, block in (
        (group(strategy="block", block_structure="128x64"), (128, 64)),
        ({**group(), "sparsity_config": {"format": "dense"}, "version": "0.12.2", "transform_config": {}}, None),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO", "group_size": 128}, (128, 128)),
        ({**group(), "config_groups": {"g": {"weights": eight_bits(), "input_activations": None}}}, None),
    ):
        found = parse_config({**CASES[CASE].config, "quantization_config": config}).fp8_checkpoint
        assert found is not None and found.block == block


# ---- tensors --------------------------------------------------------------------------------------------------------

Damage = Callable[[Tensors], object]


def scale(value: float | np.ndarray, at: int | None = None) -> Damage:
    """K's scales of the second layer, or one of them, replaced."""

    def damage(tensors: Tensors) -> None:
        if at is None:
            tensors[f"{K}_scale"] = np.asarray(value)
        else:
            tensors[f"{K}_scale"][at] = value

    return damage


ONES = np.ones((16, 1), np.float32)
DAMAGED: dict[str, tuple[Damage, str]] = {
    "no scale": (lambda t: t.pop(f"{K}_scale"), rf"^{K}: float8_e4m3fn without its scale; accepted: {K}_scale, or "),
    "of another length": (scale(ONES[:8]), rf"^{K}_scale: shape \(8, 1\), of {K} \(16, 64\); accepted: a scalar, or "),
    "of columns": (scale(np.ones((1, 64), np.float32)), rf"^{K}_scale: shape \(1, 64\), of "),
    "of blocks": (scale(np.ones((2, 2), np.float32)), rf"^{K}_scale: shape \(2, 2\), of "),
    "NaN": (scale(np.nan, 3), rf"^{K}_scale: holds nan; a scale of weights must be above 0 and finite$"),
    "infinite": (scale(np.inf, 15), rf"^{K}_scale: holds inf; "),
    "zero": (scale(0.0, 0), rf"^{K}_scale: holds 0\.0; "),
    "negative": (scale(-0.25, 7), rf"^{K}_scale: holds -0\.25; "),
    "integers": (scale(ONES.astype(np.int8)), rf"{K}_scale has dtype I8; accepted: float32, bfloat16, float16$"),
    "in fp8": (scale(ONES.astype(FP8)), rf"{K}_scale has dtype float8_e4m3fn; accepted: float32"),
    "two scales": (lambda t: t.update({f"{K}_scale_inv": ONES}), rf"unknown {K}_scale_inv"),
    "fused with what is not": (
        lambda t: (t.update({K: t[K].astype(np.float32)}), t.pop(f"{K}_scale")),
        rf"^{K}: not float8_e4m3fn as {Q} is, with which it is fused; accepted: all alike$",
    ),
    "a scale of what is not": (lambda t: t.update({DOWN: t[DOWN].astype(np.float32)}), rf"unknown {DOWN}_scale"),
    "the head": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(FP8)}),
        r"lm_head\.weight has dtype float8_e4m3fn; accepted: float32, bfloat16, float16$",
    ),
    "a bias": (
        lambda t: t.update({f"{LAYER}.mlp.down_proj.bias": t[f"{LAYER}.mlp.down_proj.bias"].astype(FP8)}),
        r"mlp\.down_proj\.bias has dtype float8_e4m3fn; accepted: float32",
    ),
    "e5m2": (
        lambda t: (t.update({DOWN: t[DOWN].astype(ml_dtypes.float8_e5m2)}), t.pop(f"{DOWN}_scale")),
        rf"{DOWN} has dtype F8_E5M2; accepted: ",
    ),
    "of another shape": (lambda t: t.update({DOWN: t[DOWN][:, :-8]}), rf"{DOWN} has shape \(64, 120\); config.json"),
    "flat": (lambda t: t.update({DOWN: t[DOWN].reshape(-1)}), rf"^{DOWN}: shape \(8192,\); accepted: rows and columns"),
    "a scalar": (lambda t: t.update({DOWN: t[DOWN][0, 0].reshape(())}), rf"^{DOWN}: shape \(\); accepted: rows and"),
    "not fp8 at all": (
        lambda t: (
            t.update({name: values.astype(np.float32) for name, values in t.items() if values.dtype == FP8}),
            [t.pop(name) for name in list(t) if name.endswith("_scale")],
        ),
        r"^quantization_config: 'compressed-tensors', but no weight of a layer is float8_e4m3fn$",
    ),
    "smoothed": (lambda t: t.update({DOWN.replace("weight", "pre_quant_scale"): ONES}), "unknown .*pre_quant_sc"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_tensors_are_one_line_that_names_them(name: str, tmp_path: Path) -> None:
    damage, said = DAMAGED[name]
    form = replace(FORMS["dynamic"], dtype="float32")
    write(CASE, form, tmp_path)
    tensors, _ = make(CASE, form)
    damage(tensors)
    save(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ConfigError, match=said) as found:
        load(tmp_path)
    assert "\n" not in str(found.value)


def test_a_config_that_does_not_say_so(tmp_path: Path) -> None:
    write(CASE, FORMS["modelopt"], tmp_path)
    (tmp_path / "hf_quant_config.json").unlink()
    with pytest.raises(ConfigError, match=r"q_proj\.weight: float8_e4m3fn, but config.json has no quantization_config"):
        load(tmp_path)


def test_blocks_of_another_number(tmp_path: Path) -> None:
    write(CASE, BLOCKS["fp8_blocks"], tmp_path)
    tensors, _ = make(CASE, BLOCKS["fp8_blocks"])
    tensors[f"{DOWN}_scale_inv"] = tensors[f"{DOWN}_scale_inv"].T.copy()
    save(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ConfigError, match=rf"^{DOWN}_scale_inv: shape .* or \(3, 4\), one of each block of 24 x 40$"):
        load(tmp_path)
