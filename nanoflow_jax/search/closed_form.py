"""A layer in closed form: what each piece of a plan does to the time and to the streams, as a short sum.

Streams are first in, first out, and one collective is in flight at a time, so that what is under way on the network,
or on attention's lane, is a few numbers: how much work the stream has been given and has done, and by which of it each
job is done. A layer's time is then a sum over its steps instead of a simulation; the two agree exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nanoflow_jax.cost.latency import LatencyModel
from nanoflow_jax.plan.ops import APPEND, APPENDED, ATTENTION, OPS
from nanoflow_jax.timeline.jobs import COMPUTE, NETWORK, SIDE, Job
from nanoflow_jax.timeline.play import Speeds

RUN, START, START_SIDE, WAIT, WAIT_BEFORE, WAIT_ALL, WAIT_SIDE, WAIT_ALL_SIDE = range(8)
STEADY = 4  # layers until an order's repeat
NOTHING = 1e-9  # microseconds of work

Step = tuple[int, float, Any]  # kind, microseconds, and what the kind says
Rows = tuple[tuple[tuple[float, float, float], ...], ...]  # speeds by whether lane and network are busy
Order = tuple[str, ...]


class State(NamedTuple):
    """Microseconds: the time; work that the network has done and been given; attention's lane likewise; and by which
    work of its stream each job is done, of this layer and of the layer before."""

    now: float
    done: float
    given: float
    side_done: float
    side_given: float
    here: tuple[float, ...]
    before: tuple[float, ...]


@dataclass(frozen=True)
class Steps:
    """What each piece of a layer does, by its name, without the order that makes it a layer.

    of         (RUN, us, speeds), (START, us, slot) of its collective, (START_SIDE, us, slot) of attention on a lane,
               (WAIT, 0, slot) for a collective of this layer, (WAIT_BEFORE, 0, slot) for one of the layer before,
               (WAIT_ALL, 0, 0) for the one in flight, (WAIT_SIDE, 0, slot) for attention on a lane, (WAIT_ALL_SIDE,
               0, 0) for all of it
    appends    of KQV pieces: written by the first attention op that comes after
    slots      of jobs on other streams, in `State`; on_side: which of them are attention's
    idle       speeds while the compute stream waits
    least_loss microseconds that the compute stream loses at least for a microsecond of the network's work
    """

    of: dict[str, tuple[Step, ...]]
    appends: dict[str, tuple[Step, ...]]
    slots: dict[str, int]
    on_side: tuple[bool, ...]
    idle: Rows
    least_loss: float

    @staticmethod
    def read(jobs: Sequence[Job], model: LatencyModel) -> Steps:
        """From the jobs of a step of three layers or more, without `one_in_flight`; the second stands for all."""
        inner = [job for job in jobs if job.piece.layer == 1]
        elsewhere = [job for job in inner if job.stream != COMPUTE]
        slots = {_name(job): i for i, job in enumerate(elsewhere)}
        beside = {job.stream: job for job in elsewhere}
        speeds = Speeds(model)
        kinds = {job.prediction.bound: job for job in inner if job.stream == COMPUTE}
        rows = {kind: _rows(speeds, job, beside) for kind, job in kinds.items()}
        found: dict[str, list[Step]] = {}
        for job in inner:
            steps = found.setdefault(_name(job), [])
            for need in job.needs if job.piece.op != "KV.APPEND" else ():
                other = jobs[need]
                if other.stream == NETWORK:
                    steps.append((WAIT if other.piece.layer == 1 else WAIT_BEFORE, 0.0, slots[_name(other)]))
                elif other.stream == SIDE:
                    steps.append((WAIT_SIDE, 0.0, slots[_name(other)]))
            if job.stream == COMPUTE:
                steps.append((RUN, job.prediction.us, rows[job.prediction.bound]))
            elif job.stream == NETWORK:
                steps += [(WAIT_ALL, 0.0, 0), (START, job.prediction.us, slots[_name(job)])]
            else:
                steps.append((START_SIDE, job.prediction.us, slots[_name(job)]))
        done = {name: tuple(_merged(steps)) for name, steps in found.items()}
        # In the library, keys and values are written once attention in flight, which reads the same pages, is done.
        first: tuple[Step, ...] = ((WAIT_ALL_SIDE, 0.0, 0),) if SIDE in beside else ()
        appends = {n.replace(APPEND, APPENDED): first + done.pop(n) for n in list(done) if n.startswith(APPEND)}
        losses = [(alone[0] - other[0]) / other[1] for kind in rows.values() for alone, other in kind]
        return Steps(
            of=done,
            appends=appends,
            slots=slots,
            on_side=tuple(job.stream == SIDE for job in elsewhere),
            idle=_rows(speeds, None, beside),
            least_loss=max(0.0, min(losses, default=0.0)),  # standing still loses more
        )

    @property
    def start(self) -> State:
        """Nothing is under way."""
        nothing = (0.0,) * len(self.slots)
        return State(0.0, 0.0, 0.0, 0.0, 0.0, nothing, nothing)

    def advance(self, state: State, steps: Sequence[Step]) -> State:
        """The state after `steps`."""
        now, done, given, side_done, side_given, here, before = state
        for kind, us, what in steps:
            if kind == START:
                given += us
                here = (*here[:what], given, *here[what + 1 :])
            elif kind == START_SIDE:
                side_given += us
                here = (*here[:what], side_given, *here[what + 1 :])
            elif kind == RUN:
                left = us
                while True:
                    network, side = given - done, side_given - side_done
                    compute, sending, attending = what[side > NOTHING][network > NOTHING]
                    spent, last = left / compute, True
                    if network > NOTHING and network < sending * spent:
                        spent, last = network / sending, False
                    if side > NOTHING and side < attending * spent:
                        spent, last = side / attending, False
                    now += spent
                    if network > NOTHING:
                        done = given if sending * spent >= network - NOTHING else done + sending * spent
                    if side > NOTHING:
                        side_done = side_given if attending * spent >= side - NOTHING else side_done + attending * spent
                    if last:
                        break
                    left -= compute * spent
            else:
                on_side = kind >= WAIT_SIDE
                if kind == WAIT_ALL:
                    until = given
                elif kind == WAIT_ALL_SIDE:
                    until = side_given
                else:
                    until = before[what] if kind == WAIT_BEFORE else here[what]
                while until > (side_done if on_side else done) + NOTHING:
                    network, side = given - done, side_given - side_done
                    _, sending, attending = self.idle[side > NOTHING][network > NOTHING]
                    spent = (until - side_done) / attending if on_side else (until - done) / sending
                    if on_side and network > NOTHING:
                        spent = min(spent, network / sending)
                    elif not on_side and side > NOTHING:
                        spent = min(spent, side / attending)
                    now += spent
                    done = min(given, done + sending * spent)
                    side_done = min(side_given, side_done + attending * spent)
        return State(now, done, given, side_done, side_given, here, before)

    def listed(self, names: Sequence[str], unwritten: Order = ()) -> tuple[list[Step], Order]:
        """The steps of pieces in order, and the KQV pieces whose keys and values are not written after them."""
        steps: list[Step] = []
        for name in names:
            if OPS[name.rpartition(".")[0]].kind == ATTENTION:
                for other in unwritten:
                    steps += self.appends[other]
                unwritten = ()
            steps += self.of[name]
            if name in self.appends:
                unwritten = (*unwritten, name)
        return steps, unwritten

    def period(self, order: Sequence[str]) -> float:
        """Microseconds of a layer in the steady state."""
        steps, begin, state = self.listed(order)[0], 0.0, self.start
        for _ in range(STEADY):
            begin = state.now
            state = self.advance(state, steps)
            state = state._replace(here=self.start.here, before=state.here)
        return state.now - begin


def _name(job: Job) -> str:
    return f"{job.piece.op}.{job.piece.piece}"


def _merged(steps: list[Step]) -> Iterator[Step]:
    """Kernels of the same kind that follow one another become one."""
    last: Step | None = None
    for step in steps:
        if step[0] == RUN and last is not None and last[0] == RUN and last[2] is step[2]:
            last = (RUN, last[1] + step[1], step[2])
            continue
        if last is not None:
            yield last
        last = step
    if last is not None:
        yield last


def _rows(speeds: Speeds, compute: Job | None, beside: dict[str, Job]) -> Rows:
    def at_once(*streams: str) -> tuple[float, float, float]:
        jobs = [job for job in (compute, *(beside.get(stream) for stream in streams)) if job is not None]
        found = speeds.of(jobs, {job.stream: i for i, job in enumerate(jobs)})
        return found.get(COMPUTE, 1.0), found.get(NETWORK, 1.0), found.get(SIDE, 1.0)

    return (at_once(), at_once(NETWORK)), (at_once(SIDE), at_once(SIDE, NETWORK))
