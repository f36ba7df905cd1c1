"""The one-axis tensor-parallel mesh, and which sizes a model can be split into."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanoflow_jax.config import ConfigError, ModelConfig

AXIS = "tp"


def make_mesh(config: ModelConfig, tensor_parallel_size: int | None = None) -> Mesh:
    """A mesh of `tensor_parallel_size` devices, those of all processes, over axis "tp"; None takes all.

    Raises ConfigError when there are too few devices, when the size does not divide the model, or when it leaves a
    process without a device.
    """
    devices = jax.devices()
    size = len(devices) if tensor_parallel_size is None else tensor_parallel_size
    if not 1 <= size <= len(devices):
        more = ""
        if devices[0].platform == "cpu" and size > len(devices):
            more = f"; JAX_NUM_CPU_DEVICES={size} in the environment (or --cpu-devices {size}) makes {size} of a CPU"
        raise ConfigError(
            f"tensor_parallel_size: {size} devices wanted, {len(devices)} present; accepted: 1 to {len(devices)}{more}"
        )
    check_divides(config, size)
    if idle := {d.process_index for d in devices} - {d.process_index for d in devices[:size]}:
        raise ConfigError(
            f"tensor_parallel_size: {size} of {len(devices)} devices leave process {min(idle)} without one; "
            f"accepted: {len(devices)}, or fewer processes"
        )
    return Mesh(np.array(devices[:size]), (AXIS,))


def check_divides(config: ModelConfig, size: int) -> None:
    """Raises ConfigError, listing the sizes that work, unless the model can be split into `size` equal parts."""
    if size not in valid_sizes(config):
        raise ConfigError(
            f"tensor_parallel_size: {size} does not divide {config.num_heads} heads, {config.num_kv_heads} KV heads "
            f"(or a multiple of them), hidden {config.hidden_size} and intermediate {config.intermediate_size}; "
            f"sizes that work: {', '.join(map(str, valid_sizes(config)))}"
        )


def valid_sizes(config: ModelConfig) -> list[int]:
    """Mesh sizes that split query heads, hidden and intermediate evenly, and split or evenly replicate the KV heads."""
    heads, kv, experts = config.num_heads, config.num_kv_heads, config.experts
    widths = {heads, config.hidden_size, *(config.dense_size(layer.mlp) for layer in config.pattern)}
    return [
        n
        for n in range(1, heads + 1)
        if not any(w % n for w in widths)
        and (kv % n == 0 or n % kv == 0)
        and (experts is None or experts.count % n == 0 or experts.size % n == 0)
    ]


def local_aval(aval: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """One device's shard of an abstract array, as an array of its own on `mesh` of one device."""
    assert isinstance(aval.sharding, NamedSharding)
    return jax.ShapeDtypeStruct(
        aval.sharding.shard_shape(aval.shape), aval.dtype, sharding=NamedSharding(mesh, aval.sharding.spec)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
