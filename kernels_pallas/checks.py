"""Argument checks shared by the wrappers: one line that names the argument and what would be accepted.

Wrappers import a Mosaic kernel where they call it, not above: whoever uses the XLA path need not load Mosaic.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.targets import mosaic_supported

BACKENDS = ("xla", "mosaic")
FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0
PAGE_SIZE = 64  # tokens, of the Mosaic attention kernels: wgmma's M
HEAD_DIMS = (64, 128)


def check_backend(kernel: str, backend: str, interpret: Any, **mosaic_only: Any) -> None:
    """Refuses an unknown backend; with "xla", arguments that only the Mosaic kernels have; with "mosaic", a GPU of this
    process that has no such kernel."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is not available; accepted: {', '.join(map(repr, BACKENDS))}")
    if backend == "mosaic":
        if interpret is None:
            _check_mosaic_gpu(kernel)
        return
    for name, value in (*mosaic_only.items(), ("interpret", interpret)):
        if value is not None:
            raise ValueError(f"{name}: {value!r} is not accepted with backend {backend!r}; accepted: None")


def _check_mosaic_gpu(kernel: str) -> None:
    """Lowering for another would end the process. Without a GPU, a compile-only target is up to the caller, who knows
    it."""
    if jax.default_backend() != "gpu":
        return
    capability = str(jax.devices()[0].compute_capability)
    major, minor = (int(part) for part in capability.split("."))
    if not mosaic_supported((major, minor), kernel):
        raise ValueError(
            f"backend: 'mosaic' is not available on compute capability {capability}, only on 9.x; accepted: 'xla'"
        )


def check_attention(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array,
    k_scale: jax.Array | None, v_scale: jax.Array | None, window: int | None, sinks: jax.Array | None,
) -> None:  # fmt: skip
    """What decode and prefill attention have alike: queries [R, Hq, d], pages [N, Hkv, page_size, d], the table
    [R or S, pages], and options."""
    if q.ndim != 3:
        raise ValueError(f"q: shape {q.shape} must be [rows, query heads, head size]")
    check_pages(k_pages, v_pages, k_scale, v_scale)
    if k_pages.shape[3] != q.shape[2]:
        raise ValueError(f"q: head size {q.shape[2]} must equal the pages' {k_pages.shape[3]}")
    if q.shape[1] % k_pages.shape[1]:
        raise ValueError(f"q: {q.shape[1]} query heads must be a multiple of the pages' {k_pages.shape[1]} KV heads")
    if page_table.ndim != 2:
        raise ValueError(f"page_table: shape {page_table.shape} must be [requests, pages of a request]")
    if window is not None and window < 1:
        raise ValueError(f"window: {window} must be at least 1, or None")
    if sinks is not None and (sinks.shape, sinks.dtype) != (q.shape[1:2], jnp.float32):
        raise ValueError(f"sinks: {sinks.dtype} {list(sinks.shape)} must be float32 [{q.shape[1]}], one per query head")


def check_first_page(first_page: jax.Array | None) -> jax.Array:
    """The first page as an int32 scalar, 0 for None."""
    if first_page is None:
        return jnp.zeros((), jnp.int32)
    if first_page.shape != () or first_page.dtype != jnp.int32:
        raise ValueError(f"first_page: {first_page.dtype}{list(first_page.shape)} must be int32[]")
    return first_page


def check_vector(name: str, x: jax.Array, size: int) -> None:
    if x.shape != (size,):
        raise ValueError(f"{name}: shape {x.shape} must be [{size}]")


def check_pages(k_pages: jax.Array, v_pages: jax.Array, k_scale: jax.Array | None, v_scale: jax.Array | None) -> None:
    """Pages of fp8 have scales [Hkv] float32, others have none."""
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape:
        raise ValueError(
            f"k_pages, v_pages: shapes {k_pages.shape}, {v_pages.shape} "
            "must both be [pages, KV heads, page size, head size]"
        )
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


def check_dtypes(*values: tuple[str, jax.Array | None, tuple[Any, ...]]) -> None:
    """Of a Mosaic kernel's arguments: name, value (None: not given), dtypes that are accepted."""
    for name, x, dtypes in values:
        accepted = [jnp.dtype(dtype) for dtype in dtypes]
        if x is not None and x.dtype not in accepted:
            names = ", ".join(dtype.name for dtype in accepted)
            raise ValueError(f"{name}: dtype {x.dtype}; backend 'mosaic' accepts {names}")


def check_mosaic_attention(q: jax.Array, k_pages: jax.Array) -> None:
    """What both attention kernels take: pages of PAGE_SIZE tokens and heads of HEAD_DIMS."""
    if k_pages.shape[2] != PAGE_SIZE:
        raise ValueError(f"k_pages, v_pages: page size {k_pages.shape[2]}; backend 'mosaic' accepts {PAGE_SIZE}")
    if q.shape[2] not in HEAD_DIMS:
        accepted = ", ".join(map(str, HEAD_DIMS))
        raise ValueError(f"q: head size {q.shape[2]}; backend 'mosaic' accepts {accepted}")


def check_sm_budget(sm_budget: int | None) -> None:
    if sm_budget is not None and sm_budget < 1:
        raise ValueError(f"sm_budget: {sm_budget} must be at least 1")
