"""A lower bound on the length of a layer, whatever the order: a linear program over what may run at once.

A layer has so much work on the compute stream, by kind, on the network, and on the attention lane. At each moment a
set of them runs, each at its speed beside the others. The least time in which all work can be done, with no dependency
and any job cut anywhere, is below every timeline's: the bound is proven, for the latency model that it is made with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy.optimize import linprog

from nanoflow_jax.search.jobs import COMPUTE, NETWORK, SIDE, Job
from nanoflow_jax.search.latency import LatencyModel
from nanoflow_jax.search.play import Speeds


def least_period(jobs: Sequence[Job], model: LatencyModel, layer: int = 1) -> float:
    """Microseconds that one layer of the steady state takes at least. jobs: of a step of three layers or more."""
    work: defaultdict[str, dict[tuple[str, float, bool], float]] = defaultdict(lambda: defaultdict(float))
    sample: dict[tuple[str, tuple[str, float, bool]], Job] = {}
    for job in jobs:
        if job.piece.layer == layer and job.prediction.us:
            kind = (job.prediction.bound, job.share, job.capped)
            work[job.stream][kind] += job.prediction.us
            sample[job.stream, kind] = job
    speeds = Speeds(model)
    rows = [(stream, kind) for stream, kinds in work.items() for kind in kinds]
    columns = []
    for choice in product(*([None, *work.get(stream, {})] for stream in (COMPUTE, SIDE, NETWORK))):
        active = [(s, kind) for s, kind in zip((COMPUTE, SIDE, NETWORK), choice, strict=True) if kind is not None]
        if not active:
            continue
        beside = [sample[key] for key in active]
        found = speeds.of(beside, {job.stream: i for i, job in enumerate(beside)})
        columns.append([found[row[0]] if row in active else 0.0 for row in rows])
    needed = [work[stream][kind] for stream, kind in rows]
    result = linprog(np.ones(len(columns)), A_eq=np.array(columns).T, b_eq=needed, method="highs")
    if not result.success:
        raise ValueError(f"bound: the linear program has no solution: {result.message}")
    return float(result.fun)
