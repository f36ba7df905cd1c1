"""A timeline added up: per layer, per resource, for the step, and for a model of more layers than were played."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from nanoflow_jax.timeline.timeline import COMPUTE, Event, Timeline

RESOURCES = ("compute", "memory", "network")


@dataclass(frozen=True)
class Times:
    """Microseconds of a layer, or a step. us: its length, for a layer that of its ops on the compute stream and of the
    waits; compute, memory, network: of its ops by the resource that binds them, as if each had the GPU to itself;
    exposed_network_us, bubble_us: how long the compute stream stood still for its collectives, and ahead of its kernels
    for another reason; interference_us: what its ops on the compute stream lost to those beside them."""

    us: float
    compute_us: float
    memory_us: float
    network_us: float
    exposed_network_us: float
    bubble_us: float
    interference_us: float


TIMES = tuple(field.name for field in fields(Times))


@dataclass(frozen=True)
class LayerTotals(Times):
    """One layer; layer None: outside of layers, or untraced."""

    layer: int | None


def whole_periods(layers: Sequence[int], period: int) -> Sequence[int]:
    """As many of the layers as hold every kind equally often; all, where they are too few for that."""
    return layers[: len(layers) // period * period] or layers


@dataclass(frozen=True)
class InnerLayer(Times):
    """Averages per layer over `layers`, those that repeat: what each of them adds to a step."""

    layers: tuple[int, ...]

    @staticmethod
    def of(totals: Totals, layers: Sequence[int]) -> InnerLayer:
        chosen = [layer for layer in totals.layers if layer.layer in layers]
        means = {name: sum(getattr(layer, name) for layer in chosen) / len(chosen) for name in TIMES}
        return InnerLayer(**means, layers=tuple(layers))

    @property
    def bound_by(self) -> str:
        """The resource that is busy longest."""
        return _busiest(self)

    def text(self) -> str:
        """A line of a report. One device has no network."""
        network = f", network {self.network_us:.0f}; exposed network {self.exposed_network_us:z.0f}"
        return (
            f"inner layer, us: {self.us:.0f}; alone: compute {self.compute_us:.0f} and memory {self.memory_us:.0f}"
            f"{network if self.network_us else ''}; lost beside others {self.interference_us:z.0f}, "
            f"other waits {self.bubble_us:z.0f}"
        )


@dataclass(frozen=True)
class Totals(Times):
    """The step, bubble_us with its end. host_us: of copies.

    binding: the resource that is busy longest. tokens_per_second_per_gpu and share_of_optimum (of FLOP/s ÷
    2·parameters, at the GEMM rate that is reached): None unless the caller gave tokens and the optimum.
    """

    host_us: float
    flops: float
    binding: str
    layers: tuple[LayerTotals, ...]
    tokens_per_second_per_gpu: float | None = None
    share_of_optimum: float | None = None


def _busiest(times: Times) -> str:
    return max(RESOURCES, key=lambda resource: getattr(times, f"{resource}_us"))


def _layer_totals(layer: int | None, events: Sequence[Event]) -> LayerTotals:
    busy: defaultdict[str, float] = defaultdict(float)
    for event in events:
        busy[event.lane] += event.alone_us
    computed = [event for event in events if event.stream == COMPUTE]
    waited = sum(event.exposed_us + event.bubble_us for event in events)
    return LayerTotals(
        layer=layer,
        us=sum(event.us for event in computed) + waited,
        compute_us=busy["compute"],
        memory_us=busy["memory"],
        network_us=busy["network"],
        exposed_network_us=sum(event.exposed_us for event in events),
        bubble_us=sum(event.bubble_us for event in events),
        interference_us=sum(event.us - event.alone_us for event in computed),
    )


def add_up(timeline: Timeline, devices: int, tokens: int | None = None, optimum: float | None = None) -> Totals:
    """optimum: tokens per second and GPU (`optimal_tokens_per_second`, calibrated)."""
    by_layer: dict[int | None, list[Event]] = {}
    for event in timeline.events:
        by_layer.setdefault(event.piece.layer if event.piece else None, []).append(event)
    order = sorted(by_layer, key=lambda layer: (layer is None, layer or 0))
    whole = _layer_totals(None, timeline.events)
    totals = Totals(
        us=timeline.us,
        compute_us=whole.compute_us,
        memory_us=whole.memory_us,
        network_us=whole.network_us,
        exposed_network_us=whole.exposed_network_us,
        bubble_us=timeline.bubble_us,
        interference_us=whole.interference_us,
        host_us=sum(event.alone_us for event in timeline.events if event.lane == "host"),
        flops=sum(event.flops for event in timeline.events),
        binding="",
        layers=tuple(_layer_totals(layer, by_layer[layer]) for layer in order),
    )
    return _with_rate(replace(totals, binding=_busiest(totals)), devices, tokens, optimum)


def of_all_layers(totals: Totals, inner: InnerLayer, layers: int, devices: int, tokens: int, optimum: float) -> Totals:
    """Totals of a step of so many layers: those played, and inner layers like them for the rest."""
    played = sum(layer.layer is not None for layer in totals.layers)
    if missing := layers - played:
        grown = {name: getattr(totals, name) + missing * getattr(inner, name) for name in TIMES}
        flops = totals.flops * layers / played  # the head's share is small
        totals = replace(totals, flops=flops, **grown)
        totals = replace(totals, binding=_busiest(totals))
    return _with_rate(totals, devices, tokens, optimum)


def _with_rate(totals: Totals, devices: int, tokens: int | None, optimum: float | None) -> Totals:
    rate = tokens / (totals.us * 1e-6) / devices if tokens and totals.us else None
    share = rate / optimum if rate and optimum else None
    return replace(totals, tokens_per_second_per_gpu=rate, share_of_optimum=share)
