"""Sinks of attention: a logit of each head beside its scores, XLA and Mosaic, against a softmax that has them."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import decode_attention, prefill_attention, reference
from kernels_pallas.tuning import PREFILL, DecodeTuning, PrefillTuning
from tests.kernels.compiled import compiled_report, launched
from tests.kernels.paged import Paged, make_paged, random_queries
from tests.tolerances import row_errors

LENGTHS = (150, 0, 5, 64, 1)
CHUNKS, CONTEXTS, PADDING = (18, 0, 7, 1), (170, 0, 7, 130), 3
STARTS = [0, *np.cumsum(CHUNKS).tolist()]
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
LIMITS = {"xla": 1e-5, "mosaic": 5e-3}


def dense(q: Any, k: Any, v: Any, sinks: np.ndarray | float = -np.inf) -> np.ndarray:
    """One row, in float64: q [Hq, d], k and v [seen, Hkv, d]. Sinks of -inf are none."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[0] // x.shape[1], axis=1) for x in (k, v))
    weights = np.exp(np.einsum("hd,thd->ht", q, k) * q.shape[1] ** -0.5)
    return np.einsum("ht,thd->hd", weights, v) / (weights.sum(1) + np.exp(sinks))[:, None]


def context(paged: Paged, row: int, seen: int) -> tuple[np.ndarray, np.ndarray]:
    size, t = paged.k_pages.shape[2], np.arange(seen)
    pages = paged.page_table[row][t // size]
    k, v = (np.asarray(pool, np.float32)[pages, :, t % size] for pool in (paged.k_pages, paged.v_pages))
    return k, v


def inputs(lengths: tuple[int, ...], rows: int, repeats: int, dtype: str) -> tuple[jax.Array, Paged, jax.Array]:
    rng = np.random.default_rng(repeats)
    paged = make_paged(rng, lengths, kv_heads=2, page_size=64, head_dim=64, dtype=dtype)
    sinks = jnp.asarray(rng.standard_normal(2 * repeats) + 6, jnp.float32)
    return random_queries(rng, rows, 2 * repeats, 64, dtype), paged, sinks


@pytest.mark.parametrize(("backend", "repeats"), [("xla", 4), ("mosaic", 8), ("reference", 3)])
def test_decode(backend: str, repeats: int) -> None:
    q, paged, sinks = inputs(LENGTHS, len(LENGTHS), repeats, "bfloat16" if backend == "mosaic" else "float32")
    more: dict[str, Any] = {"backend": backend}
    if backend == "mosaic":
        more |= {"tuning": DecodeTuning(sms=2), "interpret": INTERPRET}
    call: Any = jax.jit(partial(decode_attention, **more))
    if backend == "reference":
        call = partial(reference.decode_attention, scale=64**-0.5)
    args = (q, paged.k_pages, paged.v_pages, jnp.asarray(paged.page_table), jnp.asarray(paged.lengths))
    out, lse = call(*args, sinks=sinks)
    want = np.stack([dense(q[r], *context(paged, r, n), np.asarray(sinks)) for r, n in enumerate(LENGTHS)])
    limit = LIMITS.get(backend, 1e-5)
    assert row_errors(np.asarray(out, np.float32), want).max() < limit
    plain, plain_lse = call(*args)
    np.testing.assert_array_equal(lse, plain_lse)
    some = np.array(LENGTHS) > 0
    assert row_errors(np.asarray(plain, np.float32), want)[some].min() > limit


@pytest.mark.parametrize(
    ("backend", "repeats"), [("xla", 4), ("mosaic", 8), ("mosaic", 4), ("mosaic", 3), ("reference", 2)]
)
def test_prefill(backend: str, repeats: int) -> None:
    """Tiles of a token's eight heads, of two heads and of one."""
    rows = STARTS[-1] + PADDING
    q, paged, sinks = inputs(CONTEXTS, rows, repeats, "bfloat16" if backend == "mosaic" else "float32")
    more: dict[str, Any] = {"backend": backend}
    if backend == "mosaic":
        more |= {"tuning": PrefillTuning(sms=2), "interpret": INTERPRET}
    call: Any = jax.jit(partial(prefill_attention, **more))
    if backend == "reference":
        call = partial(reference.prefill_attention, scale=64**-0.5)
    integers = [jnp.asarray(x, jnp.int32) for x in (paged.page_table, STARTS, paged.lengths)]
    args = (q, paged.k_pages, paged.v_pages, *integers)
    out = np.asarray(call(*args, sinks=sinks), np.float32)
    want, plain = np.zeros(out.shape), np.zeros(out.shape)
    for s, (count, length) in enumerate(zip(CHUNKS, CONTEXTS, strict=True)):
        for i in range(count):
            row, seen = STARTS[s] + i, length - count + i + 1
            given = q[row], *context(paged, s, seen)
            want[row], plain[row] = dense(*given, np.asarray(sinks)), dense(*given)
    limit = LIMITS.get(backend, 1e-5)
    assert row_errors(out, want).max() < limit
    assert row_errors(plain, want)[: STARTS[-1]].min() > limit  # what it would be without them


def test_sinks_that_do_not_fit() -> None:
    q, paged, sinks = inputs(LENGTHS, len(LENGTHS), 2, "float32")
    args = (q, paged.k_pages, paged.v_pages, jnp.asarray(paged.page_table), jnp.asarray(paged.lengths))
    for wrong in (sinks[1:], sinks.astype(jnp.bfloat16)):
        with pytest.raises(ValueError, match=r"^sinks: .* must be float32 \[4\], one per query head$"):
            decode_attention(*args, sinks=wrong)


@pytest.mark.aot
def test_prefill_compiles_for_hopper(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Of gpt-oss on eight GPUs, with its window: nothing spilled."""
    pool = jax.ShapeDtypeStruct((3012, 1, 64, 64), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((768, 8, 64), jnp.bfloat16)
    integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((12, 130), (13,), (12,))]
    sinks = jax.ShapeDtypeStruct((8,), jnp.float32)

    def attend(*args: Any) -> Any:
        *others, sinks = args
        return prefill_attention(*others, sinks=sinks, window=128, backend="mosaic", tuning=PREFILL["h200"])

    program, registers = compiled_report(attend, [q, pool, pool, *integers, sinks], monkeypatch, capfd)
    assert launched(program)[-1] == "prefill_attention"
    assert len(registers) == 1
