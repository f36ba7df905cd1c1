"""Tuning of the Mosaic kernels, per GPU: validated data, no measurement at run time. With it stands how long a call is
expected to take (`kernels_pallas.expected`), which the compiler's scheduler is told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kernels_pallas.expected import Expected

PAGE_TOKENS = 64
COMBINE_DIM = 64  # elements of a head that one program joins: wgmma's M, whose layout the partial results have
SHARED_MEMORY_OTHER = 25 * 1024  # queries, weights, a result, barriers, the reduction's scratch: 16 heads of 128
BLOCK_LIMIT = 232_448  # bytes of shared memory one thread block may have on Hopper


# None of these rates was measured with these kernels. They are what the benchmark is held against (bench/goals.py), and
# it prints each beside what it measures. An SM's own rate is assumed: one computing warpgroup, a step of two pages
# (64 KiB of bfloat16) in 1.6 us.
_SM_RATE = 40e9
_H200 = "target, not measured: {} of the 4.3 TB/s of a device copy"
_H100 = "target, not measured: {} of 3.0 TB/s, 0.9 of the data sheet's 3.35"


def _combine(copy: float) -> Expected:
    """What joins splits: its launch waits for them (1.5 us in a graph of kernels), then it waits for a length and for
    what that says to read, one after the other, and stores (1 us each). A program reads eight partial results of 64 x 8
    float32 in 0.4 us, and what it reads has been written. `copy`: bytes per second of a device copy."""
    source = f"target, not measured: launch and latencies counted, {copy / 1e12} TB/s of a device copy"
    return Expected(start_us=5.0, bytes_per_second=copy, sm_bytes_per_second=2 * _SM_RATE, source=source)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a kernel fills one GPU.

    sms       programs of the persistent grid, one per SM
    expected  how fast a call is; None: nobody knows, and the scheduler is told nothing
    """

    sms: int
    expected: Expected | None = None

    def __post_init__(self) -> None:
        self._at_least(1, "sms")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}: {value} must be at least {least}")

    def _within(self, name: str, low: int, high: int, more: str = "") -> None:
        if not low <= (value := getattr(self, name)) <= high:
            raise ValueError(f"{name}: {value} must be in [{low}, {high}]{more}")


@dataclass(frozen=True, kw_only=True)
class DecodeTuning(Tuning):
    """How decode attention fills one GPU; `expected` over pages of bfloat16.

    bytes_in_flight   K and V pages buffered per SM: what covers the memory's latency
    step_pages        pages of one step of the softmax, 1 or 2: a step's latency is nearly the same for either
    min_split_pages   a split of a row is not shorter than this
    max_split_pages   a row whose table is longer is split, whatever the batch: it would be the last to finish
    max_splits        bounds the partial results
    expected_fp8      as `expected`, over pages of fp8
    combine           how fast the kernel is that joins the splits, which decides whether they pay
    item_us           what an SM needs for a work item besides reading its pages: to start, to end the softmax. Assumed
    """

    bytes_in_flight: int = 128 * 1024
    step_pages: int = 2
    min_split_pages: int = 4
    max_split_pages: int = 128
    max_splits: int = 128
    expected_fp8: Expected | None = None
    combine: Expected = field(default_factory=lambda: _combine(3.0e12))
    item_us: float = 0.5

    def __post_init__(self) -> None:
        self._at_least(1, "sms", "min_split_pages", "max_split_pages", "max_splits")
        if self.step_pages not in (1, 2):
            raise ValueError(f"step_pages: {self.step_pages} must be 1 or 2")
        if self.max_split_pages < self.min_split_pages:
            raise ValueError(
                f"max_split_pages: {self.max_split_pages} must be at least min_split_pages, {self.min_split_pages}"
            )
        self._within("bytes_in_flight", 2 * self.step_pages * page_bytes(128), BLOCK_LIMIT - SHARED_MEMORY_OTHER)

    def stages(self, head_dim: int, itemsize: int = 2, other_bytes: int = 0) -> int:
        """Steps (K and V) in flight. `other_bytes`: of shared memory, for what fp8 pages become."""
        room = min(self.bytes_in_flight, BLOCK_LIMIT - SHARED_MEMORY_OTHER - other_bytes)
        return room // (self.step_pages * page_bytes(head_dim, itemsize))


@dataclass(frozen=True, kw_only=True)
class DecodeWork:
    """What splits of a call are chosen from: `items` (rows x KV heads) of up to `row_pages` pages, for `heads` query
    heads each (padded to 8 or 16), of `head_dim` elements of `itemsize` bytes."""

    items: int
    row_pages: int
    heads: int = 8
    head_dim: int = 128
    itemsize: int = 2

    @property
    def combines(self) -> int:
        """Programs that join splits: one has COMBINE_DIM elements of the heads of an item."""
        return self.items * (self.head_dim // COMBINE_DIM)


def page_bytes(head_dim: int, itemsize: int = 2) -> int:
    """K and V of one page and one KV head."""
    return 2 * PAGE_TOKENS * head_dim * itemsize


@dataclass(frozen=True, kw_only=True)
class AppendTuning(Tuning):
    """How KV append fills one GPU.

    block_bytes  rows of K, and as many of V, that one bulk load brings
    stages       blocks of K, and of V, in flight per SM
    """

    block_bytes: int = 16 * 1024
    stages: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(2, "stages")
        self._within("block_bytes", 128, (BLOCK_LIMIT - 1024) // (2 * self.stages), f" with {self.stages} stages")


@dataclass(frozen=True, kw_only=True)
class AddNormTuning(Tuning):
    """How the residual addition with its norm fills one GPU.

    bytes_in_flight  rows of x and of the update in shared memory, on their way in or out
    max_warpgroups   that take a program's rows in turn; several where each has room for three rows
    max_stages       rows of one warpgroup in shared memory
    """

    bytes_in_flight: int = 192 * 1024
    max_warpgroups: int = 4
    max_stages: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        self._within("max_warpgroups", 1, 8)
        self._within("max_stages", 2, 32 // self.max_warpgroups)  # Mosaic takes 32 barriers as one array
        self._within("bytes_in_flight", 2 * 2 * 2 * 16_384, BLOCK_LIMIT)  # two of the longest rows, x and update


@dataclass(frozen=True, kw_only=True)
class RowsTuning(Tuning):
    """How the rounding of rows to fp8 fills one GPU.

    max_group       rows of a program at once: they share what is read of the channels' scales
    max_warpgroups  that a group's columns are dealt to
    max_stages      chunks of one warpgroup in shared memory on their way in
    """

    max_group: int = 4
    max_warpgroups: int = 4
    max_stages: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._within("max_group", 1, 8)
        self._within("max_warpgroups", 1, 4)
        self._within("max_stages", 2, 32 // self.max_warpgroups)  # Mosaic takes 32 barriers as one array


PREFILL_STEP_PAGES = 2  # of one step of the softmax
PREFILL_OTHER = 98 * 1024  # two tiles of 128 queries and one of results, of head size 128, and barriers


@dataclass(frozen=True, kw_only=True)
class PrefillTuning(Tuning):
    """How prefill attention fills one GPU.

    bytes_in_flight  K and V pages buffered per SM
    ping_pong        the two computing warpgroups take turns to issue their products
    """

    bytes_in_flight: int = 128 * 1024
    ping_pong: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._within("bytes_in_flight", 2 * PREFILL_STEP_PAGES * page_bytes(128), BLOCK_LIMIT - PREFILL_OTHER)

    def stages(self, head_dim: int) -> int:
        """Steps (K and V) in flight."""
        return self.bytes_in_flight // (PREFILL_STEP_PAGES * page_bytes(head_dim))


@dataclass(frozen=True, kw_only=True)
class GroupedTuning(Tuning):
    """How grouped GEMMs, and the rows gathered for them, fill one GPU.

    block     columns of a tile of 128 rows at most, over all its products: those of both weights of a gate
    stages    steps of 64 inputs in shared memory at most
    """

    block: int = 256
    stages: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block not in (128, 192, 256):
            raise ValueError(f"block: {self.block} must be 128, 192 or 256")
        self._within("stages", 2, 8)


def _at_600(where: str, bytes_per_second: float) -> Expected:
    source = f"target, not measured: 600 TFLOP/s {where}"
    return Expected(flops_per_second=600e12, bytes_per_second=bytes_per_second, source=source)


def _of_copy(bytes_per_second: float, source: str, share: str, **more: float) -> Expected:
    return Expected(bytes_per_second=bytes_per_second, source=source.format(share), **more)


_FULL = {"h100": _of_copy(2.76e12, _H100, "92 %"), "h200": _of_copy(3.96e12, _H200, "92 %")}
_DECODE = {gpu: replace(full, sm_bytes_per_second=_SM_RATE) for gpu, full in _FULL.items()}

DECODE: dict[str, DecodeTuning] = {
    gpu: DecodeTuning(
        sms=132,
        bytes_in_flight=192 * 1024,
        expected=_DECODE[gpu],
        expected_fp8=_of_copy(fp8_rate, source, "81 %", sm_bytes_per_second=_SM_RATE),
        combine=_combine(copy),
    )
    for gpu, fp8_rate, source, copy in (("h100", 2.43e12, _H100, 3.0e12), ("h200", 3.5e12, _H200, 4.3e12))
}
APPEND: dict[str, AppendTuning] = {
    "h100": AppendTuning(sms=132, expected=_of_copy(2.3e12, _H100, "1 / 1.3")),
    "h200": AppendTuning(sms=132, expected=_of_copy(3.3e12, _H200, "1 / 1.3")),
}
ADD_NORM = {gpu: AddNormTuning(sms=132, expected=full) for gpu, full in _FULL.items()}
ROWS = {gpu: RowsTuning(sms=132, expected=full) for gpu, full in _FULL.items()}
PREFILL = {gpu: PrefillTuning(sms=132, expected=_at_600("at 8K", full.bytes_per_second)) for gpu, full in _FULL.items()}
GROUPED = {
    gpu: GroupedTuning(sms=132, expected=_at_600("in whole tiles", full.bytes_per_second))
    for gpu, full in _FULL.items()
}
DEFAULT_GPU = "h200"


def tuned_gpu(device_kind: str) -> str:
    """The tables' key for a GPU by the name that its driver gives it; the default's where it names none of them."""
    return next((key for key in DECODE if key in device_kind.lower()), DEFAULT_GPU)


def split_us(splits: int, work: DecodeWork, programs: int, tuning: DecodeTuning) -> float:
    """Counted microseconds of a call whose rows fill their tables, in so many splits.

    Programs take their items in rounds. A round ends when its bytes have come, at the rate of all SMs or of those that
    still have an item, each at its own; the last round may have few. Splits need a combine after that.
    """
    own = tuning.expected_fp8 if work.itemsize == 1 else tuning.expected
    rates = own or tuning.expected or _DECODE["h100"]  # of a GPU that no tuning knows, the lesser one's
    item_bytes = -(-work.row_pages // splits) * page_bytes(work.head_dim, work.itemsize)
    items = work.items * splits

    def round_us(busy: int) -> float:
        alone = item_bytes / rates.sm_bytes_per_second * 1e6 + tuning.item_us
        return max(alone, busy * item_bytes / rates.bytes_per_second * 1e6)

    rounds, rest = divmod(items, programs)
    us = rounds * round_us(programs) + (round_us(rest) if rest else 0.0)
    return us if splits == 1 else us + combine_us(splits, work, tuning)


def combine_us(splits: int, work: DecodeWork, tuning: DecodeTuning) -> float:
    """Counted microseconds of joining the splits: the partial results written and read, and the kernel that reads
    them."""
    moved = 2 * work.items * splits * work.heads * (work.head_dim + 1) * 4
    return tuning.combine.us(moved=moved, sms=min(tuning.sms, work.combines), all_sms=tuning.sms)


def choose_splits(work: DecodeWork, programs: int, tuning: DecodeTuning) -> int:
    """Splits of every row, from static shapes alone: the fewest of those with the least counted time, among the counts
    that keep a split within the tuning's bounds."""
    return min(
        allowed_splits(work.row_pages, tuning), key=lambda splits: (split_us(splits, work, programs, tuning), splits)
    )


def allowed_splits(row_pages: int, tuning: DecodeTuning) -> range:
    most = max(1, min(tuning.max_splits, row_pages // tuning.min_split_pages))
    least = min(most, -(-row_pages // tuning.max_split_pages))
    return range(least, most + 1)
