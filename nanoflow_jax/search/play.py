"""Jobs on streams, played in time.

Each stream runs one job at a time, in order. While several streams run, each job keeps only a part of its speed: the
compute stream's has the SMs that the others leave, a collective its own share. Attention on a lane was costed on its
own SMs, and keeps its speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow_jax.search.jobs import COMPUTE, STREAMS, Job
from nanoflow_jax.search.latency import LatencyModel

LEAST_SHARE = 0.02  # of the SMs, for the compute stream
LEAST_SPEED = 1e-3


@dataclass(frozen=True)
class Run:
    """When a job ran, microseconds; alone_us: how long it would have taken with the GPU to itself."""

    start_us: float
    end_us: float
    alone_us: float


@dataclass(frozen=True)
class Played:
    """Runs of the jobs, in the jobs' order, and where the speeds of jobs side by side come from."""

    runs: tuple[Run, ...]
    sources: frozenset[str]


def play(jobs: Sequence[Job], model: LatencyModel) -> Played:
    """Raises ValueError when a job needs a later one."""
    queues: dict[str, list[int]] = {stream: [] for stream in STREAMS}
    for i, job in enumerate(jobs):
        if any(need >= i for need in job.needs):
            raise ValueError(f"job {i} ({job.piece}) needs job {max(job.needs)}, which is not before it")
        queues[job.stream].append(i)
    streams = list(queues)
    heads = dict.fromkeys(streams, 0)
    left = [job.prediction.us for job in jobs]
    start, end = [0.0] * len(jobs), [-1.0] * len(jobs)
    running: dict[str, int] = {}
    speeds = _Speeds(model)
    now, done = 0.0, 0
    while done < len(jobs):
        for stream in streams:
            queue, head = queues[stream], heads[stream]
            if stream not in running and head < len(queue):
                i = queue[head]
                if all(end[need] >= 0 for need in jobs[i].needs):
                    running[stream] = i
                    start[i] = now
        speed = speeds.of(jobs, running)
        step = min(left[i] / speed[stream] for stream, i in running.items())
        now += step
        for stream, i in list(running.items()):
            left[i] -= step * speed[stream]
            if left[i] <= 1e-9 * max(1.0, jobs[i].prediction.us):
                end[i] = now
                heads[stream] += 1
                done += 1
                del running[stream]
    runs = tuple(Run(a, b, job.prediction.us) for a, b, job in zip(start, end, jobs, strict=True))
    return Played(runs, frozenset(speeds.sources))


class _Speeds:
    """Speeds of the jobs that run at once, remembered by what they are."""

    def __init__(self, model: LatencyModel):
        self._model = model
        self.sources: set[str] = set()
        self._known: dict[tuple[tuple[str, str, float, bool], ...], dict[str, float]] = {}

    def of(self, jobs: Sequence[Job], running: dict[str, int]) -> dict[str, float]:
        key = tuple((stream, jobs[i].prediction.bound, jobs[i].share, jobs[i].capped) for stream, i in running.items())
        if key not in self._known:
            self._known[key] = {one[0]: self._speed(one, [other for other in key if other != one]) for one in key}
        return self._known[key]

    def _speed(self, one: tuple[str, str, float, bool], others: Sequence[tuple[str, str, float, bool]]) -> float:
        stream, kind, share, capped = one
        if not others or capped:
            return 1.0
        if stream == COMPUTE:
            share = max(LEAST_SHARE, 1.0 - sum(other[2] for other in others))
        rates = [self._model.rate(kind, share, beside) for _, beside, _, _ in others]
        self.sources.update(rate.source for rate in rates)
        return max(LEAST_SPEED, min(rate.speed for rate in rates))
