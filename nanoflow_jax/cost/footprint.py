"""Bytes on one device: of weights, and of keys and values."""

from __future__ import annotations

import jax

from nanoflow_jax.config import ModelConfig
from nanoflow_jax.models.layout import ModelParams, kv_groups
from nanoflow_jax.models.params import is_info
from nanoflow_jax.parallel.mesh import AXIS


def weight_bytes(infos: ModelParams, devices: int) -> int:
    """Of the weights that are declared for so many devices."""
    leaves = jax.tree.leaves(infos, is_leaf=is_info)
    return sum(info.nbytes // (devices if AXIS in info.spec else 1) for info in leaves)


def kv_bytes_per_token(config: ModelConfig, devices: int, item: int) -> int:
    """Of one token in all layers; item: of one element of the pages."""
    return 2 * config.num_layers * kv_groups(config, devices) // devices * config.head_dim * item


def request_kv_bytes(config: ModelConfig, devices: int, item: int, tokens: int) -> int:
    """Of a request of so many tokens in all layers, on one device; item: of one element of the pages. What a token
    costs is asked here only, because it need not be the same for each."""
    return tokens * kv_bytes_per_token(config, devices, item)
