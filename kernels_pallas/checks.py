"""Argument checks shared by the wrappers: one line that names the argument and what would be accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.targets import mosaic_supported

BACKENDS = ("xla", "mosaic")
FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0


def check_backend(backend: str, accepted: Sequence[str] = ("xla",)) -> None:
    """`accepted`: those of BACKENDS that the kernel has."""
    if backend not in accepted:
        raise ValueError(f"backend: {backend!r} is not available; accepted: {', '.join(map(repr, accepted))}")


def check_mosaic_gpu(kernel: str) -> None:
    """Refuses a GPU of this process for which lowering would end the process. Without one, a compile-only target is up
    to the caller, who knows it."""
    if jax.default_backend() != "gpu":
        return
    capability = str(jax.devices()[0].compute_capability)
    major, minor = (int(part) for part in capability.split("."))
    if not mosaic_supported((major, minor), kernel):
        raise ValueError(
            f"backend: 'mosaic' is not available on compute capability {capability}, only on 9.x; accepted: 'xla'"
        )


def check_mosaic_only(backend: str, **arguments: Any) -> None:
    """Refuses, with backend "xla", arguments that only the Mosaic kernels have."""
    if backend == "mosaic":
        return
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name}: {value!r} is not accepted with backend {backend!r}; accepted: None")


def check_paged(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array) -> None:
    """Shapes of the queries [R, Hq, d], the pages [N, Hkv, page_size, d] and the table [R or S, pages]."""
    if q.ndim != 3:
        raise ValueError(f"q: shape {q.shape} must be [rows, query heads, head size]")
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape:
        raise ValueError(
            f"k_pages, v_pages: shapes {k_pages.shape}, {v_pages.shape} "
            "must both be [pages, KV heads, page size, head size]"
        )
    if k_pages.shape[3] != q.shape[2]:
        raise ValueError(f"q: head size {q.shape[2]} must equal the pages' {k_pages.shape[3]}")
    if q.shape[1] % k_pages.shape[1]:
        raise ValueError(f"q: {q.shape[1]} query heads must be a multiple of the pages' {k_pages.shape[1]} KV heads")
    if page_table.ndim != 2:
        raise ValueError(f"page_table: shape {page_table.shape} must be [requests, pages of a request]")


def check_sinks(sinks: jax.Array | None, q: jax.Array) -> None:
    if sinks is not None and (sinks.shape, sinks.dtype) != (q.shape[1:2], jnp.float32):
        raise ValueError(f"sinks: {sinks.dtype} {list(sinks.shape)} must be float32 [{q.shape[1]}], one per query head")


def check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window: {window} must be at least 1, or None")


def check_first_page(first_page: jax.Array | None) -> jax.Array:
    """The first page as an int32 scalar, 0 for None."""
    if first_page is None:
        return jnp.zeros((), jnp.int32)
    if first_page.shape != () or first_page.dtype != jnp.int32:
        raise ValueError(f"first_page: {first_page.dtype}{list(first_page.shape)} must be int32[]")
    return first_page


def default_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)


def check_vector(name: str, x: jax.Array, size: int) -> None:
    if x.shape != (size,):
        raise ValueError(f"{name}: shape {x.shape} must be [{size}]")


def check_scales(k_pages: jax.Array, v_pages: jax.Array, k_scale: jax.Array | None, v_scale: jax.Array | None) -> None:
    """Pages of fp8 have scales [Hkv] float32, others have none."""
    if (k_pages.dtype == FP8) != (v_pages.dtype == FP8):
        raise ValueError(f"k_pages, v_pages: dtypes {k_pages.dtype}, {v_pages.dtype} must be the same")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if k_pages.dtype != FP8:
            if scale is not None:
                raise ValueError(f"{name}: is not accepted with pages of {k_pages.dtype}; accepted: None")
            continue
        heads = k_pages.shape[1]
        if scale is None or scale.shape != (heads,) or scale.dtype != jnp.float32:
            given = None if scale is None else f"{scale.dtype}{list(scale.shape)}"
            raise ValueError(f"{name}: {given}; pages of {k_pages.dtype} accept float32[{heads}], one of each KV head")
