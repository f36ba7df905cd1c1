"""`ParamInfo`: the one declaration of a weight, from which initialisation, sharding, loading and checkpoints all
follow."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanoflow_jax.parallel.mesh import AXIS

Index = tuple[slice, ...]
ReadSlice = Callable[[str, Index], np.ndarray]

FP8 = jnp.float8_e4m3fn
FP8_SPREAD = 64.0  # of random values: a seventh of the largest


@dataclass(frozen=True)
class Source:
    """A tensor of the Hugging Face checkpoint: its name, its shape there, and whether it is in fp8."""

    name: str
    shape: tuple[int, ...]
    fp8: bool = False


@dataclass(frozen=True)
class ParamInfo:
    """One weight.

    shape:    global shape, padding included
    spec:     how it is split over the mesh
    init:     "normal" (scaled by fan-in, the last dimension; of fp8, by FP8_SPREAD), "ones", "zeros" or a number
    sources:  the checkpoint tensors that it is made of
    read:     (read_slice, index) -> the values at a global `index` (one slice per dimension, step 1), reading no
              more than it needs; `read_slice(name, index)` reads part of a checkpoint tensor
    """

    shape: tuple[int, ...]
    dtype: Any
    spec: P
    init: str | float
    sources: tuple[Source, ...]
    read: Callable[[ReadSlice, Index], np.ndarray]

    @property
    def name(self) -> str:
        """Of the checkpoint's first tensor; "" for a weight that it does not hold."""
        return self.sources[0].name if self.sources else ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def sharding(self, mesh: Mesh) -> NamedSharding:
        return NamedSharding(mesh, self.spec)

    def aval(self, mesh: Mesh) -> jax.ShapeDtypeStruct:
        """The abstract array, for compiling without allocating."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding(mesh))


def is_info(x: Any) -> bool:
    return isinstance(x, ParamInfo)


def abstract_params(infos: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda info: info.aval(mesh), infos, is_leaf=is_info)


def rank_infos(infos: Any, devices: int) -> Any:
    """The first rank's shards of weights declared for so many devices, as weights of their own."""
    mesh = AbstractMesh((devices,), (AXIS,))

    def local(info: ParamInfo) -> ParamInfo:
        return replace(info, shape=NamedSharding(mesh, info.spec).shard_shape(info.shape))

    return jax.tree.map(local, infos, is_leaf=is_info)


def random_params(infos: Any, mesh: Mesh, seed: int = 0) -> Any:
    """Random weights made on the devices, shard by shard, without a host copy (for benchmarks and tests)."""
    makers: dict[Any, Any] = {}  # weights of equal shape share one compiled program

    def make(info: ParamInfo, key: jax.Array) -> jax.Array:
        kind = (info.shape, str(info.dtype), info.spec, info.init)
        if kind not in makers:

            def init(key: jax.Array) -> jax.Array:
                if info.init == "normal":
                    spread = FP8_SPREAD if info.dtype == FP8 else info.shape[-1] ** -0.5
                    return (jax.random.normal(key, info.shape, jnp.float32) * spread).astype(info.dtype)
                value = {"ones": 1, "zeros": 0}[info.init] if isinstance(info.init, str) else info.init
                return jnp.full(info.shape, value, info.dtype)

            makers[kind] = jax.jit(init, out_shardings=info.sharding(mesh))
        return makers[kind](key)

    def key(info: ParamInfo) -> jax.Array:
        """By the tensor's name: the two layouts of O hold the same matrix."""
        return jax.random.fold_in(jax.random.key(seed), zlib.crc32(info.name.encode()))

    return jax.tree.map(lambda info: make(info, key(info)), infos, is_leaf=is_info)
