"""decode_attention (XLA) against its float32 definition, and what a wrong one would look like."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import decode_attention, paged_xla, reference
from tests.kernels.paged import Paged, dense_decode, make_paged, random_queries
from tests.tolerances import TOLERANCES, assert_rows_close, row_errors

BLOCK = 16  # tokens; small, so that contexts span several blocks


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_xla, "BLOCK_TOKENS", BLOCK)


# Empty, one token, edges of pages (of 3, 4 and 16 tokens) and of blocks, several blocks; long beside short.
RAGGED = [3 * BLOCK + 2, 0, 5, 1, BLOCK + 1, 4, BLOCK, 3, BLOCK - 1, 0]


def arguments(q: jax.Array, paged: Paged) -> tuple[jax.Array, ...]:
    return q, paged.k_pages, paged.v_pages, jnp.asarray(paged.page_table), jnp.asarray(paged.lengths)


@pytest.mark.parametrize(("page_size", "dtype"), [(4, "float32"), (4, "bfloat16"), (3, "float32")])
def test_equals_definition(page_size: int, dtype: str) -> None:
    """Page sizes (one does not divide the block) x dtypes x ragged lengths; nothing unowned is read."""
    rng = np.random.default_rng(page_size)
    paged = make_paged(rng, RAGGED, kv_heads=2, page_size=page_size, dtype=dtype)
    q = random_queries(rng, len(RAGGED), 8, dtype=dtype)
    args = arguments(q, paged)
    out, lse = jax.jit(partial(decode_attention, scale=0.5))(*args)
    want, want_lse = reference.decode_attention(*args, scale=0.5)
    assert out.dtype == jnp.dtype(dtype)
    assert lse.dtype == jnp.float32
    assert_rows_close(out, want, dtype)
    full = paged.lengths > 0
    assert_rows_close(np.asarray(lse)[full], np.asarray(want_lse)[full], dtype)
    assert (np.asarray(lse)[~full] == -np.inf).all()


@pytest.mark.parametrize(("heads", "kv_heads", "page_size"), [(8, 8, 4), (8, 1, 16), (6, 2, 1), (1, 1, 32)])
def test_head_layouts(heads: int, kv_heads: int, page_size: int) -> None:
    """The same in other head layouts and page sizes (the largest above the block), against contiguous attention."""
    rng = np.random.default_rng(heads * page_size)
    paged = make_paged(rng, RAGGED, kv_heads=kv_heads, page_size=page_size)
    q = random_queries(rng, len(RAGGED), heads)
    out, _ = jax.jit(partial(decode_attention, scale=0.5))(*arguments(q, paged))
    assert_rows_close(out, dense_decode(q, paged, 0.5)[0], "float32")


def test_default_scale_and_extreme_scores() -> None:
    """1 / sqrt(d) by default; scores in the hundreds neither overflow nor lose the answer."""
    rng = np.random.default_rng(5)
    paged = make_paged(rng, [40, 7], kv_heads=2, page_size=4)
    q = random_queries(rng, 2, 4) * 100
    out, lse = jax.jit(decode_attention)(*arguments(q, paged))
    want, want_lse = dense_decode(q, paged, 8**-0.5)
    assert_rows_close(out, want, "float32")
    assert_rows_close(lse, want_lse, "float32")


def test_row_does_not_depend_on_its_neighbours_lengths() -> None:
    """Bitwise: row 1 among empty, short and long neighbours, which change how many blocks are read."""
    rng = np.random.default_rng(6)
    paged = make_paged(rng, [5 * BLOCK, 21, 5 * BLOCK, 5 * BLOCK], kv_heads=2, page_size=4)
    q = random_queries(rng, 4, 8)
    run = jax.jit(decode_attention)
    q, k_pages, v_pages, table, _ = arguments(q, paged)
    answers = [
        [np.asarray(x)[1] for x in run(q, k_pages, v_pages, table, jnp.asarray(lengths, jnp.int32))]
        for lengths in ([0, 21, 0, 0], [1, 21, 20, 22], [5 * BLOCK, 21, 0, 3], [80, 21, 80, 80])
    ]
    assert np.isfinite(answers[0][0]).all()
    for out, lse in answers[1:]:
        np.testing.assert_array_equal(out, answers[0][0])
        np.testing.assert_array_equal(lse, answers[0][1])


def test_broken_twins_fail() -> None:
    """Each tolerance has teeth: what these mistakes would give is far outside, in every dtype."""
    rng = np.random.default_rng(7)
    paged = make_paged(rng, [37, 30, 25], kv_heads=2, page_size=4)
    full = (
        jnp.nan_to_num(paged.k_pages),
        jnp.nan_to_num(paged.v_pages),
    )  # so that an error shows as a wrong number, not as NaN
    q = random_queries(rng, 3, 4)
    table, lengths = jnp.asarray(paged.page_table), jnp.asarray(paged.lengths)
    run = jax.jit(decode_attention)
    want, _ = dense_decode(q, paged, 8**-0.5)
    assert_rows_close(run(q, *full, table, lengths)[0], want, "float32")
    stale = paged.page_table.copy()
    stale[:, 2] = paged.page_table[[1, 2, 0], 2]  # a page that is another request's by now
    identity = jnp.arange(table.size, dtype=jnp.int32).reshape(table.shape)
    twins: dict[str, tuple[Any, ...]] = {
        "K for V": (q, full[0], full[0], table, lengths),
        "K and V swapped": (q, full[1], full[0], table, lengths),
        "identity page table": (q, *full, identity, lengths),
        "last page dropped": (q, *full, table, (lengths - 1) // 4 * 4),
        "stale page": (q, *full, jnp.asarray(stale), lengths),
        "query heads in another order": (q[:, jnp.array([0, 2, 1, 3])], *full, table, lengths),
    }
    for name, args in twins.items():
        errors = row_errors(run(*args)[0], want)
        assert errors.max(axis=1).min() > TOLERANCES["bfloat16"], f"{name}: a row passes ({errors.max(axis=1)})"


def test_unowned_pages_are_nan_and_would_show() -> None:
    """One entry too many of context reaches NaN: the tests above would see a kernel that reads past a length."""
    rng = np.random.default_rng(8)
    paged = make_paged(rng, [9], kv_heads=2, page_size=4)
    q, k_pages, v_pages, table, lengths = arguments(random_queries(rng, 1, 4), paged)
    assert np.isfinite(np.asarray(jax.jit(decode_attention)(q, k_pages, v_pages, table, lengths)[0])).all()
    assert np.isnan(np.asarray(jax.jit(decode_attention)(q, k_pages, v_pages, table, lengths + 1)[0])).any()


def _bad(**changes: Any) -> dict[str, Any]:
    shapes: dict[str, Any] = {
        "q": (3, 4, 8),
        "k_pages": (5, 2, 4, 8),
        "v_pages": (5, 2, 4, 8),
        "page_table": (3, 2),
        "lengths": (3,),
    }
    shapes.update(changes)
    integers = ("page_table", "lengths")
    return {
        n: jnp.zeros(s, jnp.int32 if n in integers else jnp.float32) if isinstance(s, tuple) else s
        for n, s in shapes.items()
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "cuda"}, "backend: 'cuda'"),
        ({"q": (3, 32)}, "q: shape"),
        ({"q": (3, 4, 16)}, "q: head size 16"),
        ({"q": (3, 5, 8)}, "q: 5 query heads"),
        ({"k_pages": (5, 2, 8)}, "k_pages, v_pages: shapes"),
        ({"v_pages": (5, 2, 4, 9)}, "k_pages, v_pages: shapes"),
        ({"page_table": (6,)}, "page_table: shape"),
        ({"page_table": (2, 3)}, "page_table: 2 rows"),
        ({"lengths": (4,)}, "lengths: shape"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        decode_attention(**_bad(**changes))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
