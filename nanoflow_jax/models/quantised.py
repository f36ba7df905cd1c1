"""fp8 weights: float8_e4m3fn values with a scale per output channel; what they are multiplied with is quantised per
token at run time. Known to `ParamInfo`s, which make them, and to `parts.contract`, which uses them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec as P

from nanoflow_jax.models.params import FP8, FP8_SPREAD, Index, ParamInfo, ReadSlice

LARGEST = 448.0  # of float8_e4m3fn
LEAST = 2.0**-40  # a scale; rows of zeros have it


@struct.dataclass
class Quantised:
    """values [..., K] float8_e4m3fn and scale [...] float32: the weight is values * scale[..., None]."""

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


type Weight = jax.Array | Quantised


def quantise_rows(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """x, and the largest magnitude along `axis` as scale: (float8_e4m3fn of x's shape, float32 without `axis`)."""
    x32 = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x32), axis=axis) / LARGEST, LEAST)
    return (x32 / jnp.expand_dims(scale, axis)).astype(FP8), scale


def contract_fp8(x: jax.Array, weight: Quantised, axis: int, out_dtype: Any) -> jax.Array:
    """x [n, K] (axis 1) or [K, n] (axis 0), weight [..., K] -> [n, N]: fp8 products, float32 sums, scales of token and
    channel on the result, which is in `out_dtype` ahead of them too: in float32 it would be twice the bytes."""
    rows, token = quantise_rows(x, axis)
    values = weight.values.reshape(-1, weight.shape[-1])
    product = lax.dot_general(rows, values, (((axis,), (1,)), ((), ())), preferred_element_type=out_dtype)
    return (product.astype(jnp.float32) * token[:, None] * weight.scale.reshape(1, -1)).astype(out_dtype)


def quantised_info(info: ParamInfo) -> Any:
    """The same weight in fp8, quantised from the checkpoint's as it streams in. The scale of a channel is that of its
    whole row, however the row is split."""

    def whole(read_slice: ReadSlice, index: Index) -> tuple[np.ndarray, np.ndarray]:
        row = np.asarray(info.read(read_slice, (*index, slice(0, info.shape[-1]))), np.float32)
        return row, np.maximum(np.abs(row).max(axis=-1) / np.float32(LARGEST), np.float32(LEAST))

    def values(read_slice: ReadSlice, index: Index) -> np.ndarray:
        row, scale = whole(read_slice, index[:-1])
        return (row[..., index[-1]] / scale[..., None]).astype(ml_dtypes.float8_e4m3fn)

    def scales(read_slice: ReadSlice, index: Index) -> np.ndarray:
        return whole(read_slice, index)[1]

    return Quantised(
        replace(info, dtype=jnp.dtype(FP8), read=values),
        ParamInfo(
            info.shape[:-1],
            jnp.dtype(jnp.float32),
            P(*info.spec[: len(info.shape) - 1]),
            info.shape[-1] ** -0.5 / FP8_SPREAD,
            info.sources,
            scales,
        ),
    )
