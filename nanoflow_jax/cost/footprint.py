"""Bytes on one device: of weights, and of keys and values."""

from __future__ import annotations

import jax

from nanoflow_jax.config import ModelConfig
from nanoflow_jax.models.layout import ModelParams, kv_groups, page_tables
from nanoflow_jax.models.params import is_info
from nanoflow_jax.parallel.mesh import AXIS


def weight_bytes(infos: ModelParams, devices: int) -> int:
    """Of the weights that are declared for so many devices."""
    leaves = jax.tree.leaves(infos, is_leaf=is_info)
    return sum(info.nbytes // (devices if AXIS in info.spec else 1) for info in leaves)


def kv_bytes_per_token(config: ModelConfig, devices: int, item: int, context: float | None = None) -> float:
    """Of one token in all layers; item: of one element of the pages. context: tokens of a sequence, by which layers
    with a window keep no more than that holds; None: all are kept."""
    kept = float(config.num_layers)
    if context is not None:
        windows = (layer.attention.window for layer in config.layers)
        kept = sum(1.0 if window is None else min(1.0, window / context) for window in windows)
    return _layer_bytes(config, devices, item) * kept


def page_bytes(config: ModelConfig, devices: int, page_size: int, item: int) -> int:
    """Of one page (`models.layout.PageTables`)."""
    return _layer_bytes(config, devices, item) * page_tables(config).depth * page_size


def _layer_bytes(config: ModelConfig, devices: int, item: int) -> int:
    """Of one token's K and V."""
    return 2 * kv_groups(config, devices) // devices * config.head_dim * item
