"""A plan and a latency model → a predicted timeline of one step, and the step's throughput.

A few layers are simulated. The inner ones repeat, so that their period stands for all others.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.cost.demand import StepLoad
from nanoflow_jax.cost.latency import LatencyModel
from nanoflow_jax.cost.shapes import OpCosts, Shapes, optimum
from nanoflow_jax.plan.known import check_sms
from nanoflow_jax.plan.plan import SchedulePlan, row_quantum
from nanoflow_jax.timeline.jobs import Shares, build_jobs
from nanoflow_jax.timeline.played import timeline
from nanoflow_jax.timeline.timeline import COMPUTE, NETWORK, Collective, Timed, Timeline
from nanoflow_jax.timeline.totals import InnerLayer, Totals, add_up, of_all_layers, whole_periods

INNER = 3  # layers at least, or whole periods of the kinds of layers, that neither end of the step touches
ATTENTION_SHARE = 0.4  # of the SMs, for decode attention on NanoFlow's memory lane where the plan does not say


@dataclass(frozen=True)
class Simulation:
    """One step of a plan. timeline: of the layers simulated; totals: of the whole step, all the model's layers.

    collectives, hardware, devices and totals are what the inspector's report has too, so that both are drawn and traced
    alike.
    """

    plan: SchedulePlan
    load: StepLoad
    hardware: str
    devices: int
    runtime: str
    layers: int
    imbalance: float | None  # of the experts; None: there are none
    inner: InnerLayer
    timeline: Timeline
    totals: Totals

    @property
    def us(self) -> float:
        return self.totals.us

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.load.rows / (self.us * 1e-6) / self.devices

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the times of ops, alone and side by side, come from."""
        return self.timeline.sources

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return self.timeline.collectives

    @property
    def beside_us(self) -> float:
        """Microseconds of an inner layer's kernels on a lane of their own."""
        beside = [e for e in self.timeline.events if e.stream not in (COMPUTE, NETWORK)]
        inner = self.inner.layers
        return sum(e.us for e in beside if e.piece and e.piece.layer in inner) / len(inner)

    @property
    def report(self) -> Timed:
        return self

    @property
    def nano_batches(self) -> dict[tuple[str, int], int]:
        """The nano-batch of each (op, piece)."""
        pieces = self.plan.pieces(
            self.load.decode_rows, self.load.prefill_rows, row_quantum(self.devices), experts=self.imbalance is not None
        )
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
    layers: int | None = None,
    page_bytes: int | None = None,
    imbalance: float = 1.0,
) -> Simulation:
    """layers: how many are simulated (at least 4, or all), None: enough; runtime, shares: see `jobs`; page_bytes: of an
    element of the pages, None: as the activations; imbalance: of experts, as `OpCosts` has it. Raises ConfigError."""
    period = len(config.pattern)
    layers = min(config.num_layers, layers or 2 + -(-INNER // period) * period + 1)
    if layers < min(config.num_layers, 4):
        raise ConfigError(f"layers: {layers} is not accepted; a steady state needs at least 4")
    hardware = model.hardware
    check_sms(plan, hardware)
    shares = shares or Shares(hardware.calibration.network_share, ATTENTION_SHARE)
    costs = OpCosts(model, Shapes.of(config, devices, page_bytes), load, imbalance)
    jobs = build_jobs(plan, costs, layers, shares, runtime)
    played = timeline(jobs, model)
    totals = add_up(played, devices)
    inner = InnerLayer.of(totals, whole_periods(range(2, layers - 1), period) if layers >= 4 else range(layers))
    best = optimum(config, hardware, calibrated=True)
    totals = of_all_layers(totals, inner, config.num_layers, devices, load.rows, best)
    return Simulation(
        plan,
        load,
        hardware.name,
        devices,
        runtime,
        layers,
        imbalance if config.experts else None,
        inner,
        played,
        totals,
    )
