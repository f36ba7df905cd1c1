"""A lower bound on the length of a layer, whatever the order: a linear program over what may run at once.

A layer has so much work on the compute stream, on the network and on attention's lane, by nano-batch and kind. At each
moment one of each stream runs, each at its speed beside the others. Within a nano-batch all of a collective's rows come
from the ops before it and go to those after it, so that a collective runs beside *other* nano-batches' ops only;
attention on a lane runs beside what does not need it, and no keys and values are written meanwhile. The least time in
which all work can be done so, any job cut anywhere, is below every timeline's: the bound is proven, for the latency
model that it is made with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog

from nanoflow_jax.plan.ops import APPEND, APPENDED, OPS
from nanoflow_jax.timeline.jobs import COMPUTE, NETWORK, SIDE, Job
from nanoflow_jax.timeline.play import Speeds


class Work(NamedTuple):
    """Jobs of one nano-batch that are alike. kind: see `Job`; late: after attention; writes: keys and values."""

    stream: str
    nano_batch: int
    kind: tuple[str, float, bool]
    late: bool
    writes: bool


def least_period(
    jobs: Sequence[Job], nano_batches: Mapping[tuple[str, int], int], speeds: Speeds, layer: int = 1
) -> float:
    """Microseconds that one layer of the steady state takes at least. jobs: of a step of three layers or more;
    nano_batches: of each (op, piece) of the plan."""
    amounts: dict[Work, float] = {}
    samples: dict[Work, Job] = {}
    for job in jobs:
        if job.piece.layer == layer and job.prediction.us:
            work = _work(job, nano_batches)
            amounts[work] = amounts.get(work, 0.0) + job.prediction.us
            samples[work] = job
    places = {work: i for i, work in enumerate(amounts)}
    columns = []
    for active in _at_once(list(amounts)):
        beside = [samples[work] for work in active]
        found = speeds.of(beside, {job.stream: i for i, job in enumerate(beside)})
        columns.append(np.zeros(len(places)))
        for work in active:
            columns[-1][places[work]] = found[work.stream]
    result = linprog(np.ones(len(columns)), A_eq=np.array(columns).T, b_eq=list(amounts.values()), method="highs")
    if not result.success:
        raise ValueError(f"bound: the linear program has no solution: {result.message}")
    return float(result.fun)


def _work(job: Job, nano_batches: Mapping[tuple[str, int], int]) -> Work:
    writes = job.piece.op == APPEND
    op = APPENDED if writes else job.piece.op
    batch = nano_batches[op, job.piece.piece]
    # What is done on a whole nano-batch needs all of its attention.
    late = job.stream == COMPUTE and not OPS[op].splittable
    return Work(job.stream, batch, (job.prediction.bound, job.share, job.capped), late, writes)


def _at_once(works: Sequence[Work]) -> Iterator[list[Work]]:
    """Sets that may run at the same time, one of a stream."""
    streams = [[None, *(work for work in works if work.stream == s)] for s in (COMPUTE, SIDE, NETWORK)]
    for compute, side, network in product(*streams):
        if network and any(other and other.nano_batch == network.nano_batch for other in (compute, side)):
            continue
        if compute and side and (compute.writes or (compute.late and compute.nano_batch == side.nano_batch)):
            continue
        if active := [work for work in (compute, side, network) if work]:
            yield active
