"""fp8 weights: float8_e4m3fn values with a scale per output channel; what they are multiplied with is quantised per
token at run time. Known to `ParamInfo`s, which make them, and to `parts.contract`, which uses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec as P

from kernels_pallas.checks import FP8_MAX as LARGEST
from kernels_pallas.rows_fp8 import LEAST, quantise_rows
from nanoflow_jax.models.params import FP8, FP8_SPREAD, Index, ParamInfo, ReadSlice, Source


@struct.dataclass
class Quantised:
    """values [..., K] float8_e4m3fn and scale [...] float32: the weight is values * scale[..., None]. Magnitudes beyond
    `bound` in what it is multiplied with are cut off."""

    values: Any
    scale: Any
    bound: float | None = struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


type Read = Callable[[ReadSlice, Index], np.ndarray]
type Sources = tuple[Source, ...]


@struct.dataclass
class QuantisedRows:
    """What is multiplied with such a weight: values [n, K] float8_e4m3fn and scale [n] float32, made of `dtype`."""

    values: Any
    scale: Any
    dtype: Any = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


@struct.dataclass
class ScaledProduct:
    """What an fp8 GEMM gave, values [n, N], ahead of the scales of tokens [n] and channels [N], by which whoever adds
    it to the residual multiplies it."""

    values: Any
    token: Any
    channel: Any

    def array(self) -> jax.Array:
        wide = self.values.astype(jnp.float32) * self.token[:, None] * self.channel[None, :]
        return wide.astype(self.values.dtype)


type Weight = jax.Array | Quantised
type Input = jax.Array | QuantisedRows


def quantised_for(x: jax.Array, weight: Weight) -> Input:
    """x [n, K] as `weight` is multiplied with it: in fp8 if that is."""
    if not isinstance(weight, Quantised):
        return x
    return QuantisedRows(*quantise_rows(x, 1, weight.bound), x.dtype)


def join_parts(parts: QuantisedRows) -> QuantisedRows:
    """values [p, n, K/p] and scale [p, n], each device's columns over a power of two, gathered -> [n, K]. Over the
    largest of a row's scales values change their exponent alone, but for those that fall below fp8's least normal
    number, 2^-14 of the row's largest or less, and are rounded again."""
    scale = jnp.max(parts.scale, axis=0)
    values = (parts.values.astype(jnp.float32) * (parts.scale / scale[None])[:, :, None]).astype(FP8)
    return QuantisedRows(values.transpose(1, 0, 2).reshape(values.shape[1], -1), scale, parts.dtype)


def contract_fp8(x: Input, weight: Quantised, axis: int, out_dtype: Any) -> jax.Array:
    """x [n, K] (axis 1) or [K, n] (axis 0), weight [..., K] -> [n, N]: fp8 products, float32 sums, scales of token and
    channel on the result, which is in `out_dtype` ahead of them too: in float32 it would be twice the bytes."""
    return product_fp8(x, weight, axis, out_dtype).array()


def product_fp8(x: Input, weight: Quantised, axis: int, out_dtype: Any) -> ScaledProduct:
    """The same ahead of the scales."""
    ready = isinstance(x, QuantisedRows)
    rows, token = (x.values, x.scale) if ready else quantise_rows(x, axis, weight.bound)
    values = weight.values.reshape(-1, weight.shape[-1])
    product = lax.dot_general(rows, values, (((axis,), (1,)), ((), ())), preferred_element_type=out_dtype)
    return ScaledProduct(product, token, weight.scale.reshape(-1))


def weight_scale(weight: np.ndarray) -> np.ndarray:
    """Of each row of float32 [..., K]: [...]."""
    return np.maximum(np.abs(weight).max(axis=-1) / np.float32(LARGEST), np.float32(LEAST))


def rounded(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 [..., K] over the scales [...] of its rows, float8_e4m3fn."""
    return (weight / scale[..., None]).astype(ml_dtypes.float8_e4m3fn)


def quantised_info(info: ParamInfo, bound: float | None = None) -> Quantised:
    """The same weight in fp8, quantised from the checkpoint's as it streams in. The scale of a channel is that of its
    whole row, however the row is split."""

    def whole(read_slice: ReadSlice, index: Index) -> tuple[np.ndarray, np.ndarray]:
        row = np.asarray(info.read(read_slice, (*index, slice(0, info.shape[-1]))), np.float32)
        return row, weight_scale(row)

    def values(read_slice: ReadSlice, index: Index) -> np.ndarray:
        row, scale = whole(read_slice, index[:-1])
        return rounded(row[..., index[-1]], scale)

    return fp8_infos(info, values, info.sources, lambda read, index: whole(read, index)[1], info.sources, bound)


def fp8_infos(
    info: ParamInfo, values: Read, sources: Sources, scales: Read, scale_sources: Sources, bound: float | None
) -> Quantised:
    """`info`'s weight as two: how values and scales are read, and from which tensors."""
    return Quantised(
        replace(info, dtype=jnp.dtype(FP8), sources=sources, read=values),
        ParamInfo(
            info.shape[:-1],
            jnp.dtype(jnp.float32),
            P(*info.spec[: len(info.shape) - 1]),
            info.shape[-1] ** -0.5 / FP8_SPREAD,
            scale_sources,
            scales,
        ),
        bound,
    )
