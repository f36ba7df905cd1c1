"""How many splits a decode call gets: the fewest with the least counted time, the kernel that joins them included."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kernels_pallas.expected import Expected
from kernels_pallas.tuning import DECODE, DecodeTuning, DecodeWork, allowed_splits, choose_splits, split_us


def work(items: int, pages: int, *, fp8: bool = False, heads: int = 8) -> DecodeWork:
    return DecodeWork(items=items, row_pages=pages, heads=heads, itemsize=1 if fp8 else 2)


# 132 SMs of 40 GB/s. Bytes of a page: 32 KiB (bf16). On an H200 (3.96 TB/s) a round of all SMs takes 1.09 us a page, on
# an H100 (2.76 TB/s) 1.57; alone an SM takes 0.82. A combine takes 5 us and more.
TABLE = [
    # Two full rounds and one of 56 rows: 48.6 us on an H200. In two, 42.4 us, and a combine of 6.3: nothing is won.
    ("h200", work(320, 16), 1),
    # 63.8 us; in two 60.8 and a combine of 6.7.
    ("h100", work(320, 16), 1),
    # One round of 132 and one of 8, which takes 13.6 us for 8 rows: in four, 560 items are four rounds of 4.4 us and
    # one of 3.8, in all 21 instead of 31, and a combine of 6.
    ("h200", work(140, 16), 4),
    # Ten rounds: nothing left to fill.
    ("h200", work(1280, 16), 1),
    ("h100", work(1280, 16), 1),
    ("h200", work(1280, 16, fp8=True), 1),
    # 128 of 132 SMs have a row each: 13.6 us at 40 GB/s, 16.9 at the rate of all.
    ("h200", work(128, 16), 1),
    # A quarter of the SMs have a row, of 52.9 us; in four 128 have one, 17 us and a combine of 5.5.
    ("h200", work(32, 64), 4),
    ("h200", work(256, 64), 1),
    # Shorter than two splits may be.
    ("h200", work(1, 4), 1),
    # 7.1 us for one SM: a combine alone takes most of that.
    ("h200", work(1, 8), 1),
    ("h200", work(1, 16), 4),
]


@pytest.mark.parametrize(("gpu", "shape", "splits"), TABLE)
def test_table(gpu: str, shape: DecodeWork, splits: int) -> None:
    tuning = DECODE[gpu]
    assert choose_splits(shape, tuning.sms, tuning) == splits


@pytest.mark.parametrize("gpu", ["h100", "h200"])
@pytest.mark.parametrize("fp8", [False, True])
def test_one_long_row_fills_the_gpu(gpu: str, fp8: bool) -> None:
    """32K of one row: half of the SMs at least read it, but not in the shortest splits, which one combine joins."""
    tuning = DECODE[gpu]
    assert 60 <= choose_splits(work(1, 512, fp8=fp8), tuning.sms, tuning) < 128


def by_hand(splits: int, shape: DecodeWork, programs: int, tuning: DecodeTuning) -> float:
    """Seconds: every round of every program walked through."""
    rates = tuning.expected_fp8 if shape.itemsize == 1 else tuning.expected
    assert rates is not None
    pages = [min(shape.row_pages, (s + 1) * -(-shape.row_pages // splits)) for s in range(splits)]
    longest = max(b - a for a, b in zip([0, *pages], pages, strict=False))
    size = longest * 2 * 64 * shape.head_dim * shape.itemsize
    left, seconds = shape.items * splits, 0.0
    while left:
        busy = min(left, programs)
        seconds += max(busy * size / rates.bytes_per_second, size / rates.sm_bytes_per_second + tuning.item_us * 1e-6)
        left -= busy
    if splits > 1:
        joined = 2 * shape.items * splits * shape.heads * (shape.head_dim + 1) * 4  # written and read
        sms = min(shape.items * shape.head_dim // 64, tuning.sms)
        rate = min(tuning.combine.bytes_per_second, sms * tuning.combine.sm_bytes_per_second)
        seconds += tuning.combine.start_us * 1e-6 + joined / rate
    return seconds


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_nothing_allowed_is_faster(gpu: str) -> None:
    """Over batches, tables, pages of both dtypes and budgets of SMs: the least time, of equals the fewest splits."""
    tuning = DECODE[gpu]
    for items in (1, 3, 8, 33, 132, 140, 320, 1280):
        for pages in (1, 8, 16, 63, 512):
            for fp8, heads, programs in ((False, 8, 132), (True, 16, 132), (False, 8, 24)):
                shape = work(items, pages, fp8=fp8, heads=heads)
                chosen = choose_splits(shape, programs, tuning)
                times = {n: by_hand(n, shape, programs, tuning) for n in allowed_splits(pages, tuning)}
                assert chosen == min(times, key=lambda n: (round(times[n], 12), n)), (items, pages, fp8, programs)


def test_bounds_are_kept() -> None:
    """A split has at least min_split_pages and at most max_split_pages, unless max_splits forbids that."""
    tuning = DECODE["h200"]
    assert list(allowed_splits(3, tuning)) == [1]
    assert list(allowed_splits(16, tuning)) == [1, 2, 3, 4]
    assert allowed_splits(512, tuning)[0] == 4
    assert allowed_splits(512, tuning)[-1] == 128
    assert list(allowed_splits(10**6, tuning)) == [128]


def test_what_a_combine_costs_decides() -> None:
    """Were a launch free, 320 rows would be split; were it as dear as three or four kernels, 140 rows would not."""
    tuning = DECODE["h200"]
    rate = tuning.combine.bytes_per_second
    free, dear = (
        replace(tuning, combine=Expected(source="a test", start_us=us, bytes_per_second=rate)) for us in (0.0, 15.0)
    )
    assert choose_splits(work(320, 16), 132, free) == 2
    assert choose_splits(work(140, 16), 132, dear) == 1


def test_a_gpu_without_rates_is_counted_by_those_of_an_h100() -> None:
    unknown = replace(DECODE["h100"], expected=None, expected_fp8=None)
    for shape in (work(320, 16), work(32, 64), work(1, 512)):
        assert split_us(2, shape, 132, unknown) == split_us(2, shape, 132, DECODE["h100"])
