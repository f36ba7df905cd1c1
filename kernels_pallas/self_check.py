"""Each Mosaic kernel once at a small shape, beside the XLA path in float32: is it right on this device?

For a caller that is about to trust a kernel on a GPU where nobody has run it yet. Takes seconds, mostly compiling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.append_kv import append_kv, quantise
from kernels_pallas.checks import FP8
from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.prefill_attention import prefill_attention
from kernels_pallas.tuning import DECODE, DEFAULT_GPU, PAGE_TOKENS

TOLERANCE = 2e-2  # of a row, relative to its norm; the kernels' own tests hold 5e-3
LENGTHS = (1, 2 * PAGE_TOKENS, 3 * PAGE_TOKENS + 7)  # of contexts: one token, whole pages, many
CHUNK = 40  # rows of prefill at the end of the longest context, and one after the whole pages


class KernelError(RuntimeError):
    """A kernel that fails or disagrees; one line."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Of one device. `fp8`: pages of float8_e4m3fn."""

    q_heads: int
    kv_heads: int
    head_dim: int
    fp8: bool = False


@dataclass(frozen=True)
class _Inputs:
    k_pages: jax.Array
    v_pages: jax.Array
    table: jax.Array  # [contexts, pages]
    lengths: jax.Array  # [contexts]
    scales: dict[str, jax.Array]

    @property
    def in_float32(self) -> tuple[jax.Array, jax.Array]:
        factors = self.scales.values() or (None, None)
        return tuple(
            x.astype(jnp.float32) if scale is None else x.astype(jnp.float32) * scale[None, :, None, None]
            for x, scale in zip((self.k_pages, self.v_pages), factors, strict=True)
        )  # pyright: ignore[reportReturnType]


def _make(heads: Heads) -> _Inputs:
    """Random contexts in random pages. What nobody owns is large, so that reading it shows."""
    rng = np.random.default_rng(0)
    width = -(-max(LENGTHS) // PAGE_TOKENS)
    count = len(LENGTHS) * width
    pages = rng.standard_normal((2, count, heads.kv_heads, PAGE_TOKENS, heads.head_dim)).astype(np.float32)
    table = rng.permutation(count).astype(np.int32).reshape(len(LENGTHS), width)
    for row, length in enumerate(LENGTHS):
        slots = np.arange(width * PAGE_TOKENS).reshape(width, PAGE_TOKENS) >= length
        pages[:, table[row]] += 30 * slots[None, :, None, :, None]
    scales: dict[str, jax.Array] = {}
    if heads.fp8:
        scales = {
            name: jnp.asarray(0.25 * (1 + rng.random(heads.kv_heads)), jnp.float32) for name in ("k_scale", "v_scale")
        }
        k, v = (jnp.asarray(x).astype(FP8) for x in pages)
    else:
        k, v = (jnp.asarray(x, jnp.bfloat16) for x in pages)
    return _Inputs(k, v, jnp.asarray(table), jnp.asarray(LENGTHS, jnp.int32), scales)


def _queries(heads: Heads, rows: int) -> jax.Array:
    values = np.random.default_rng(1).standard_normal((rows, heads.q_heads, heads.head_dim))
    return jnp.asarray(values, jnp.bfloat16)


def _decode(heads: Heads, mosaic: dict[str, Any], max_splits: int) -> float:
    given, q = _make(heads), _queries(heads, len(LENGTHS))
    tuning = mosaic.get("tuning") or DECODE[DEFAULT_GPU]
    mosaic = mosaic | {"tuning": replace(tuning, max_splits=max_splits, min_split_pages=1)}
    out, lse = jax.jit(lambda *x: decode_attention(*x, **given.scales, **mosaic))(
        q, given.k_pages, given.v_pages, given.table, given.lengths
    )
    want, want_lse = jax.jit(decode_attention)(q.astype(jnp.float32), *given.in_float32, given.table, given.lengths)
    return max(_error(out, want), float(jnp.abs(lse - want_lse).max()))


def _prefill(heads: Heads, mosaic: dict[str, Any]) -> float:
    given = _make(heads)
    starts = jnp.array([0, 0, 1, 1 + CHUNK], jnp.int32)
    q = _queries(heads, 1 + CHUNK)
    call = jax.jit(lambda *x: prefill_attention(*x, **given.scales, **mosaic))
    out = call(q, given.k_pages, given.v_pages, given.table, starts, given.lengths)
    want = jax.jit(prefill_attention)(q.astype(jnp.float32), *given.in_float32, given.table, starts, given.lengths)
    return _error(out, want)


def _append(heads: Heads, mosaic: dict[str, Any]) -> float:
    """0 when every page is as it should be, bit for bit."""
    given = _make(heads)
    rows = 19
    rng = np.random.default_rng(2)
    k, v = (jnp.asarray(rng.standard_normal((rows, heads.kv_heads, heads.head_dim)), jnp.bfloat16) for _ in range(2))
    count = given.k_pages.shape[0]
    places = rng.choice(count * PAGE_TOKENS, rows, replace=False)
    pages, slots = (jnp.asarray(x, jnp.int32) for x in np.divmod(places, PAGE_TOKENS))
    pages = pages.at[3].set(count)  # dropped
    got = jax.jit(lambda *x: append_kv(*x, **given.scales, **mosaic))(given.k_pages, given.v_pages, k, v, pages, slots)
    scaled = [quantise(x, s) for x, s in zip((k, v), given.scales.values(), strict=True)] if heads.fp8 else [k, v]
    for pool, new, mine in zip((given.k_pages, given.v_pages), scaled, got, strict=True):
        want = pool.at[pages, :, slots].set(new, mode="drop")
        if (np.asarray(mine).view(np.uint8) != np.asarray(want).view(np.uint8)).any():
            return float("inf")
    return 0.0


def _error(got: jax.Array, want: jax.Array) -> float:
    """Of the worst row, relative to its norm."""
    error = jnp.linalg.norm(got.astype(jnp.float32) - want, axis=-1) / jnp.linalg.norm(want, axis=-1)
    return float(jnp.where(jnp.isfinite(error), error, jnp.inf).max())


# Decode attention is two kernels: whole rows, and split ones whose parts are joined.
CHECKS: dict[str, tuple[Callable[[Heads, dict[str, Any]], float], ...]] = {
    "decode_attention": (
        lambda heads, mosaic: _decode(heads, mosaic, max_splits=1),
        lambda heads, mosaic: _decode(heads, mosaic, max_splits=3),
    ),
    "prefill_attention": (_prefill,),
    "append_kv": (_append,),
}


def check_kernel(kernel: str, heads: Heads, *, tuning: Any = None, interpret: Any = None) -> float:
    """The error of a Mosaic kernel's worst row on this process' default device.

    kernel     "decode_attention", "prefill_attention" or "append_kv"
    tuning     as the kernel takes it
    interpret  likewise, for tests without a GPU

    Raises KernelError, one line, when the kernel cannot be built or run, or is off by more than TOLERANCE.
    """
    mosaic = {"backend": "mosaic", "tuning": tuning, "interpret": interpret}
    worst = 0.0
    for check in CHECKS[kernel]:
        try:
            error = check(heads, mosaic)
        except Exception as error:  # whatever it is: the caller must not take this kernel
            first = (str(error).strip().splitlines() or [""])[0]
            raise KernelError(f"{kernel} failed: {type(error).__name__}: {first}") from error
        if not error <= TOLERANCE:
            raise KernelError(
                f"{kernel}: a row is off by {error:.3g} of its norm from the XLA path, over {TOLERANCE:g}"
            )
        worst = max(worst, error)
    return worst
