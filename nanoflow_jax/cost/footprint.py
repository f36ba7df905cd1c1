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


def kv_bytes_per_token(config: ModelConfig, devices: int, item: int, context: int | None = None) -> float:
    """Of one token, on one device; item: of one element of the pages. context: the mean over a request of so many
    tokens; None: of one that all layers keep."""
    if context is None:
        return config.num_layers * _layer_bytes(config, devices, item)
    return request_kv_bytes(config, devices, item, context) / context


def request_kv_bytes(config: ModelConfig, devices: int, item: int, tokens: int) -> int:
    """Of a request of so many tokens, on one device; item: of one element of the pages. Layers with a window keep no
    more than that holds."""
    windows = (layer.attention.window for layer in config.layers)
    kept = sum(tokens if window is None else min(tokens, window) for window in windows)
    return kept * _layer_bytes(config, devices, item)


def page_bytes(config: ModelConfig, devices: int, page_size: int, item: int) -> int:
    """Of one page (`models.layout.PageTables`)."""
    return _layer_bytes(config, devices, item) * page_tables(config).depth * page_size


def _layer_bytes(config: ModelConfig, devices: int, item: int) -> int:
    """Of one token's K and V."""
    return 2 * kv_groups(config, devices) // devices * config.head_dim * item
