"""prefill_attention (XLA) against its float32 definition: packing, tiles, chunks, and what wrong ones would give."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import paged_xla, prefill_attention, reference
from kernels_pallas.prefill_attention import TILE_ROWS
from tests.kernels.paged import Paged, dense_prefill, make_paged, random_queries
from tests.tolerances import TOLERANCES, assert_rows_close, row_errors

BLOCK = 16  # tokens; small, so that contexts span several blocks
SCALE = 8**-0.5
SEGMENTS, ROWS, WIDTH, PAGE = 5, 40, 16, 4  # the one shape of the property tests


@pytest.fixture(scope="module", autouse=True)
def _small_blocks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_xla, "BLOCK_TOKENS", BLOCK)
        yield


_jitted = jax.jit(prefill_attention)


def run(q: jax.Array, paged: Paged, starts: Any) -> np.ndarray:
    table, lengths = jnp.asarray(paged.page_table), jnp.asarray(paged.lengths)
    return np.asarray(_jitted(q, paged.k_pages, paged.v_pages, table, jnp.asarray(starts, jnp.int32), lengths))


def pack(chunks: list[int]) -> list[int]:
    return [0, *np.cumsum(chunks).tolist()]


# A chunk longer than a tile, a whole page, an empty segment, one row far into a context.
LENGTHS, CHUNKS = [TILE_ROWS + 3, PAGE, 7, 2 * BLOCK + 1], [TILE_ROWS + 1, PAGE, 0, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_definition(dtype: str) -> None:
    """Chunks after earlier context, of a page, of one row over several blocks, an empty one; padding gives zeros."""
    rng = np.random.default_rng(1)
    starts = pack([5, PAGE, 0, 1])
    paged = make_paged(rng, [6, PAGE, 7, 2 * BLOCK + 1], kv_heads=2, page_size=PAGE, dtype=dtype)
    q = random_queries(rng, starts[-1] + 3, 4, dtype=dtype)
    args = (q, paged.k_pages, paged.v_pages, *map(jnp.asarray, (paged.page_table, starts, paged.lengths)))
    out = jax.jit(partial(prefill_attention, scale=0.5))(*args)
    assert out.dtype == jnp.dtype(dtype)
    assert_rows_close(out, reference.prefill_attention(*args, scale=0.5), dtype)


@pytest.mark.parametrize(("heads", "kv_heads", "page_size"), [(8, 8, 8), (4, 1, 3), (6, 2, 1), (1, 1, 32)])
def test_head_layouts(heads: int, kv_heads: int, page_size: int) -> None:
    """The same in other head layouts and page sizes (the largest above the block), against contiguous attention."""
    rng = np.random.default_rng(heads + page_size)
    starts = pack(CHUNKS)
    paged = make_paged(rng, LENGTHS, kv_heads=kv_heads, page_size=page_size)
    q = random_queries(rng, starts[-1] + 3, heads)
    assert_rows_close(run(q, paged, starts), dense_prefill(q, paged, starts, SCALE), "float32")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_packing(data: st.DataObject) -> None:
    """Random segments, empty ones too; chunks across tiles, contexts across pages and blocks, padding at the end."""
    chunks, left = [], ROWS
    for _ in range(SEGMENTS):
        chunks.append(data.draw(st.integers(0, min(left, 2 * TILE_ROWS + 2))))
        left -= chunks[-1]
    earlier = [data.draw(st.integers(0, WIDTH * PAGE - c)) for c in chunks]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    starts = pack(chunks)
    pages = sum(-(-(a + b) // PAGE) for a, b in zip(chunks, earlier, strict=True))
    paged = make_paged(
        rng, [a + b for a, b in zip(chunks, earlier, strict=True)], kv_heads=2, page_size=PAGE, width=WIDTH
    )
    pad = SEGMENTS * WIDTH + 3 - (pages + 3)  # the same number of pages each time: one compiled program
    holes = jnp.full((pad, *paged.k_pages.shape[1:]), jnp.nan)
    paged.k_pages, paged.v_pages = (jnp.concatenate([p, holes]) for p in (paged.k_pages, paged.v_pages))
    q = random_queries(rng, ROWS, 4)
    assert_rows_close(run(q, paged, starts), dense_prefill(q, paged, starts, SCALE), "float32")


@pytest.mark.parametrize("chunk", [1, 5, TILE_ROWS - 1, TILE_ROWS, TILE_ROWS + 1, 37])
def test_chunked_equals_whole(chunk: int) -> None:
    """A prompt in chunks, each seeing the pages of those before it, gives what it gives in one piece."""
    rng = np.random.default_rng(9)
    paged = make_paged(rng, [37], kv_heads=2, page_size=PAGE)
    q = random_queries(rng, 37, 4)
    whole = run(q, paged, [0, 37])
    for start in range(0, 37, chunk):
        stop = min(start + chunk, 37)
        paged.lengths[0] = stop
        rows = jnp.zeros_like(q).at[: stop - start].set(q[start:stop])
        got = run(rows, paged, [0, stop - start])
        assert_rows_close(got[: stop - start], whole[start:stop], "float32")
        assert not got[stop - start :].any()


def test_segment_does_not_depend_on_its_neighbours() -> None:
    """Bitwise: the same chunk in another place, beside other contexts."""
    rng = np.random.default_rng(10)
    paged = make_paged(rng, [5 * BLOCK, 30, 5 * BLOCK], kv_heads=2, page_size=PAGE)
    q = random_queries(rng, 40, 4)
    chunk = q[:12]
    answers = []
    for before, after, lengths in ((0, 0, (0, 30, 0)), (3, 20, (3, 30, 80)), (17, 1, (80, 30, 1))):
        paged.lengths = np.array(lengths, np.int32)
        rows = q.at[before : before + 12].set(chunk)
        answers.append(run(rows, paged, pack([before, 12, after]))[before : before + 12])
    assert np.isfinite(answers[0]).all()
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])


def test_broken_twins_fail() -> None:
    """What these mistakes would give is far outside the tolerance, in every dtype."""
    rng = np.random.default_rng(11)
    paged = make_paged(rng, [29, 23], kv_heads=2, page_size=PAGE)
    paged.k_pages, paged.v_pages = jnp.nan_to_num(paged.k_pages), jnp.nan_to_num(paged.v_pages)
    q, starts = random_queries(rng, 24, 4), [0, 10, 20]
    want = dense_prefill(q, paged, starts, SCALE)[:20]
    assert_rows_close(run(q, paged, starts)[:20], want, "float32")

    def broken(rows: slice = slice(0, 20), starts: list[int] = starts, **changes: Any) -> float:
        twin = Paged(**{**vars(paged), **changes})
        return row_errors(run(q, twin, starts)[:20], want)[rows].max()

    table = paged.page_table
    stale = table.copy()
    stale[:, 1] = table[::-1, 1]
    twins = {
        "K for V": broken(v_pages=paged.k_pages),
        "identity page table": broken(page_table=np.arange(table.size, dtype=np.int32).reshape(table.shape)),
        "last page dropped": broken(lengths=paged.lengths - PAGE),
        "stale page": broken(page_table=stale),
        "not causal by one": broken(lengths=paged.lengths + 1),
        "tables of the wrong segment": broken(page_table=table[::-1].copy()),
        "a row dropped": broken(slice(19, 20), starts=[0, 10, 19]),
    }
    assert not [name for name, error in twins.items() if not error > TOLERANCES["bfloat16"]], twins


def _bad(**changes: Any) -> dict[str, Any]:
    shapes: dict[str, Any] = {
        "q": (6, 4, 8),
        "k_pages": (5, 2, 4, 8),
        "v_pages": (5, 2, 4, 8),
        "page_table": (2, 3),
        "row_starts": (3,),
        "lengths": (2,),
    }
    shapes.update(changes)
    floats = ("q", "k_pages", "v_pages")
    return {
        n: jnp.zeros(s, jnp.float32 if n in floats else jnp.int32) if isinstance(s, tuple) else s
        for n, s in shapes.items()
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "triton"}, "backend: 'triton'"),
        ({"q": (6, 32)}, "q: shape"),
        ({"q": (6, 3, 8)}, "q: 3 query heads"),
        ({"v_pages": (5, 2, 4)}, "k_pages, v_pages: shapes"),
        ({"page_table": (2,)}, "page_table: shape"),
        ({"row_starts": (2,)}, "row_starts: shape"),
        ({"lengths": (3,)}, "lengths: shape"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        prefill_attention(**_bad(**changes))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
