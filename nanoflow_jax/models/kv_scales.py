"""Static scales of fp8 KV pages, one per layer and KV head, as a weight: K is what a page holds times its scale, and V
alike.

Checkpoints calibrated for an fp8 cache bring them, as scalars or per head, under one of the names below (ModelOpt's,
vLLM's own, llm-compressor's and its older one). Without them every scale is 1: whatever lies beyond ±448 is cut off
there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.models.params import Index, ParamInfo, ReadSlice, Source
from nanoflow_jax.parallel.mesh import AXIS

NAMES = (
    "self_attn.{0}_proj.{0}_scale", "self_attn.attn.{0}_scale", "self_attn.{0}_scale", "self_attn.{0}_proj.output_scale"
)  # fmt: skip
_PATTERN = re.compile(
    r"^model\.layers\.\d+\.self_attn\.((k_proj\.|attn\.)?k_scale|(v_proj\.|attn\.)?v_scale|[kv]_proj\.output_scale)$"
)


def is_kv_scale(name: str) -> bool:
    """Whether a checkpoint's tensor is a scale of K or V."""
    return _PATTERN.match(name) is not None


def find_kv_scales(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The scales among a checkpoint's tensors, name -> shape: K's and V's of every layer, in order, or none at all.

    Raises ConfigError when some layers have none, or a shape is neither a scalar nor one number per KV head.
    """
    if not any(is_kv_scale(name) for name in shapes):
        return {}
    found = {}
    for layer in range(config.num_layers):
        for part in "kv":
            wanted = [f"model.layers.{layer}.{name.format(part)}" for name in NAMES]
            name = next((name for name in wanted if name in shapes), None)
            if name is None:
                raise ConfigError(
                    f"{wanted[0]}: absent, but other scales of KV pages are there; all layers need theirs"
                )
            if shapes[name] not in ((), (1,), (heads := (config.num_kv_heads,))):
                raise ConfigError(f"{name}: shape {shapes[name]}; accepted: a scalar, or {heads}, one of each KV head")
            found[name] = shapes[name]
    return found


def kv_scales_info(config: ModelConfig, groups: int, found: Mapping[str, tuple[int, ...]]) -> ParamInfo:
    """[2 (K, V), layers, KV groups] float32, split over the groups. `found`: as `find_kv_scales` gave it."""
    shape = (2, config.num_layers, groups)
    names = list(found)  # of layer l: K's at 2 l, V's at 2 l + 1

    def read(read_slice: ReadSlice, index: Index) -> np.ndarray:
        whole = np.ones(shape, np.float32)
        for i, name in enumerate(names):
            values = np.asarray(read_slice(name, tuple(slice(0, n) for n in found[name])), np.float32).reshape(-1)
            if not (np.isfinite(values).all() and (values > 0).all()):
                raise ConfigError(f"{name}: holds {values.min()}; a scale of KV pages must be above 0 and finite")
            whole[i % 2, i // 2] = np.repeat(values, groups // len(values))
        return whole[index]

    sources = tuple(Source(name, found[name]) for name in names)
    return ParamInfo(shape, jnp.dtype(jnp.float32), P(None, None, AXIS), "ones", sources, read)
