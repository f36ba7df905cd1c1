"""Pages of float8_e4m3fn: append, decode (XLA and Mosaic) and prefill against definitions over dequantised contexts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import append_kv, decode_attention, decode_plan, paged_xla, prefill_attention, reference
from kernels_pallas.tuning import AppendTuning, DecodeTuning
from tests.kernels.paged import Paged, dense_decode, dense_prefill, make_paged, random_queries
from tests.tolerances import TOLERANCES, assert_rows_close, row_errors

SMALL = DecodeTuning(sms=2, bytes_in_flight=128 * 1024, min_split_pages=1, max_split_pages=64)
SPLIT = replace(SMALL, max_split_pages=2)
RAGGED = (65, 0, 1, 64, 330, 63)
# A row over fp8 pages beside the same row over float32: K and V rounded to 4 bits each, 2.6 % rms, in a random context.
FROM_UNROUNDED = 8e-2


@dataclass
class Fp8:
    """Paged contexts rounded to fp8, and what they stand for."""

    pages: tuple[jax.Array, jax.Array]
    scales: tuple[jax.Array, jax.Array]  # [Hkv] each, all different
    exact: Paged  # the contexts dequantised
    before: Paged  # and before they were rounded


def make_fp8(rng: np.random.Generator, lengths: tuple[int, ...], kv_heads: int, page_size: int, dim: int) -> Fp8:
    paged = make_paged(rng, lengths, kv_heads=kv_heads, page_size=page_size, head_dim=dim)
    scales = np.asarray((1 + rng.random((2, kv_heads))) * [[1 / 16], [1 / 64]], np.float32)

    def rounded(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return (x / scale).astype(ml_dtypes.float8_e4m3fn)

    pools = np.asarray(paged.k_pages), np.asarray(paged.v_pages)
    pages = [rounded(p, s[:, None, None]) for p, s in zip(pools, scales, strict=True)]
    k, v = (
        [rounded(x, s[:, None]).astype(np.float32) * s[:, None] for x in contexts]
        for contexts, s in zip((paged.k, paged.v), scales, strict=True)
    )
    k_pages, v_pages = (jnp.asarray(p) for p in pages)
    k_scale, v_scale = (jnp.asarray(s) for s in scales)
    return Fp8((k_pages, v_pages), (k_scale, v_scale), replace(paged, k=k, v=v), paged)


def mosaic(tuning: DecodeTuning, races: bool = True) -> Callable[..., tuple[jax.Array, jax.Array]]:
    params = plgpu.InterpretGPUParams(detect_races=races)
    return jax.jit(partial(decode_attention, backend="mosaic", tuning=tuning, interpret=params))


def decode(run: Any, q: jax.Array, fp8: Fp8, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    names = ("k_pages", "v_pages", "k_scale", "v_scale")
    given = dict(zip(names, (*fp8.pages, *fp8.scales), strict=True))
    table, lengths = jnp.asarray(fp8.exact.page_table), jnp.asarray(fp8.exact.lengths)
    out, lse = run(q, page_table=table, lengths=lengths, **(given | changes))
    assert out.dtype == q.dtype
    return np.asarray(out), np.asarray(lse)


@pytest.mark.parametrize(("dtype", "page_size"), [("float32", 4), ("bfloat16", 3)])
def test_decode_xla(dtype: str, page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exact as over pages of float32: the scales belong to heads, and rounding is the pages' alone."""
    monkeypatch.setattr(paged_xla, "BLOCK_TOKENS", 16)
    rng = np.random.default_rng(1)
    fp8 = make_fp8(rng, (50, 0, 5, 1, 17, 16), 2, page_size, 8)
    q = random_queries(rng, 6, 6, dtype=dtype)
    out, lse = decode(jax.jit(decode_attention), q, fp8)
    want, want_lse = dense_decode(q, fp8.exact, 8**-0.5)
    assert_rows_close(out, want, dtype)
    full = fp8.exact.lengths > 0
    assert_rows_close(lse[full], want_lse[full], dtype)
    definition = decode(partial(reference.decode_attention, scale=8**-0.5), q.astype(jnp.float32), fp8)
    assert_rows_close(definition[0], want, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_xla(dtype: str) -> None:
    rng = np.random.default_rng(2)
    fp8 = make_fp8(rng, (9, 4, 6), 2, 4, 8)
    q = random_queries(rng, 12, 4, dtype=dtype)
    starts = [0, 7, 7, 9]
    args = (q, *fp8.pages, *map(jnp.asarray, (fp8.exact.page_table, starts, fp8.exact.lengths)))
    scales = dict(zip(("k_scale", "v_scale"), fp8.scales, strict=True))
    want = dense_prefill(q, fp8.exact, starts, 8**-0.5)
    assert_rows_close(jax.jit(prefill_attention)(*args, **scales), want, dtype)
    assert_rows_close(reference.prefill_attention(*args, scale=8**-0.5, **scales), want, "float32")


@pytest.mark.parametrize(
    ("repeats", "kv_heads", "head_dim", "tuning"),
    [
        (8, 1, 128, SMALL),
        (4, 2, 128, SPLIT),
        (16, 1, 64, replace(SMALL, step_pages=1)),
        (1, 2, 64, replace(SPLIT, sms=3)),
    ],
)
def test_decode_mosaic(
    repeats: int, kv_heads: int, head_dim: int, tuning: DecodeTuning, capfd: pytest.CaptureFixture[str]
) -> None:
    """Under the interpreter, races watched: as close to the definition as over pages of bfloat16. What no request owns
    is NaN in fp8 too."""
    rng = np.random.default_rng(repeats * head_dim)
    fp8 = make_fp8(rng, RAGGED, kv_heads, 64, head_dim)
    assert np.isnan(np.asarray(fp8.pages[0], np.float32)).any()
    q = random_queries(rng, len(RAGGED), repeats * kv_heads, head_dim, "bfloat16")
    out, lse = decode(mosaic(tuning), q, fp8)
    want, want_lse = dense_decode(q, fp8.exact, head_dim**-0.5)
    assert row_errors(out, want).max() < 5e-3
    full = fp8.exact.lengths > 0
    np.testing.assert_allclose(lse[full], want_lse[full], atol=1e-5, rtol=0)
    assert (lse[~full] == -np.inf).all()
    assert (out[~full].astype(np.float32) == 0).all()
    assert "RACE" not in capfd.readouterr().out
    unrounded, _ = dense_decode(q, fp8.before, head_dim**-0.5)
    errors = row_errors(out, unrounded)[fp8.exact.lengths > 1]
    assert 1e-2 < errors.mean() < errors.max() < FROM_UNROUNDED


def test_broken_twins_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these mistakes would give is far outside the tolerance, with both backends."""
    rng = np.random.default_rng(7)
    fp8 = make_fp8(rng, (70, 100), 2, 64, 64)
    keys, values = (jnp.where(jnp.isnan(p), jnp.zeros((), p.dtype), p) for p in fp8.pages)
    fp8.pages = keys, values
    k_scale, v_scale = fp8.scales
    q = random_queries(rng, 2, 4, 64, "bfloat16") * 2
    want, _ = dense_decode(q, fp8.exact, 64**-0.5)
    stale = jnp.asarray(fp8.exact.page_table[::-1].copy())
    twins: dict[str, dict[str, Any]] = {
        "scales ignored": {"k_scale": jnp.ones(2), "v_scale": jnp.ones(2)},
        "K's scale ignored": {"k_scale": jnp.ones(2)},
        "K's scale used for V": {"v_scale": k_scale},
        "V's scale used for K": {"k_scale": v_scale},
        "scales of the other head": {"k_scale": k_scale[::-1], "v_scale": v_scale[::-1]},
        "K for V": {"v_pages": keys},
        "K and V swapped": {"k_pages": values, "v_pages": keys},
        "V transposed in its pages": {"v_pages": values.swapaxes(2, 3)},
        "tables of the other row": {"page_table": stale},
    }

    def error(run: Any, **changes: Any) -> np.ndarray:
        given = dict(zip(("k_pages", "v_pages", "k_scale", "v_scale"), (*fp8.pages, *fp8.scales), strict=True))
        given |= {"page_table": jnp.asarray(fp8.exact.page_table), "lengths": jnp.asarray(fp8.exact.lengths)}
        return row_errors(run(q, **(given | changes))[0], want).max(axis=1)

    for run in (jax.jit(decode_attention), mosaic(SPLIT, races=False)):
        assert error(run).max() < 5e-3
        for name, changes in twins.items():
            assert error(run, **changes).min() > TOLERANCES["bfloat16"], name

    # Two heads are a quarter of a block: row 0's are read for row 1 too.
    given = (*fp8.pages, jnp.asarray(fp8.exact.page_table), jnp.asarray(fp8.exact.lengths))
    right, beside = (run(x, *given, k_scale=k_scale, v_scale=v_scale)[0] for x in (q, q.at[0].set(jnp.nan)))
    np.testing.assert_array_equal(np.asarray(beside)[1], np.asarray(right)[1])

    def one_term(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        high, low, unit = decode_plan.two_terms(x)
        return high, jnp.zeros_like(low), unit

    monkeypatch.setattr("kernels_pallas.decode_body_mosaic.two_terms", one_term)
    assert error(mosaic(SPLIT, races=False)).max() > 5e-3  # queries of one term would be seen


def test_two_terms_hold_bfloat16() -> None:
    """Exactly, down to 2^-9 of a head's largest element; zeros, tiny and huge heads give nothing but finite numbers."""
    rng = np.random.default_rng(3)
    sizes = 2.0 ** np.array([-130, -20, 0, 3, 100])
    q = jnp.asarray(rng.standard_normal((5, 7, 64)) * sizes[:, None, None], jnp.bfloat16).at[2, 3].set(0)
    high, low, unit = jax.jit(jax.vmap(decode_plan.two_terms))(q)
    assert high.dtype == low.dtype == jnp.float8_e4m3fn
    wide = np.asarray(q, np.float64)
    got = (np.asarray(high, np.float64) + np.asarray(low, np.float64)) * np.asarray(unit, np.float64)[..., None]
    assert np.isfinite(got).all()
    top = np.abs(wide).max(axis=-1, keepdims=True)
    large = np.abs(wide) > top * 2.0**-9
    np.testing.assert_array_equal(got[1:][large[1:]], wide[1:][large[1:]])
    assert (np.abs(got - wide)[1:] <= top[1:] * 2.0**-17).all()
    assert (got[2, 3] == 0).all()
    assert (np.abs(got[0]) <= 2.0**-100).all()


@pytest.mark.parametrize("backend", ["xla", "mosaic"])
def test_append(backend: str) -> None:
    """Each row divided by its head's scale and rounded to nearest; beyond the range it ends at 448, not at NaN."""
    rng = np.random.default_rng(4)
    heads, dim, rows = 2, 64, 5
    pool = jnp.asarray(rng.standard_normal((2, 3, heads, 4, dim)), jnp.float8_e4m3fn)
    k, v = (jnp.asarray(x, jnp.bfloat16) for x in rng.standard_normal((2, rows, heads, dim)))
    k = k.at[0, 1, 5].set(1e4).at[0, 0, 0].set(-1e4)
    scales = jnp.asarray([[0.011, 0.02], [0.3, 0.017]], jnp.float32)
    pages, slots = jnp.array([2, 0, 3, 2, 1]), jnp.array([1, 0, 0, 3, 2])
    more: dict[str, Any] = {"k_scale": scales[0], "v_scale": scales[1]}
    want = reference.append_kv(pool[0], pool[1], k, v, pages, slots, **more)
    if backend == "mosaic":
        tuning = AppendTuning(sms=2, block_bytes=256, stages=2)
        more |= {"backend": backend, "tuning": tuning, "interpret": plgpu.InterpretGPUParams(detect_races=True)}
    got = append_kv(pool[0], pool[1], k, v, pages, slots, **more)
    for i, rows_in in enumerate((k, v)):
        expected = np.array(pool[i])
        for row in (0, 1, 3, 4):
            units = np.asarray(rows_in[row], np.float32) / np.asarray(scales[i])[:, None]
            expected[pages[row], :, slots[row]] = np.clip(units, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(np.asarray(got[i]).view(np.uint8), expected.view(np.uint8))
        np.testing.assert_array_equal(np.asarray(want[i]).view(np.uint8), expected.view(np.uint8))
    assert float(got[0][2, 1, 1, 5]) == 448


def test_append_then_attend() -> None:
    """A context written row by row is read back: the two agree on what a scale means."""
    rng = np.random.default_rng(5)
    empty = jnp.zeros((3, 2, 4, 8), jnp.float8_e4m3fn)
    k, v = jnp.asarray(rng.standard_normal((2, 9, 2, 8)), jnp.float32)
    scales: dict[str, Any] = {"k_scale": jnp.array([0.01, 0.02]), "v_scale": jnp.array([0.03, 0.01])}
    order = jnp.array([2, 0, 1])
    token = jnp.arange(9, dtype=jnp.int32)
    pages = append_kv(empty, empty, k, v, order[token // 4], token % 4, **scales)
    q = random_queries(rng, 1, 4)
    out, _ = decode_attention(q, *pages, order[None], jnp.array([9]), **scales)
    pool, lengths = jnp.zeros((3, 2, 4, 8)), np.array([9], np.int32)
    exact = Paged([np.asarray(k)], [np.asarray(v)], pool, pool, np.asarray(order[None]), lengths)
    assert row_errors(out, dense_decode(q, exact, 8**-0.5)[0]).max() < FROM_UNROUNDED


BF16, FP8 = jnp.bfloat16, jnp.float8_e4m3fn


@pytest.mark.parametrize(
    ("k_pages", "v_pages", "k_scale", "v_scale", "message"),
    [
        (FP8, FP8, None, None, "k_scale: None; pages of float8_e4m3fn accept float32[2], one of each KV head"),
        (FP8, FP8, jnp.ones(2), jnp.ones(1), "v_scale: float32[1]; pages"),
        (FP8, FP8, jnp.ones(2, BF16), jnp.ones(2), "k_scale: bfloat16[2]; pages"),
        (BF16, BF16, None, jnp.ones(2), "v_scale: is not accepted with pages of bfloat16; accepted: None"),
        (FP8, BF16, jnp.ones(2), jnp.ones(2), "k_pages, v_pages: dtypes float8_e4m3fn, bfloat16"),
    ],
)
def test_errors_name_the_argument(k_pages: Any, v_pages: Any, k_scale: Any, v_scale: Any, message: str) -> None:
    pools = jnp.zeros((5, 2, 64, 64), k_pages), jnp.zeros((5, 2, 64, 64), v_pages)
    q, rows, n = jnp.zeros((3, 4, 64), BF16), jnp.zeros((3, 2, 64), BF16), jnp.zeros(3, jnp.int32)
    table = jnp.zeros((3, 2), jnp.int32)
    more = {"k_scale": k_scale, "v_scale": v_scale}
    for call in (
        partial(decode_attention, q, *pools, table, n, **more),
        partial(decode_attention, q, *pools, table, n, backend="mosaic", **more),
        partial(prefill_attention, q, *pools, table, jnp.zeros(4, jnp.int32), n, **more),
        partial(append_kv, *pools, rows, rows, n, n, **more),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)
