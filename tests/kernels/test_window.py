"""Sliding windows, XLA: decode and prefill attention against attention over the window alone, written without pages."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import decode_attention, paged_xla, prefill_attention, reference
from tests.kernels.paged import Paged, dense_decode, dense_prefill, make_paged, random_queries, slide
from tests.tolerances import TOLERANCES, assert_rows_close, row_errors

BLOCK, PAGE, SCALE = 16, 4, 8**-0.5  # tokens; a context spans several blocks
LENGTHS = (50, 0, 5, 1, 17, 4, 80, 3)
# A chunk over three tiles, none, a whole prompt longer than a small window, one row far into its context.
CHUNKS, CONTEXTS = (37, 0, 9, 1), (61, 7, 9, 80)
STARTS = [0, *np.cumsum(CHUNKS).tolist()]
# One token; within a page, a page, across pages, more than a block; longer than some contexts, and than all.
CASES = [*((window, "float32") for window in (1, 3, 4, 6, 21, 64, 1000)), (6, "bfloat16")]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_xla, "BLOCK_TOKENS", BLOCK)


def decode_inputs(window: int, dtype: str = "float32") -> tuple[jax.Array, Paged]:
    rng = np.random.default_rng(1)
    paged = make_paged(rng, LENGTHS, kv_heads=2, page_size=PAGE, dtype=dtype)
    q = random_queries(rng, len(LENGTHS), 6, dtype=dtype)
    return q, slide(paged, [max(0, n - window) for n in LENGTHS])


def prefill_inputs(window: int, dtype: str = "float32") -> tuple[jax.Array, Paged]:
    rng = np.random.default_rng(2)
    paged = make_paged(rng, CONTEXTS, kv_heads=2, page_size=PAGE, dtype=dtype)
    q = random_queries(rng, STARTS[-1] + 3, 4, dtype=dtype)
    return q, slide(paged, [max(0, n - c + 1 - window) for n, c in zip(CONTEXTS, CHUNKS, strict=True)])


def decode_args(q: jax.Array, paged: Paged) -> tuple[jax.Array, ...]:
    return q, paged.k_pages, paged.v_pages, jnp.asarray(paged.page_table), jnp.asarray(paged.lengths)


def prefill_args(q: jax.Array, paged: Paged) -> tuple[jax.Array, ...]:
    *pages, table, lengths = decode_args(q, paged)
    return *pages, table, jnp.asarray(STARTS, jnp.int32), lengths


@pytest.mark.parametrize(("window", "dtype"), CASES)
def test_decode(window: int, dtype: str) -> None:
    """Pages below the window hold NaN, and some of their entries name other requests' pages."""
    q, paged = decode_inputs(window, dtype)
    want, want_lse = dense_decode(q, paged, SCALE, window)
    args, full = decode_args(q, paged), paged.lengths > 0
    for out, lse in (
        jax.jit(partial(decode_attention, window=window))(*args),
        reference.decode_attention(*args, scale=SCALE, window=window),
    ):
        assert_rows_close(out, want, dtype)
        assert_rows_close(np.asarray(lse)[full], want_lse[full], dtype)
        assert (np.asarray(lse)[~full] == -np.inf).all()


@pytest.mark.parametrize(("window", "dtype"), CASES)
def test_prefill(window: int, dtype: str) -> None:
    q, paged = prefill_inputs(window, dtype)
    want, args = dense_prefill(q, paged, STARTS, SCALE, window), prefill_args(q, paged)
    assert_rows_close(jax.jit(partial(prefill_attention, window=window))(*args), want, dtype)
    assert_rows_close(reference.prefill_attention(*args, scale=SCALE, window=window), want, dtype)


def test_windows_off_by_one_fail() -> None:
    """In both directions, in every dtype's tolerance: each row that the window cuts is far off."""
    window = 6
    q, paged = decode_inputs(window + 1)
    want = dense_decode(q, paged, SCALE, window)[0]
    cut = paged.lengths > window
    chunk, chunked = prefill_inputs(window + 1)
    rows = slice(0, CHUNKS[0])
    chunk_want = dense_prefill(chunk, chunked, STARTS, SCALE, window)[rows]
    for wrong in (window - 1, window + 1):
        out = jax.jit(partial(decode_attention, window=wrong))(*decode_args(q, paged))[0]
        assert row_errors(out, want)[cut].max(axis=1).min() > TOLERANCES["bfloat16"]
        out = jax.jit(partial(prefill_attention, window=wrong))(*prefill_args(chunk, chunked))[rows]
        assert row_errors(out, chunk_want).max(axis=1).min() > TOLERANCES["bfloat16"]


def test_chunked_equals_whole() -> None:
    """A prompt in chunks, the pages below each chunk's windows freed before it, gives what it gives in one piece."""
    window, rng = 10, np.random.default_rng(9)
    paged = make_paged(rng, [37], kv_heads=2, page_size=PAGE)
    q = random_queries(rng, 37, 4)
    run = jax.jit(partial(prefill_attention, window=window))
    want = dense_prefill(q, paged, [0, 37], SCALE, window)
    for start in range(0, 37, 11):
        stop = min(start + 11, 37)
        slid = slide(paged, [max(0, start + 1 - window)])
        rows = jnp.zeros_like(q).at[: stop - start].set(q[start:stop])
        _, *pages, table, _ = decode_args(q, slid)
        got = run(rows, *pages, table, *(jnp.array(x, jnp.int32) for x in ([0, stop - start], [stop])))
        assert_rows_close(got[: stop - start], want[start:stop], "float32")


def test_where_a_chunk_begins_does_not_matter() -> None:
    """Bitwise, as deterministic mode needs it after a prefix hit: blocks are the same wherever a tile's rows begin."""
    window, rng = 21, np.random.default_rng(9)
    paged = make_paged(rng, [70], kv_heads=2, page_size=PAGE)
    q = random_queries(rng, 40, 4)
    _, *pages, table, lengths = decode_args(q, paged)
    run = jax.jit(partial(prefill_attention, window=window))
    answers = []
    for first in (0, 4, 12, 28):
        rows = jnp.zeros_like(q).at[: 40 - first].set(q[first:])
        answers.append(
            run(rows, *pages, table, jnp.array([0, 40 - first], jnp.int32), lengths)[30 - first : 40 - first]
        )
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bitwise, though with a window rows begin with different pages."""
    q, paged = decode_inputs(21)
    run = jax.jit(partial(decode_attention, window=21))
    *args, lengths = decode_args(q, paged)
    alone = jnp.where(jnp.arange(len(LENGTHS)) == 4, lengths, 0)
    np.testing.assert_array_equal(run(*args, alone)[0][4], run(*args, lengths)[0][4])


def test_blocks_are_those_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a context of 20 blocks a window of one and a half takes three at most: counted as the loop runs them."""
    rng = np.random.default_rng(3)
    paged = make_paged(rng, [20 * BLOCK, 19 * BLOCK - 1], kv_heads=1, page_size=PAGE)
    q = random_queries(rng, 2, 1)
    trips, loop = [], jax.lax.fori_loop

    def counted(start: Any, stop: Any, body: Any, init: Any) -> Any:
        trips.append(int(stop) - int(start))
        return loop(start, stop, body, init)

    monkeypatch.setattr(paged_xla.lax, "fori_loop", counted)
    with jax.disable_jit():
        decode_attention(*decode_args(q, paged))
        decode_attention(*decode_args(q, paged), window=BLOCK + BLOCK // 2)
    assert trips[0] == 20
    assert trips[1] == 2


@pytest.mark.parametrize("backend", ["xla", "mosaic"])
@pytest.mark.parametrize("window", [0, -3])
def test_a_window_without_a_token_is_refused(window: int, backend: str) -> None:
    for inputs, args, call in (
        (decode_inputs, decode_args, decode_attention),
        (prefill_inputs, prefill_args, prefill_attention),
    ):
        with pytest.raises(ValueError, match=rf"^window: {window} must be at least 1, or None$"):
            call(*args(*inputs(4)), window=window, backend=backend)
