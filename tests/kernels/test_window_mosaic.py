"""Sliding windows, Mosaic: under the interpreter against the float32 definition, and compiled for Hopper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import decode_attention, decode_plan, prefill_attention, prefill_attention_mosaic
from kernels_pallas.bench.cases import RANK_70B, DecodeCase
from kernels_pallas.decode_plan import expected_us, make_plan
from kernels_pallas.prefill_tiles import (
    BEGIN,
    END,
    KEYS,
    LENGTH,
    PAGE,
    PAGE_SIZE,
    SEGMENT,
    SHIFT,
    STEP,
    Plan,
    list_tiles,
)
from kernels_pallas.tuning import DECODE, PREFILL, DecodeTuning, PrefillTuning
from tests.kernels.compiled import compiled_report, launched
from tests.kernels.paged import Paged, dense_decode, dense_prefill, make_paged, random_queries, slide
from tests.kernels.test_fp8 import make_fp8
from tests.tolerances import row_errors

# Two programs take more items than they have, and slots of the pipeline are used again.
SMALL = DecodeTuning(sms=2, bytes_in_flight=128 * 1024, min_split_pages=1, max_split_pages=64)
SPLIT = replace(SMALL, max_split_pages=1)
LIMIT = 5e-3  # of a row, relative to its norm: two roundings to bf16, of the weights and of the result
LENGTHS = (65, 0, 1, 64, 330, 130)


@pytest.fixture(autouse=True)
def _no_races(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "RACE" not in capfd.readouterr().out


def decode(q: jax.Array, paged: Paged, window: int, tuning: DecodeTuning, **more: Any) -> tuple[np.ndarray, np.ndarray]:
    options = {"window": window, "backend": "mosaic", "tuning": tuning}
    call = partial(decode_attention, **options, interpret=plgpu.InterpretGPUParams(detect_races=True))
    args = q, paged.k_pages, paged.v_pages, jnp.asarray(paged.page_table), jnp.asarray(paged.lengths)
    out, lse = jax.jit(call)(*args, **more)
    return np.asarray(out), np.asarray(lse)


@pytest.mark.parametrize(
    ("window", "fp8", "repeats", "kv_heads", "head_dim", "tuning"),
    [
        (1, False, 8, 1, 64, SMALL),
        (64, False, 4, 2, 128, replace(SMALL, step_pages=1)),
        (130, False, 2, 1, 64, SPLIT),
        (100, True, 4, 2, 64, SMALL),
        (200, True, 8, 1, 128, SPLIT),
    ],
)
def test_decode(window: int, fp8: bool, repeats: int, kv_heads: int, head_dim: int, tuning: DecodeTuning) -> None:
    """Windows of one token, a page, no whole number of pages, more than any context; splits, more of them than some
    rows have pages in their windows. Pages below hold NaN: read and masked, V's would be in every row."""
    rng = np.random.default_rng(window)
    lows = [max(0, n - window) for n in LENGTHS]
    more = {}
    if fp8:
        made = make_fp8(rng, LENGTHS, kv_heads, PAGE_SIZE, head_dim)
        paged = replace(made.exact, k_pages=made.pages[0], v_pages=made.pages[1])
        more = dict(zip(("k_scale", "v_scale"), made.scales, strict=True))
    else:
        paged = make_paged(rng, LENGTHS, kv_heads=kv_heads, page_size=PAGE_SIZE, head_dim=head_dim, dtype="bfloat16")
    paged = slide(paged, lows)
    q = random_queries(rng, len(LENGTHS), repeats * kv_heads, head_dim, "bfloat16")
    plan = make_plan(q, paged.k_pages, jnp.asarray(paged.page_table), 1.0, tuning, None, window)
    assert (plan.splits > 1) == (tuning is SPLIT)
    out, lse = decode(q, paged, window, tuning, **more)
    want, want_lse = dense_decode(q, paged, head_dim**-0.5, window)
    assert row_errors(out, want).max() < LIMIT
    full = paged.lengths > 0
    np.testing.assert_allclose(lse[full], want_lse[full], atol=1e-5, rtol=0)
    assert (lse[~full] == -np.inf).all()
    assert (out[~full].astype(np.float32) == 0).all()
    # What a window off by one would give is far outside.
    for wrong in (window - 1, window + 1):
        cut = paged.lengths > min(wrong, window)
        if wrong:
            errors = row_errors(out, dense_decode(q, paged, head_dim**-0.5, wrong)[0])[cut].max(axis=1)
            assert errors.min() > LIMIT, (wrong, errors)


def test_pages_that_are_read_and_masked_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin that begins with a row's first page: NaN below the window reaches every row that has some."""
    monkeypatch.setattr(decode_plan.Plan, "first_page", lambda plan, length: 0)
    rng = np.random.default_rng(5)
    paged = make_paged(rng, LENGTHS, kv_heads=1, page_size=PAGE_SIZE, head_dim=64, dtype="bfloat16")
    paged = slide(paged, [max(0, n - 70) // PAGE_SIZE * PAGE_SIZE for n in LENGTHS])
    out, _ = decode(random_queries(rng, len(LENGTHS), 8, 64, "bfloat16"), paged, 70, SMALL)
    below = paged.lengths - 70 >= PAGE_SIZE
    assert below.any()
    assert np.isnan(out[below].astype(np.float32)).all()


def test_the_plan_counts_the_pages_of_windows() -> None:
    """Those that hold a token of the window, wherever it begins; splits are cut over no more."""
    pool = jax.ShapeDtypeStruct((9, 1, PAGE_SIZE, 128), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((1, 8, 128), jnp.bfloat16)
    lengths = np.arange(1, 20 * PAGE_SIZE)

    def plan_of(pages: int, window: int | None) -> Any:
        table: Any = jax.ShapeDtypeStruct((1, pages), jnp.int32)
        return make_plan(q, pool, table, 1.0, DECODE["h200"], None, window)  # pyright: ignore[reportArgumentType]

    for window in (1, 2, 64, 65, 66, 128, 130, 1000, 5000):
        plan = plan_of(20, window)
        first = np.maximum(lengths - window, 0) // PAGE_SIZE
        np.testing.assert_array_equal(plan.first_page(jnp.asarray(lengths)), first)
        pages = (lengths - 1) // PAGE_SIZE - first + 1
        np.testing.assert_array_equal(plan.pages(jnp.asarray(lengths)), pages)
        assert plan.work.row_pages == pages.max()
        assert plan.splits == plan_of(int(pages.max()), None).splits
    assert plan_of(512, None).splits > plan_of(512, 4096).splits > plan_of(512, 128).splits == 1


def test_expected_time_is_of_the_window() -> None:
    table: Any = jax.ShapeDtypeStruct((320, 64), jnp.int32)
    q, pool = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((320, 8, 128), (9, 1, PAGE_SIZE, 128)))
    tuning = DECODE["h200"]
    whole, some = (make_plan(q, pool, table, 1.0, tuning, None, window) for window in (None, 1024))  # pyright: ignore
    assert expected_us(some, 4096, tuning) == expected_us(whole, 1024, tuning)
    assert expected_us(some, 500, tuning) == expected_us(whole, 500, tuning)


@pytest.mark.aot
@pytest.mark.parametrize(("fp8", "rows"), [(False, 1280), (True, 1)])
def test_decode_compiles_for_hopper(
    fp8: bool, rows: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Within the registers that it has without a window, nothing spilled; one row of 8K in a window of 4K is split."""
    case = DecodeCase(model=RANK_70B, rows=rows, context=8192, fp8=fp8)
    # Another pool than elsewhere: a kernel compiled before would be taken from a cache, without a report.
    q, *rest = case.avals(3011 + fp8)

    def attend(q: Any, k: Any, v: Any, table: Any, lengths: Any, *scales: Any) -> Any:
        named = dict(zip(("k_scale", "v_scale"), scales, strict=True)) if fp8 else {}
        options = {"window": 4096, "backend": "mosaic", "tuning": DECODE["h200"]}
        return decode_attention(q, k, v, table, lengths, **named, **options)

    program, registers = compiled_report(attend, [q, *rest], monkeypatch, capfd)
    joins = ["decode_combine"] * (rows == 1)
    assert launched(program) == ["fusion"] * fp8 + ["decode_attention", *joins]
    assert len(registers) == 1 + len(joins)
    assert registers[0] <= 65536 // (384 if fp8 else 256)


# A chunk over two tiles across the edge of small windows, none, a whole prompt, and one row far into its context.
CHUNKS, CONTEXTS, PADDING = (18, 0, 7, 1), (470, 0, 7, 330), 5
STARTS = [0, *np.cumsum(CHUNKS).tolist()]
PREFILL_SMALL = PrefillTuning(sms=2)


def prefill_inputs(window: int, repeats: int, head_dim: int) -> tuple[jax.Array, Paged]:
    """Freed pages hold NaN."""
    rng = np.random.default_rng(window)
    paged = make_paged(rng, CONTEXTS, kv_heads=1, page_size=PAGE_SIZE, head_dim=head_dim, dtype="bfloat16")
    q = random_queries(rng, STARTS[-1] + PADDING, repeats, head_dim, "bfloat16")
    return q, slide(paged, [max(0, n - c + 1 - window) for n, c in zip(CONTEXTS, CHUNKS, strict=True)])


def prefill(q: jax.Array, paged: Paged, window: int, starts: Sequence[int] = STARTS) -> np.ndarray:
    options = {"window": window, "backend": "mosaic", "tuning": PREFILL_SMALL}
    call = partial(prefill_attention, **options, interpret=plgpu.InterpretGPUParams(detect_races=True))
    integers = (jnp.asarray(x, jnp.int32) for x in (paged.page_table, starts, paged.lengths))
    return np.asarray(jax.jit(call)(q, paged.k_pages, paged.v_pages, *integers))


@pytest.mark.parametrize(("window", "repeats", "head_dim"), [(1, 8, 64), (325, 8, 128), (70, 4, 64), (64, 3, 64)])
def test_prefill(window: int, repeats: int, head_dim: int) -> None:
    """Windows of one token, of three steps (from the first row of a page on), within a step, of a page; tiles of 16 on.
    What a window off by one would give is far outside, in each row that it cuts."""
    q, paged = prefill_inputs(window, repeats, head_dim)
    out = prefill(q, paged, window)
    want = dense_prefill(q, paged, STARTS, head_dim**-0.5, window)
    assert row_errors(out, want).max() < LIMIT
    assert (out[STARTS[-1] :].astype(np.float32) == 0).all()
    cut = [*range(CHUNKS[0]), STARTS[-1] - 1]
    for wrong in (window - 1, window + 1):
        if wrong:
            errors = row_errors(out, dense_prefill(q, paged, STARTS, head_dim**-0.5, wrong))[cut].max(axis=1)
            assert errors.min() > LIMIT, (wrong, errors)


def test_prefill_pages_that_are_read_and_masked_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin whose tiles begin with their segment's first page, though masks are right."""

    def from_the_first(plan: Plan, *arguments: jax.Array) -> jax.Array:
        tiles = list_tiles(replace(plan, window=None), *arguments)
        return jnp.pad(tiles, ((0, 0), (0, 1)))

    monkeypatch.setattr(prefill_attention_mosaic, "list_tiles", from_the_first)
    q, paged = prefill_inputs(70, 8, 64)
    out = prefill(q, paged, 70).astype(np.float32)
    assert np.isnan(out[: CHUNKS[0]]).all()
    assert np.isfinite(out[CHUNKS[0] : CHUNKS[0] + CHUNKS[2]]).all()


@pytest.mark.parametrize("repeats", [8, 4, 1])
def test_tiles_begin_with_the_step_of_their_first_key(repeats: int) -> None:
    """Of any packing: a tile reads all that its tokens see, and its first step is one that its first token sees."""
    rng = np.random.default_rng(repeats)
    static = {"row_pages": 512, "head_dim": 128, "stages": 2, "sms": 132, "scale": 1.0, "ping_pong": True}
    for window in (1, 64, 130, 700):
        plan = Plan(tokens=256, q_heads=repeats, kv_heads=1, segments=4, window=window, **static)
        tiles_of = jax.jit(partial(list_tiles, plan))
        for _ in range(10):
            starts = np.concatenate([[0], np.sort(rng.integers(0, 257, 4))]).astype(np.int32)
            counts = np.diff(starts)
            lengths = np.where(counts > 0, counts + rng.integers(0, 900, 4), 0).astype(np.int32)
            tiles = np.asarray(tiles_of(jnp.asarray(starts), jnp.asarray(lengths)))
            assert (np.diff(-(-tiles[:, KEYS] // STEP)) <= 0).all()
            for tile in tiles[tiles[:, KEYS] > 0]:
                segment, begin, end = tile[SEGMENT], tile[BEGIN], tile[END]
                shift = lengths[segment] - starts[segment + 1]  # from a token to its position
                assert tile[PAGE] == max(0, begin + shift - window + 1) // PAGE_SIZE
                before = tile[PAGE] // 2 * STEP
                assert tile[KEYS] == end + shift - before
                assert tile[LENGTH] == lengths[segment] - before
                assert tile[SHIFT] == shift - before
            answered = sum(tile[END] - tile[BEGIN] for tile in tiles[tiles[:, KEYS] > 0])
            assert answered == starts[-1]


@pytest.mark.aot
def test_prefill_compiles_for_hopper(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """One kernel after the list of tiles, its products asynchronous, within its registers."""
    pool = jax.ShapeDtypeStruct((3012, 1, PAGE_SIZE, 128), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((768, 8, 128), jnp.bfloat16)
    integers = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((12, 130), (13,), (12,)))
    attend = partial(prefill_attention, window=4096, backend="mosaic", tuning=PREFILL["h200"])
    program, (registers,) = compiled_report(attend, [q, pool, pool, *integers], monkeypatch, capfd)
    assert launched(program).count("prefill_attention") == 1
    assert registers <= 65536 // 384


def test_prefill_does_not_depend_on_where_a_chunk_begins() -> None:
    """Bitwise, as deterministic mode needs it after a prefix hit: the same last rows in a chunk that begins elsewhere,
    whose first key is in another page."""
    window, rng = 84, np.random.default_rng(11)
    paged = make_paged(rng, (470, 470), kv_heads=1, page_size=PAGE_SIZE, head_dim=64, dtype="bfloat16")
    table = np.stack([paged.page_table[0]] * 2)
    q = random_queries(rng, 18, 8, 64, "bfloat16")
    out = prefill(jnp.concatenate([q, q[-5:]]), replace(paged, page_table=table), window, [0, 18, 23])
    assert len({(468 - window + 1) // PAGE_SIZE, (465 - window + 1) // PAGE_SIZE}) == 2
    np.testing.assert_array_equal(out[13:18], out[18:])
