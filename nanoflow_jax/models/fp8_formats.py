"""Checkpoints whose layers come in fp8: what their config.json says, and which of their tensors are scales.

By `quant_method`, the scales and where they are defined:

    compressed-tensors  weight_scale: one, [N, 1], or of blocks; compressed-tensors' QuantizationConfig and
                        QuantizationArgs, vLLM's compressed_tensors_w8a8_fp8.py
    modelopt            weight_scale: one, [N], or of blocks [N / 128, 1, K / 128, 1]; vLLM's modelopt.py. Also in
                        hf_quant_config.json
    fbgemm_fp8          weight_scale [N, 1]; transformers' integrations/fbgemm_fp8.py
    fp8                 weight_scale or weight_scale_inv: one, or of blocks; transformers'
                        integrations/finegrained_fp8.py, vLLM's fp8.py

All multiply what the weight holds, `weight_scale_inv` too. What stays in 16 bits (`ignore`, `modules_to_not_convert`,
`exclude_modules`, a group's `targets`) is not read from those lists, whose patterns every tool matches in its own way:
the dtype of each tensor says it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nanoflow_jax.config import ConfigError, Fp8Checkpoint, ModelConfig
from nanoflow_jax.models.params import Source

logger = logging.getLogger("nanoflow_jax")

NAME = "float8_e4m3fn"
SCALE = "_scale"  # after the name of a weight
_SCALES = (SCALE, "_scale_inv")
_ACTIVATION_SCALE = re.compile(r"^model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.(input|activation|act)_scale$")
_GEMM = re.compile(r"^model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight$")

# Fields that change nothing here, wherever they stand.
_INERT = {
    "quant_method", "quantization_status", "global_compression_ratio", "version", "producer", "provider",
    "run_compressed", "ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules", "targets", "dequantize",
    "observer", "observer_kwargs", "scale_dtype", "zp_dtype",
}  # fmt: skip
_WHERE = "quantization_config"
_ANY: tuple[Any, ...] = ()  # a value of any kind, checked elsewhere


class Tensor(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class WeightScale:
    """The tensor that holds the scales of a weight; block: the rows and columns that share one, None where a whole row
    or the whole weight does."""

    source: Source
    block: tuple[int, int] | None


def is_gemm_weight(name: str) -> bool:
    """Whether a checkpoint's tensor is a weight that may be in fp8."""
    return _GEMM.match(name) is not None


def is_activation_scale(name: str) -> bool:
    """Whether it is a scale of activations, made in a calibration: they are quantised per token as they run instead."""
    return _ACTIVATION_SCALE.match(name) is not None


# ---- config.json ----------------------------------------------------------------------------------------------------


def read_fp8_checkpoint(fields: dict[str, Any]) -> Fp8Checkpoint:
    """`quantization_config`, strictly. Raises ConfigError, which names the scheme, for one that is not fp8 weights of a
    known form."""
    method = fields.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        raise ConfigError(
            f"{_WHERE}.quant_method: {method!r} is not supported; accepted: {_some(sorted(_METHODS))}, with fp8 weights"
        )
    return _METHODS[method](fields)


def fp8_dynamic() -> dict[str, Any]:
    """The `quantization_config` of weights with a scale per output channel, activations per token: compressed-tensors'
    scheme FP8_DYNAMIC."""
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip


def _compressed_tensors(fields: dict[str, Any]) -> Fp8Checkpoint:
    formats = ("float-quantized", "naive-quantized")
    known = {"format": formats, "config_groups": _ANY, "kv_cache_scheme": _ANY, "sparsity_config": _ANY}
    _check(_WHERE, fields, {**known, "transform_config": ({},)})
    if (sparsity := fields.get("sparsity_config") or {}) and _object(sparsity, "sparsity_config").get(
        "format"
    ) != "dense":
        raise ConfigError(f"{_WHERE}.sparsity_config: {sparsity!r} is not supported; accepted: none, or format 'dense'")
    _check_kv_cache(fields)
    groups = _object(fields.get("config_groups"), "config_groups")
    if not groups:
        raise ConfigError(f"{_WHERE}.config_groups: empty; at least one group with weights is needed")
    blocks = set[tuple[int, int]]()
    for key, value in groups.items():
        where = f"config_groups.{key}"
        group = _object(value, where)
        known = {"weights": _ANY, "input_activations": _ANY, "format": formats}
        _check(f"{_WHERE}.{where}", group, {**known, "output_activations": (None,)})
        weights, strategies = _object(group.get("weights"), f"{where}.weights"), ("tensor", "channel", "block")
        _check_eight_bits(weights, f"{where}.weights")
        known = {"strategy": strategies, "symmetric": (True,), "dynamic": (False,), "group_size": (None,)}
        known |= {"num_bits": _ANY, "type": _ANY, "block_structure": _ANY, "actorder": (None,)}
        _check(f"{_WHERE}.{where}.weights", weights, known)
        if weights.get("strategy") == "block":
            blocks.add(_block(weights.get("block_structure"), f"{where}.weights.block_structure"))
        if (inputs := group.get("input_activations")) is not None:
            _check_eight_bits(_object(inputs, f"{where}.input_activations"), f"{where}.input_activations")
    if len(blocks) > 1:
        raise ConfigError(f"{_WHERE}.config_groups: blocks of several sizes, {sorted(blocks)}; accepted: one size")
    return Fp8Checkpoint("compressed-tensors", blocks.pop() if blocks else None)


def _modelopt(fields: dict[str, Any]) -> Fp8Checkpoint:
    """Either config.json's own block or hf_quant_config.json, which keeps its fields under `quantization`."""
    where = _WHERE
    if "quantization" in fields:
        where = "hf_quant_config.json"
        _check(where, fields, {"quantization": _ANY})
        fields = _object(fields["quantization"], "quantization")
    algorithms = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
    fields = {**fields, "quant_algo": str(fields.get("quant_algo")).upper()}
    known = {"quant_algo": algorithms, "kv_cache_quant_algo": ("FP8", "fp8"), "group_size": (128,)}
    _check(where, fields, {**known, "kv_cache_scheme": _ANY, "config_groups": _ANY})
    _check_kv_cache(fields)
    return Fp8Checkpoint("modelopt", (128, 128) if fields["quant_algo"] == "FP8_PB_WO" else None)


def _fbgemm(fields: dict[str, Any]) -> Fp8Checkpoint:
    _check(_WHERE, fields, {"activation_scale_ub": _ANY})
    bound = fields.get("activation_scale_ub", 1200.0)  # transformers' default
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < 1e30:
        raise ConfigError(f"{_WHERE}.activation_scale_ub: {bound!r} must be a positive number")
    return Fp8Checkpoint("fbgemm_fp8", None, float(bound))


def _fp8(fields: dict[str, Any]) -> Fp8Checkpoint:
    known = {"activation_scheme": ("dynamic", "static"), "fmt": ("e4m3",), "scale_fmt": ("float",)}
    _check(_WHERE, fields, {**known, "weight_block_size": _ANY, "kv_cache_scheme": _ANY})
    _check_kv_cache(fields)
    size = fields.get("weight_block_size")
    return Fp8Checkpoint("fp8", None if size is None else _block(size, "weight_block_size"))


_METHODS: dict[str, Callable[[dict[str, Any]], Fp8Checkpoint]] = {
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "fbgemm_fp8": _fbgemm,
    "fp8": _fp8,
}


def _check(where: str, fields: dict[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ConfigError for a field that is unknown, or has none of the values known; null asks for nothing."""
    for name, value in fields.items():
        if value is None or name in _INERT:
            continue
        if name not in known:
            raise ConfigError(f"{where}.{name}: unknown field (value {value!r}); this library would have to ignore it")
        if known[name] != _ANY and value not in known[name]:
            raise ConfigError(f"{where}.{name}: {value!r} is not supported; accepted: {_some(known[name])}")


def _check_eight_bits(fields: dict[str, Any], where: str) -> None:
    bits, kind = fields.get("num_bits"), fields.get("type")
    if (bits, kind) != (8, "float"):
        raise ConfigError(f"{_WHERE}.{where}: {bits!r} bits of type {kind!r} are not supported; accepted: 8 of 'float'")


def _check_kv_cache(fields: dict[str, Any]) -> None:
    if (scheme := fields.get("kv_cache_scheme")) is not None:
        _check_eight_bits(_object(scheme, "kv_cache_scheme"), "kv_cache_scheme")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{_WHERE}.{where}: {value!r} must be an object")
    return value


def _block(value: Any, where: str) -> tuple[int, int]:
    """[128, 128], or "128x128" as compressed-tensors also writes it."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,6}x\d{1,6}", value):
        value = [int(size) for size in value.split("x")]
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 < n < 2**20 for n in value):
        raise ConfigError(f"{_WHERE}.{where}: {value!r} must be two positive integers, rows and columns of a block")
    return value[0], value[1]


def _some(values: Iterable[Any]) -> str:
    return ", ".join(map(repr, values))


# ---- tensors --------------------------------------------------------------------------------------------------------


def find_weight_scales(table: Mapping[str, Tensor], config: ModelConfig) -> dict[str, WeightScale] | None:
    """The scales among a checkpoint's tensors, by the name of their weight; None of a checkpoint that is not quantised.
    A weight that has none stays in the model's dtype. Logs what is done otherwise than the checkpoint says.

    Raises ConfigError for an fp8 weight without a scale, and for a scale of another shape than accepted.
    """
    weights = {name: t.shape for name, t in table.items() if t.dtype == NAME and is_gemm_weight(name)}
    checkpoint = config.fp8_checkpoint
    if checkpoint is None:
        if weights:
            raise ConfigError(f"{next(iter(weights))}: {NAME}, but config.json has no quantization_config that says so")
        return None
    if not weights:
        raise ConfigError(f"{_WHERE}: {checkpoint.format!r}, but no weight of a layer is {NAME}")
    found = {}
    for name, shape in weights.items():
        wanted = [name + suffix for suffix in _SCALES]
        scale = next((scale for scale in wanted if scale in table), None)
        if scale is None:
            raise ConfigError(f"{name}: {NAME} without its scale; accepted: {wanted[0]}, or {wanted[1]}")
        found[name] = _weight_scale(Source(scale, table[scale].shape), name, shape, checkpoint.block)
    _log(checkpoint, config, any(map(is_activation_scale, table)), any(scale.block for scale in found.values()))
    return found


def _weight_scale(source: Source, name: str, weight: tuple[int, ...], block: tuple[int, int] | None) -> WeightScale:
    if len(weight) != 2:
        raise ConfigError(f"{name}: shape {weight}; accepted: rows and columns")
    rows, columns = weight
    if source.shape in ((), (1,), (1, 1), (rows,), (rows, 1)):
        return WeightScale(source, None)
    accepted = f"a scalar, or ({rows}, 1), one of each output channel"
    if block is not None:
        down, across = -(-rows // block[0]), -(-columns // block[1])
        if source.shape in ((down, across), (down, 1, across, 1)):
            return WeightScale(source, block)
        accepted += f", or ({down}, {across}), one of each block of {block[0]} x {block[1]}"
    raise ConfigError(f"{source.name}: shape {source.shape}, of {name} {weight}; accepted: {accepted}")


def _log(checkpoint: Fp8Checkpoint, config: ModelConfig, static: bool, blocks: bool) -> None:
    name, not_used = checkpoint.format, "; its static scales of them are not used" if static else ""
    if not blocks:
        logger.info("checkpoint: fp8 weights (%s); activations are quantised per token as they run%s", name, not_used)
    elif config.quantization is None:
        logger.info(
            "checkpoint: fp8 weights (%s) with scales of blocks, which no fp8 GEMM here has: they are loaded in %s, "
            "twice the bytes; quantization='fp8' rounds them again, per output channel",
            name, config.dtype,
        )  # fmt: skip
    else:
        logger.info(
            "checkpoint: fp8 weights (%s) with scales of blocks: rounded again, per output channel, which adds as much "
            "error as their first rounding had (about 2.6 %% of a GEMM's result)",
            name,
        )
