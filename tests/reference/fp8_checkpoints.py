"""Tiny checkpoints of every published fp8 form, written without the library's code, and what they mean in float64.

Scales are drawn, not those of the largest magnitudes, and differ from tensor to tensor, so that rounding a weight again
or taking another's scale shows.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.reference.checkpoints import ALL_CASES, make_weights

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK = (24, 40)  # divides no weight of the cases
_CODES = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int8": "I8",
}  # fmt: skip
Tensors = dict[str, np.ndarray]


def save(path: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {}
    data = bytearray()
    for name, values in tensors.items():
        raw = np.ascontiguousarray(values).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": _CODES[values.dtype.name], "shape": list(values.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def eight_bits(**more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "observer": "minmax", **more}


def compressed_tensors(strategy: str, dynamic: bool, **more: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    inputs = eight_bits(strategy="token" if dynamic else "tensor", dynamic=dynamic, actorder=None)
    weights = eight_bits(strategy=strategy, dynamic=False, block_structure=None, actorder=None, observer_kwargs={})
    if strategy == "block":
        weights["block_structure"] = list(BLOCK)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed",
        "global_compression_ratio": 1.46, **more,
    }  # fmt: skip


def _tensor(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(1, 3, (1, 1))


def _channel(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(1, 3, (n, 1))


def _blocks(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(1, 3, (-(-n // BLOCK[0]), -(-k // BLOCK[1])))


@dataclass(frozen=True)
class Form:
    """config: `quantization_config`, or hf_quant_config.json where `beside`. scales: (N, K) -> over which block of the
    weight each is, times a factor. shape: as which they are stored; None: as they are. kept: weights in 16 bits."""

    config: dict[str, Any]
    scales: Callable[[int, int, np.random.Generator], np.ndarray]
    suffix: str = "weight_scale"
    shape: tuple[int, ...] | None = None
    dtype: str = "float32"
    input_scale: str | None = None
    beside: bool = False
    kept: tuple[str, ...] = ()


KEPT = ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj")  # fmt: skip
FORMS = {
    "dynamic": Form(compressed_tensors("channel", True), _channel, dtype="bfloat16"),
    "static": Form(
        compressed_tensors("tensor", False, kv_cache_scheme=eight_bits(strategy="tensor", dynamic=False)), _tensor,
        shape=(1,), dtype="bfloat16", input_scale="input_scale",
    ),
    "kept": Form(
        compressed_tensors("channel", True, ignore=["lm_head", KEPT[0], r"re:.*layers\.1\.mlp\..*"]), _channel,
        kept=KEPT,
    ),
    "modelopt": Form(
        {"producer": {"name": "modelopt", "version": "0.23.0"},
         "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
        _tensor, shape=(), input_scale="input_scale", beside=True,
    ),
    "modelopt_channels": Form(
        {"quant_method": "modelopt", "quant_algo": "fp8_per_channel_per_token", "ignore": ["lm_head"]},
        lambda n, k, rng: _channel(n, k, rng), shape=(-1,),
    ),
    "fbgemm": Form(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}, _channel
    ),
    "fp8": Form(
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, _tensor, shape=(),
        input_scale="input_scale",
    ),
    "fp8_inverse": Form(
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False}, _tensor,
        suffix="weight_scale_inv", shape=(), dtype="bfloat16", input_scale="activation_scale",
    ),
}  # fmt: skip
BLOCKS = {
    "fp8_blocks": Form(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(BLOCK)},
        _blocks, suffix="weight_scale_inv",
    ),
    "compressed_blocks": Form(compressed_tensors("block", True), _blocks, dtype="bfloat16"),
    "modelopt_blocks": Form(
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
        lambda n, k, rng: rng.uniform(1, 3, (-(-n // 128), -(-k // 128))), shape=(-1, 1, 1, 1),
    ),
}  # fmt: skip


def make(case: str, form: Form) -> tuple[Tensors, Tensors]:
    """The tensors of the checkpoint, and the float32 ones that they mean (each product of float32 is exact enough to be
    the definition: a value of 4 bits times a scale)."""
    stored: Tensors = {}
    meant: Tensors = {}
    for name, weight in make_weights(case).items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") or module in form.kept:
            stored[name] = meant[name] = weight
            continue
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        n, k = weight.shape
        factors = form.scales(n, k, rng)
        down, across = (1, 1) if factors.shape == (1, 1) else (-(-n // factors.shape[0]), -(-k // factors.shape[1]))
        if form.scales is _blocks:
            down, across = BLOCK
        scale = (factors * np.abs(weight).max() / 448).astype(form.dtype)
        whole = (
            np.broadcast_to(scale, weight.shape)
            if scale.size == 1
            else np.repeat(np.repeat(scale, down, axis=0)[:n], across, axis=1)[:, :k]
        )
        whole = whole.astype(np.float32)
        stored[name] = (weight / whole).astype(FP8)
        meant[name] = stored[name].astype(np.float32) * whole
        stored[f"{module}.{form.suffix}"] = scale if form.shape is None else scale.reshape(form.shape)
        if form.input_scale is not None:
            stored[f"{module}.{form.input_scale}"] = np.full(form.shape or (), rng.uniform(0.01, 0.1), form.dtype)
    return stored, meant


def write(case: str, form: Form, folder: Path, **config: Any) -> Tensors:
    """Writes the checkpoint; returns the float32 tensors that it means. config: other fields of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    stored, meant = make(case, form)
    fields = {**ALL_CASES[case].config, **config}
    if form.beside:
        (folder / "hf_quant_config.json").write_text(json.dumps(form.config))
    else:
        fields["quantization_config"] = form.config
    (folder / "config.json").write_text(json.dumps(fields))
    save(folder / "model.safetensors", stored)
    return meant
