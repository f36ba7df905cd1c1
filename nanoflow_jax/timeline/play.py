"""Ops on streams, played in time: the one clock of the simulator, which makes the ops from a plan, and of the
inspector, which reads them from a compiled program.

Each stream runs one op at a time, in order. While several streams run, each op keeps only a part of its speed: the
compute stream's has the SMs that the others leave, a collective its own share. Attention on a lane was costed on its
own SMs, and keeps its speed. Ops bound by memory share its bandwidth. Copies to and from the host take no SMs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from nanoflow_jax.cost.latency import LatencyModel, Prediction
from nanoflow_jax.timeline.timeline import COMPUTE

LEAST_SHARE = 0.02  # of the SMs, for the compute stream
LEAST_SPEED = 1e-3


class Op(Protocol):
    """One kernel, collective or copy. name: for messages; stream: any name; needs: places in the list of ops, all
    before this one; share: of the SMs, that it takes from the compute stream; capped: it never uses more, and was
    costed so."""

    @property
    def name(self) -> str: ...

    @property
    def stream(self) -> str: ...

    @property
    def prediction(self) -> Prediction: ...

    @property
    def needs(self) -> tuple[int, ...]: ...

    @property
    def share(self) -> float: ...

    @property
    def capped(self) -> bool: ...


@dataclass(frozen=True)
class Run:
    """When an op ran, microseconds; alone_us: how long it would have taken with the GPU to itself."""

    start_us: float
    end_us: float
    alone_us: float


@dataclass(frozen=True)
class Played:
    """Runs of the ops, in the ops' order, and where the speeds of ops side by side come from."""

    runs: tuple[Run, ...]
    sources: frozenset[str]


def play(ops: Sequence[Op], model: LatencyModel) -> Played:
    """Raises ValueError when an op needs a later one."""
    queues: dict[str, list[int]] = {}
    for i, op in enumerate(ops):
        if any(need >= i for need in op.needs):
            raise ValueError(f"op {i} ({op.name}) needs op {max(op.needs)}, which is not before it")
        queues.setdefault(op.stream, []).append(i)
    streams = list(queues)
    heads = dict.fromkeys(streams, 0)
    left = [op.prediction.us for op in ops]
    start, end = [0.0] * len(ops), [-1.0] * len(ops)
    running: dict[str, int] = {}
    speeds = Speeds(model)
    now, done = 0.0, 0
    while done < len(ops):
        for stream in streams:
            queue, head = queues[stream], heads[stream]
            if stream not in running and head < len(queue):
                i = queue[head]
                if all(end[need] >= 0 for need in ops[i].needs):
                    running[stream] = i
                    start[i] = now
        speed = speeds.of(ops, running)
        step = min(left[i] / speed[stream] for stream, i in running.items())
        now += step
        for stream, i in list(running.items()):
            left[i] -= step * speed[stream]
            if left[i] <= 1e-9 * max(1.0, ops[i].prediction.us):
                end[i] = now
                heads[stream] += 1
                done += 1
                del running[stream]
    runs = tuple(Run(a, b, op.prediction.us) for a, b, op in zip(start, end, ops, strict=True))
    return Played(runs, frozenset(speeds.sources))


class Speeds:
    """Speeds of the ops that run at once, remembered by what they are."""

    def __init__(self, model: LatencyModel):
        self._model = model
        self.sources: set[str] = set()
        self._known: dict[tuple[_Kind, ...], dict[str, float]] = {}

    def of(self, ops: Sequence[Op], running: dict[str, int]) -> dict[str, float]:
        key = tuple(
            _Kind(stream, ops[i].prediction.bound, ops[i].share, ops[i].capped) for stream, i in running.items()
        )
        if key not in self._known:
            left = 1.0 - sum(one.share for one in key if one.stream != COMPUTE and one.bound != "host")
            kinds = [one._replace(share=max(LEAST_SHARE, left)) if one.stream == COMPUTE else one for one in key]
            self._known[key] = {one.stream: self._speed(one, [k for k in kinds if k != one]) for one in kinds}
        return self._known[key]

    def _speed(self, one: _Kind, others: Sequence[_Kind]) -> float:
        others = [other for other in others if other.bound != "host"]
        if not others or one.capped or one.bound == "host":
            return 1.0
        rates = [self._model.rate(one.bound, one.share, other.bound) for other in others]
        self.sources.update(rate.source for rate in rates)
        speed = min(rate.speed for rate in rates)
        if one.bound == "memory":
            speed = min(speed, self._bandwidth(one, [other for other in others if other.bound == "memory"]))
        return max(LEAST_SPEED, speed)

    def _bandwidth(self, one: _Kind, others: Sequence[_Kind]) -> float:
        """What is left of the memory's bandwidth, as a share of it: the curves say what an op of its kind takes of it
        beside a GEMM, and several cannot take more than all of it."""

        def wanted(kinds: Sequence[_Kind]) -> float:
            return sum(self._model.rate("memory", kind.share, "memory").speed for kind in kinds)

        kept = wanted([other for other in others if other.capped])
        own, rest = wanted([one]), wanted([other for other in others if not other.capped])
        return own * max(0.0, min(1.0, (1.0 - kept) / (own + rest)))


class _Kind(NamedTuple):
    """What an op's speed depends on, and that of those beside it."""

    stream: str
    bound: str
    share: float
    capped: bool
