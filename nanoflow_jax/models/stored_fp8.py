"""Weights of an fp8 checkpoint as `ParamInfo`s: its bytes and its scales as they are, or, where scales are of blocks,
what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.models.fp8_formats import NAME, WeightScale
from nanoflow_jax.models.params import Index, ParamInfo, ReadSlice
from nanoflow_jax.models.quantised import fp8_infos, quantised_info


def stored_info(info: ParamInfo, scales: Mapping[str, WeightScale], config: ModelConfig) -> Any:
    """A weight that is made of fp8 tensors, or of none: that one stays as it is.

    A scale of a tensor is one of each of its rows, so that values are the checkpoint's bytes and every output channel
    of a fused weight has the scale of its own tensor. Scales of blocks are multiplied in; with `config.quantization`
    the result is rounded again, per output channel.

    Raises ConfigError where some of the tensors that are fused into it are fp8 and others are not.
    """
    stored = {source.name: scales[source.name] for source in info.sources if source.name in scales}
    if not stored:
        return info
    if other := [source.name for source in info.sources if source.name not in stored]:
        raise ConfigError(
            f"{other[0]}: not {NAME} as {next(iter(stored))} is, with which it is fused; accepted: all alike"
        )
    rows = {source.name: source.shape[0] for source in info.sources}
    sources = tuple(replace(source, fp8=True) for source in info.sources)
    scale_sources = tuple(scale.source for scale in stored.values())

    def scale_of(read_slice: ReadSlice) -> ReadSlice:
        """Reads the scales of a weight under its own name."""
        return lambda name, index: _read_scale(read_slice, stored[name], rows[name], index)

    def channels(read_slice: ReadSlice, index: Index) -> np.ndarray:
        return info.read(scale_of(read_slice), (*index, slice(0, 1)))[..., 0]

    def dequantised(read_slice: ReadSlice, index: Index) -> np.ndarray:
        scale = scale_of(read_slice)
        return info.read(lambda name, part: read_slice(name, part).astype(np.float32) * scale(name, part), index)

    bound = config.fp8_checkpoint and config.fp8_checkpoint.activation_bound
    if config.quantization is not None and not any(scale.block for scale in stored.values()):
        return fp8_infos(info, info.read, sources, channels, scale_sources, bound)
    plain = replace(info, sources=(*sources, *scale_sources), read=dequantised)
    return plain if config.quantization is None else quantised_info(plain, bound)


def _read_scale(read_slice: ReadSlice, scale: WeightScale, rows: int, index: Index) -> np.ndarray:
    """The scales of a weight [rows, K] at `index` of it, float32: a column, or as many columns as `index` has where
    they are of blocks."""
    source = scale.source
    (first, last), (left, right) = (part.indices(size)[:2] for part, size in zip(index, (rows, 2**31), strict=True))
    if scale.block is None:
        per_row = rows in source.shape[:1]
        found = (slice(first, last) if per_row else slice(0, 1), slice(0, 1))[: len(source.shape)]
        values = _checked(read_slice(source.name, found), source.name).reshape(-1, 1)
        return values if per_row else np.broadcast_to(values, (last - first, 1))
    down, across = scale.block
    found = [slice(first // down, -(-last // down)), slice(left // across, -(-right // across))]
    if len(source.shape) == 4:  # ModelOpt's
        found = [found[0], slice(0, 1), found[1], slice(0, 1)]
    values = _checked(read_slice(source.name, tuple(found)), source.name)
    values = values.reshape(-(-last // down) - first // down, -1)
    return values[np.arange(first, last) // down - first // down][:, np.arange(left, right) // across - left // across]


def _checked(scale: np.ndarray, name: str) -> np.ndarray:
    scale = np.asarray(scale, np.float32)
    good = np.isfinite(scale) & (scale > 0)
    if not good.all():
        raise ConfigError(f"{name}: holds {scale[~good].flat[0]}; a scale of weights must be above 0 and finite")
    return scale
