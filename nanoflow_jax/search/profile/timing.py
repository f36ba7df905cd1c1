"""Times of programs: medians of several runs, and the speeds that two kernels keep side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from nanoflow_jax.search.profile.points import Grid
from nanoflow_jax.search.profile.programs import Program

US = 1e6
RATIO = 3  # how much longer one side of a pair is than the other
MOST_CALLS = 256  # of one side of a pair
TAKING_TURNS = 0.999  # a pair with this much of both sides' time lost shares the device by turns


@dataclass(frozen=True)
class Timing:
    """Microseconds of one unit: the median of `runs` runs, and their range."""

    us: float
    low: float
    high: float
    runs: int


def time_program(program: Program, grid: Grid, calls: int) -> Timing:
    """Time of one of the `calls` calls in each run of the program, after a warm-up; each run takes at least
    `grid.seconds`, about."""
    program.run(1)
    started = time.perf_counter()
    program.run(1)
    times = max(1, min(100_000, round(grid.seconds / max(time.perf_counter() - started, 1e-7))))
    program.run(times)
    taken = []
    for _ in range(grid.runs):
        started = time.perf_counter()
        program.run(times)
        taken.append((time.perf_counter() - started) * US / times / calls)
    return Timing(statistics.median(taken), min(taken), max(taken), grid.runs)


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
    """`build` as from `programs.pair`."""

    def measure(a: int, b: int) -> float:
        program = build(a, b)
        per_round = max(calls // max(n, 1) for calls, n in zip(program.calls, (a, b), strict=True))
        return time_program(program, grid, per_round).us

    first, second = measure(1, 0), measure(0, 1)
    outlasting = _calls(first, second), _calls(second, first)[::-1]
    rounds = tuple((a, b, measure(a, b)) for a, b in outlasting)
    (a, b, us), (c, d, them) = rounds
    lost = (us - a * first) / (b * second), (them - d * second) / (c * first)
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
