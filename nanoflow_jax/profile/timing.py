"""Times of programs: medians of several runs, and the speeds that two kernels keep side by side."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nanoflow_jax.profile.points import Grid
from nanoflow_jax.profile.programs import Program

US = 1e6
RATIO = 3  # how much longer one side of a pair is than the other
OUTLASTS = 1.5  # times as long, at least
MOST_TIMES = 100_000  # of a program, in one run
MOST_CALLS = 256  # of one side of a pair
TAKING_TURNS = 0.999  # a pair with this much of both sides' time lost shares the device by turns


@dataclass(frozen=True)
class Timing:
    """Microseconds of one unit: the median of `runs` runs, and their range."""

    us: float
    low: float
    high: float
    runs: int


def time_programs(programs: Sequence[tuple[Program, int]], grid: Grid) -> list[Timing]:
    """Time of one of the (calls) in each run of each program, after a warm-up; a run lasts at least `grid.seconds`,
    about. Runs of the programs take turns, so that what slows the machine for a while slows all of them."""
    repeated = [_times_for(program, grid.seconds) for program, _ in programs]
    taken: list[list[float]] = [[] for _ in programs]
    for _ in range(grid.runs):
        for (program, calls), times, found in zip(programs, repeated, taken, strict=True):
            started = time.perf_counter()
            program.run(times)
            found.append((time.perf_counter() - started) * US / times / calls)
    return [Timing(statistics.median(t), min(t), max(t), grid.runs) for t in taken]


def _times_for(program: Program, seconds: float) -> int:
    """How often a program runs in so many seconds; warms it up."""
    program.run(1)
    started = time.perf_counter()
    program.run(1)
    times = max(1, min(MOST_TIMES, round(seconds / max(time.perf_counter() - started, 1e-7))))
    program.run(times)
    return times


@dataclass(frozen=True)
class PairTiming:
    """Two kernels at once. first_us, second_us: each alone, in this program. rounds: (calls of the first, calls of
    the second, microseconds), once with the first and once with the second much the longer. first_speed,
    second_speed: what each keeps of its speed alone while both run."""

    first_us: float
    second_us: float
    rounds: tuple[tuple[int, int, float], tuple[int, int, float]]
    first_speed: float
    second_speed: float


def time_pair(build: Callable[[int, int], Program], grid: Grid) -> PairTiming:
    """`build` as from `programs.pair`. Raises ValueError where no round is long enough for one side to outlast the
    other."""

    def program(a: int, b: int) -> tuple[Program, int]:
        made = build(a, b)
        return made, max(calls // max(n, 1) for calls, n in zip(made.calls, (a, b), strict=True))

    alone, rough = [program(1, 0), program(0, 1)], replace(grid, runs=3)
    first, second = (timing.us for timing in time_programs(alone, rough))
    (a, b), (c, d) = _calls(first, second), _calls(second, first)[::-1]
    if d > 1 and (us := time_programs([program(0, d)], rough)[0].us) < OUTLASTS * c * first:
        each = max(us - second, 1e-3 * second) / (d - 1)  # of more work; starting it takes time too
        d = 1 + math.ceil((RATIO * c * first - second) / each)
        if d > MOST_CALLS:
            raise ValueError(f"{d} times the work of the pair's second op would outlast the first, too much to time")
    seconds = sorted({b, d} - {1})  # alone, so many of them are not quite as many times as long
    timed = [*alone, program(a, b), program(c, d), *(program(0, n) for n in seconds)]
    first, second, us, them, *others = (timing.us for timing in time_programs(timed, grid))
    whole = {1: second, **dict(zip(seconds, others, strict=True))}
    lost = (us - a * first) / whole[b], (them - whole[d]) / (c * first)
    return PairTiming(first, second, ((a, b, us), (c, d, them)), *speeds(*lost))


def _calls(long: float, short: float) -> tuple[int, int]:
    """Calls of two kernels of so many microseconds, such that the first takes about RATIO times as long. Raises
    ValueError where that takes too many."""
    calls = (
        (max(1, round(RATIO * short / long)), 1) if RATIO * short >= long else (1, max(1, int(long / short / RATIO)))
    )
    if max(calls) > MOST_CALLS:
        raise ValueError(f"one op of the pair takes {short / long:.0f} times as long as the other: they say nothing")
    return calls


def speeds(lost_to_second: float, lost_to_first: float) -> tuple[float, float]:
    """What each of two kernels keeps of its speed alone, from two rounds in which one outlasts the other.

    lost_to_second: how much longer a round of the first takes because the second runs in it, in units of the second's
    time alone; lost_to_first likewise. While both run, the first keeps a share a of its speed and the second b. A
    second of work s needs s / b, in which the first falls behind by (1 - a) s / b: so lost_to_second = (1 - a) / b, and
    lost_to_first = (1 - b) / a. From these a and b follow, both in [0, 1]. Kernels that take turns lose all of the
    other's time, and each keeps a half.
    """
    y, x = (min(1.0, max(0.0, lost)) for lost in (lost_to_second, lost_to_first))
    if x * y > TAKING_TURNS:
        return 0.5, 0.5
    return (1 - y) / (1 - x * y), (1 - x) / (1 - x * y)
