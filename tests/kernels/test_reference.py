"""The float32 definitions agree with attention over contiguous contexts in float64, written without pages."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import reference
from tests.kernels.paged import dense_decode, dense_prefill, make_paged, random_queries
from tests.tolerances import assert_rows_close, row_errors


@pytest.mark.parametrize(("heads", "kv_heads", "page_size"), [(4, 2, 1), (4, 2, 3), (6, 1, 4)])
def test_decode_definition(heads: int, kv_heads: int, page_size: int) -> None:
    rng = np.random.default_rng(heads)
    paged = make_paged(rng, [0, 1, 4, 5], kv_heads=kv_heads, page_size=page_size)
    q = random_queries(rng, 4, heads)
    out, lse = reference.decode_attention(
        q, paged.k_pages, paged.v_pages, jnp.asarray(paged.page_table), jnp.asarray(paged.lengths), scale=0.3
    )
    want, want_lse = dense_decode(q, paged, 0.3)
    assert_rows_close(out, want, "float32")
    assert_rows_close(lse[1:], want_lse[1:], "float32")
    assert (np.asarray(lse[0]) == -np.inf).all()


def test_prefill_definition() -> None:
    rng = np.random.default_rng(1)
    paged = make_paged(rng, [5, 3, 4], kv_heads=2, page_size=4)
    starts = [0, 2, 5, 5]
    q = random_queries(rng, 7, 4)
    out = reference.prefill_attention(
        q,
        paged.k_pages,
        paged.v_pages,
        jnp.asarray(paged.page_table),
        jnp.asarray(starts),
        jnp.asarray(paged.lengths),
        scale=0.4,
    )
    assert_rows_close(out, dense_prefill(q, paged, starts, 0.4), "float32")


def test_append_definition() -> None:
    """Rows land in their place, everything else stays, rows of no page are dropped."""
    rng = np.random.default_rng(2)
    before = rng.standard_normal((2, 5, 2, 4, 3)).astype(np.float32)
    rows = rng.standard_normal((2, 3, 2, 3)).astype(np.float32)
    pages, slots = np.array([4, 5, 1]), np.array([3, 0, 2])
    want = before.copy()
    for i in (0, 2):
        want[:, pages[i], :, slots[i]] = rows[:, i]
    got = reference.append_kv(*map(jnp.asarray, (*before, *rows, pages, slots)))
    np.testing.assert_array_equal(np.stack(got), want)


def test_tolerance_fails_for_zeros_nan_and_other_shapes() -> None:
    """What must not pass: zeros, NaN, one bad row among many, shapes that would broadcast, no rows."""
    want = np.random.default_rng(3).standard_normal((50, 8))
    assert_rows_close(want * (1 + 0.9e-4), want, "float32")
    one_bad = want.copy()
    one_bad[17] *= 1 + 1.1e-4
    nan = want.copy()
    nan[3, 2] = np.nan
    for bad in (np.zeros_like(want), nan, one_bad, want[:1], want[:0]):
        with pytest.raises(AssertionError):
            assert_rows_close(bad, want, "float32")
    with pytest.raises(AssertionError):
        assert_rows_close(want[:0], want[:0], "float32")
    with pytest.raises(AssertionError, match=r"row \(17,\)"):
        assert_rows_close(one_bad, want, "float32")
    with pytest.raises(AssertionError):
        assert_rows_close(nan, nan, "bfloat16")
    assert row_errors(np.ones((1, 2)), np.zeros((1, 2))) == np.inf
    assert row_errors(np.zeros((1, 2)), np.zeros((1, 2))) == 0
