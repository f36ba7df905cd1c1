"""A plan and a latency model → a predicted timeline of one step, and the step's throughput.

A few layers are simulated. The inner ones repeat, so that their period stands for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.schedule.plan import SchedulePlan, row_quantum
from nanoflow_jax.search.jobs import COMPUTE, NETWORK, Job, Shares, build_jobs
from nanoflow_jax.search.latency import LatencyModel, optimal_tokens_per_second
from nanoflow_jax.search.load import StepLoad
from nanoflow_jax.search.play import Played, Run, play
from nanoflow_jax.search.shapes import OpCosts, Shapes
from nanoflow_jax.search.timeline import Collective, Event, Timeline
from nanoflow_jax.search.totals import Totals, add_up

LAYERS = 6  # enough for two inner ones that neither end of the step touches
ATTENTION_SHARE = 0.4  # of the SMs, for decode attention on NanoFlow's memory lane where the plan does not say
HEAVY = ("gemm", "attention")


@dataclass(frozen=True)
class InnerLayer:
    """One of the layers that repeat, in microseconds. us: its length; compute, memory, network: of its ops as if each
    had the GPU to itself; exposed_network_us: compute stood still for the network; bubble_us: for another reason;
    interference_us: what ops on the compute stream lost to those beside them."""

    us: float
    compute_us: float
    memory_us: float
    network_us: float
    exposed_network_us: float
    bubble_us: float
    interference_us: float

    @property
    def bound_by(self) -> str:
        """The resource that is busy longest."""
        busy = {"compute": self.compute_us, "memory": self.memory_us, "network": self.network_us}
        return max(busy, key=lambda name: busy[name])


@dataclass(frozen=True)
class Simulation:
    """One step of a plan. timeline: of the layers simulated; us: of the whole step, all the model's layers.

    collectives, hardware, devices and totals are what the inspector's report has too, so that both are drawn and traced
    alike.
    """

    plan: SchedulePlan
    load: StepLoad
    hardware: str
    devices: int
    runtime: str
    layers: int
    us: float
    inner: InnerLayer
    timeline: Timeline
    totals: Totals
    sources: tuple[str, ...]
    tokens_per_second_per_gpu: float

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return self.timeline.collectives

    @property
    def nano_batches(self) -> dict[tuple[str, int], int]:
        """The nano-batch of each (op, piece)."""
        pieces = self.plan.pieces(self.load.decode_rows, self.load.prefill_rows, row_quantum(self.devices))
        return {(piece.op, piece.piece): piece.nano_batch for piece in pieces}


def simulate_step(
    plan: SchedulePlan,
    config: ModelConfig,
    model: LatencyModel,
    devices: int,
    load: StepLoad,
    *,
    runtime: str = "library",
    shares: Shares | None = None,
    layers: int = LAYERS,
) -> Simulation:
    """layers: how many are simulated (at least 4, or all); runtime, shares: see `jobs`. Raises ConfigError."""
    layers = min(config.num_layers, layers)
    if layers < min(config.num_layers, 4):
        raise ConfigError(f"layers: {layers} is not accepted; a steady state needs at least 4")
    hardware = model.hardware
    shares = shares or Shares(hardware.calibration.network_share, ATTENTION_SHARE)
    jobs = build_jobs(plan, OpCosts(model, Shapes.of(config, devices), load), layers, shares, runtime)
    played = play(jobs, model)
    exposed, bubbles = _waits(jobs, played.runs)
    inner = _inner(jobs, played.runs, exposed, bubbles, layers)
    simulated_us = max(run.end_us for run in played.runs)
    us = simulated_us + (config.num_layers - layers) * inner.us
    rate = load.rows / (us * 1e-6) / devices
    timeline = _timeline(jobs, played, exposed, sum(bubbles.values()), simulated_us)
    totals = add_up(timeline, hardware, devices, None, None)
    totals = replace(
        totals,
        tokens_per_second_per_gpu=rate,
        share_of_optimum=rate / optimal_tokens_per_second(hardware, config.num_params, calibrated=True),
    )
    sources = sorted({job.prediction.source for job in jobs} | played.sources)
    return Simulation(
        plan, load, hardware.name, devices, runtime, layers, us, inner, timeline, totals, tuple(sources), rate
    )


def _waits(jobs: Sequence[Job], runs: Sequence[Run]) -> tuple[dict[int, float], dict[int, float]]:
    """Microseconds that the compute stream stood still, by the network's job that it waited for; and for another
    reason, by the compute job that came late."""
    exposed: dict[int, float] = {}
    bubbles: dict[int, float] = {}
    network = [i for i, job in enumerate(jobs) if job.stream == NETWORK]
    first, free = 0, 0.0
    for i, job in enumerate(jobs):
        if job.stream != COMPUTE:
            continue
        start = runs[i].start_us
        if start > free:
            last = max(job.needs, key=lambda need: runs[need].end_us, default=None)
            if last is not None and jobs[last].stream == NETWORK:
                while first < len(network) and runs[network[first]].end_us <= free:
                    first += 1
                covered = free
                for at in network[first:]:
                    if runs[at].start_us >= start:
                        break
                    shared = min(start, runs[at].end_us) - max(covered, runs[at].start_us)
                    if shared > 0:
                        exposed[at] = exposed.get(at, 0.0) + shared
                        covered += shared
                if start - covered > 1e-6:
                    bubbles[i] = start - covered
            else:
                bubbles[i] = start - free
        free = runs[i].end_us
    return exposed, bubbles


def _inner(
    jobs: Sequence[Job], runs: Sequence[Run], exposed: dict[int, float], bubbles: dict[int, float], layers: int
) -> InnerLayer:
    """Averages over the layers that neither the first nor the last one touches."""
    ends = [0.0] * layers
    for job, run in zip(jobs, runs, strict=True):
        if job.stream == COMPUTE and job.piece.layer is not None:
            ends[job.piece.layer] = max(ends[job.piece.layer], run.end_us)
    first, last = (1, layers - 2) if layers >= 4 else (-1, layers - 1)
    inner, count = range(first + 1, last + 1), last - first
    us = (ends[last] - (ends[first] if first >= 0 else 0.0)) / count
    busy: dict[str, float] = {"compute": 0.0, "memory": 0.0, "network": 0.0}
    exposed_us = bubble_us = lost_us = 0.0
    for i, (job, run) in enumerate(zip(jobs, runs, strict=True)):
        if job.piece.layer not in inner:
            continue
        busy[job.prediction.bound] += run.alone_us / count
        exposed_us += exposed.get(i, 0.0) / count
        bubble_us += bubbles.get(i, 0.0) / count
        if job.stream == COMPUTE:
            lost_us += (run.end_us - run.start_us - run.alone_us) / count
    return InnerLayer(us, busy["compute"], busy["memory"], busy["network"], exposed_us, bubble_us, lost_us)


def _timeline(jobs: Sequence[Job], played: Played, exposed: dict[int, float], bubble_us: float, us: float) -> Timeline:
    events = tuple(
        Event(
            name=str(job.piece),
            kind=job.kind,
            lane=job.prediction.bound,
            stream=job.stream,
            start_us=run.start_us,
            end_us=run.end_us,
            pieces=(job.piece,),
            flops=job.prediction.flops,
            bytes=job.bytes,
            source=job.prediction.source,
            exposed_us=exposed.get(i, 0.0),
        )
        for i, (job, run) in enumerate(zip(jobs, played.runs, strict=True))
    )
    kernels = [event for event in events if event.stream != NETWORK]
    collectives = []
    for event, job in zip(events, jobs, strict=True):
        if job.stream == NETWORK:
            beside = [other for other in kernels if other.start_us < event.end_us and event.start_us < other.end_us]
            collectives.append(_collective(event, job, beside))
    return Timeline(events, tuple(collectives), us, bubble_us)


def _collective(event: Event, job: Job, beside: Sequence[Event]) -> Collective:
    return Collective(
        op=job.piece.op,
        nano_batch=job.piece.piece,
        layer=job.piece.layer,
        kind=job.collective,
        name=event.name,
        bytes=int(job.bytes),
        wire_bytes=int(job.prediction.bytes),
        is_async=True,
        beside=tuple(dict.fromkeys(other.label for other in beside if other.kind in HEAVY)),
        beside_other=tuple(dict.fromkeys(other.label for other in beside if other.kind not in HEAVY)),
        predicted_us=job.prediction.us,
        exposed_us=event.exposed_us,
        start_us=event.start_us,
        source=job.prediction.source,
    )
