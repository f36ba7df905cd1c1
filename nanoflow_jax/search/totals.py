"""A timeline added up: per layer, per resource, and for the step."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from nanoflow_jax.hardware import Hardware
from nanoflow_jax.search.latency import optimal_tokens_per_second
from nanoflow_jax.search.timeline import Event, Timeline


@dataclass(frozen=True)
class LayerTotals:
    """Microseconds of one layer's kernels by the resource that binds them; layer None: outside of layers, or untraced.

    exposed_network_us: how long the compute stream stood still for the layer's collectives.
    """

    layer: int | None
    compute_us: float
    memory_us: float
    network_us: float
    exposed_network_us: float


@dataclass(frozen=True)
class Totals:
    """The step. us: its length; bubble_us: compute stream idle for another reason than the network.

    binding: the resource that is busy longest. tokens_per_second_per_gpu and share_of_optimum (of FLOP/s ÷
    2·parameters, data sheet rate): None unless the caller gave tokens and parameters.
    """

    us: float
    compute_us: float
    memory_us: float
    network_us: float
    exposed_network_us: float
    bubble_us: float
    host_us: float
    flops: float
    binding: str
    layers: tuple[LayerTotals, ...]
    tokens_per_second_per_gpu: float | None = None
    share_of_optimum: float | None = None


def _layer(event: Event) -> int | None:
    return event.piece.layer if event.piece else None


def add_up(
    timeline: Timeline, hardware: Hardware, devices: int, tokens: int | None, parameters: float | None
) -> Totals:
    busy: defaultdict[str, float] = defaultdict(float)
    layers: dict[int | None, defaultdict[str, float]] = {}
    for event in timeline.events:
        busy[event.lane] += event.us
        busy["exposed"] += event.exposed_us
        layer = layers.setdefault(_layer(event), defaultdict(float))
        layer[event.lane] += event.us
        layer["exposed"] += event.exposed_us
    order = sorted(layers, key=lambda layer: (layer is None, layer or 0))
    per_layer = tuple(
        LayerTotals(i, layers[i]["compute"], layers[i]["memory"], layers[i]["network"], layers[i]["exposed"])
        for i in order
    )
    rate = tokens / (timeline.us * 1e-6) / devices if tokens and timeline.us else None
    share = rate / optimal_tokens_per_second(hardware, parameters) if rate and parameters else None
    return Totals(
        us=timeline.us,
        compute_us=busy["compute"],
        memory_us=busy["memory"],
        network_us=busy["network"],
        exposed_network_us=busy["exposed"],
        bubble_us=timeline.bubble_us,
        host_us=busy["host"],
        flops=sum(event.flops for event in timeline.events),
        binding=max(("compute", "memory", "network"), key=lambda lane: busy[lane]),
        layers=per_layer,
        tokens_per_second_per_gpu=rate,
        share_of_optimum=share,
    )
