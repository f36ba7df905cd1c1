"""The inspector's report: from a compiled program's text to collectives, totals, findings and memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nanoflow_jax.cost.latency import LatencyModel, RooflineModel, optimal_tokens_per_second
from nanoflow_jax.hardware import Hardware
from nanoflow_jax.inspect.costs import CostModel, Costs
from nanoflow_jax.inspect.findings import Finding, find, grouped
from nanoflow_jax.inspect.hlo import parse
from nanoflow_jax.inspect.overlap import Budgets, simulate
from nanoflow_jax.timeline.timeline import Collective, Timeline
from nanoflow_jax.timeline.totals import Times, Totals, add_up

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU. headroom: device memory minus arguments, results that alias no argument, temporaries and code."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    device: int
    headroom: int


@dataclass(frozen=True)
class Report:
    """All that the inspector says of one compiled step. `notes` are what the figures rest on."""

    hardware: str
    devices: int
    collectives: tuple[Collective, ...]
    findings: tuple[Finding, ...]
    totals: Totals
    memory: Memory | None
    notes: tuple[str, ...]
    timeline: Timeline

    def to_json(self) -> dict[str, Any]:
        """Plain data: hardware, devices, collectives, findings, totals, memory, notes. The timeline goes into a
        trace."""
        names = ("hardware", "devices", "notes")
        data: dict[str, Any] = {name: getattr(self, name) for name in names}
        data["notes"] = list(self.notes)
        tuples = ("beside", "beside_other", "between")
        data["collectives"] = [
            {**asdict(c), **{name: list(getattr(c, name)) for name in tuples}} for c in self.collectives
        ]
        data["findings"] = [asdict(finding) for finding in self.findings]
        data["totals"] = {**asdict(self.totals), "layers": [asdict(layer) for layer in self.totals.layers]}
        data["memory"] = asdict(self.memory) if self.memory else None
        return data


def _memory(analysis: Any, hardware: Hardware) -> Memory | None:
    if analysis is None:
        return None
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    aliased, temporaries = analysis.alias_size_in_bytes, analysis.temp_size_in_bytes
    code = analysis.generated_code_size_in_bytes
    headroom = hardware.memory_bytes - (arguments + outputs - aliased + temporaries + code)
    return Memory(arguments, outputs, aliased, temporaries, code, hardware.memory_bytes, headroom)


def _notes(timeline: Timeline, hardware: Hardware) -> tuple[str, ...]:
    notes = [f"times: {source}" for source in timeline.sources]
    guessed = sorted({f"{e.piece.op}" for e in timeline.events if e.source.endswith("operand bytes") and e.piece})
    if guessed:
        notes.append(f"no cost was given for the kernels of {', '.join(guessed)}: their operands' bytes are used")
    if timeline.unknown_loops:
        notes.append(f"loops of unknown length are counted once: {', '.join(timeline.unknown_loops)}; give their costs")
    if timeline.left_out_us:
        more = f"at most {timeline.left_out_us:.0f} us more"
        notes.append(f"branches: the shortest, greedy decoding without log-probabilities; the longest are {more}")
    figures = ", ".join(f"{name} {value:g}" for name, value in asdict(hardware.calibration).items())
    notes.append(f"{hardware.name}: {figures}")
    return tuple(notes)


def inspect_compiled(
    text: str,
    memory_analysis: Any,
    hardware: Hardware,
    devices: int,
    *,
    costs: Costs | None = None,
    latency: LatencyModel | None = None,
    budgets: Budgets | None = None,
    tokens: int | None = None,
    parameters: float | None = None,
) -> Report:
    """Report on a compiled step.

    text: `compiled.as_text()`, scheduled HLO; memory_analysis: `compiled.memory_analysis()`, or None.
    costs: (FLOP, bytes) per layer of Mosaic kernels by (op, piece), for example {("GEMV", 1): (1.3e9, 3.7e8)};
    without them their operands' bytes count, and the report says so. latency: None is the roofline of `hardware`.
    budgets: the most SMs that an op uses on a stream of its own, for example {"GEMV": 48}: its cost is one on so many.
    tokens: rows of the step; parameters: of the whole model. Raises ValueError when the text is no compiled HLO
    module. What the reader does not know is a finding, `unknown_hlo`.
    """
    module = parse(text)
    timeline = simulate(CostModel.of(module, latency or RooflineModel(hardware), devices, costs), budgets or {})
    optimum = optimal_tokens_per_second(hardware, parameters, calibrated=True) if parameters else None
    return Report(
        hardware=hardware.name,
        devices=devices,
        collectives=timeline.collectives,
        findings=find(module, timeline),
        totals=add_up(timeline, devices, tokens, optimum),
        memory=_memory(memory_analysis, hardware),
        notes=_notes(timeline, hardware),
        timeline=timeline,
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [all(row[i].replace(".", "").isdigit() or row[i] == "-" for row in rows[1:]) for i in range(len(widths))]
    cells = [
        [cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric, strict=True)]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in cells]


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:z.1f}" if isinstance(value, float) else str(value)


def render(report: Report, *, all_layers: bool = False) -> str:
    """Text for a terminal: collectives, totals, findings, memory. Without all_layers, the collectives of the
    middle two layers. What is beside a collective is so in the predicted timeline, which the trace and the plot show
    too."""
    totals = report.totals
    layers = sorted({c.layer for c in report.collectives if c.layer is not None})
    middle = layers if all_layers or len(layers) <= 2 else layers[len(layers) // 2 - 1 : len(layers) // 2 + 1]
    shown = [c for c in report.collectives if all_layers or c.layer in middle or c.op is None]
    rows = [("layer", "op", "batch", "MiB", "async", "alone us", "actual us", "exposed us", "beside")]
    for c in shown:
        state = "yes" if c.is_async else "NO"
        beside = ", ".join(c.beside) or "NOTHING"
        mib = f"{c.bytes / 2**20:.1f}"
        rows.append(
            (
                _text(c.layer),
                c.op or c.name,
                _text(c.nano_batch),
                mib,
                state,
                _text(c.predicted_us),
                _text(c.actual_us),
                _text(c.exposed_us),
                beside,
            )
        )
    lines = [f"{report.hardware} x {report.devices}"]
    if len(rows) > 1:
        lines += ["", f"Collectives, layers {middle[0]} to {middle[-1]}" if middle else "Collectives", *_table(rows)]
    lines += ["", "Totals, us"]
    network = report.devices > 1
    head = ("layer", "compute", "memory", *(("network", "exposed") if network else ()), "lost", "bubbles", "length")

    def times(of: Times) -> tuple[float, ...]:
        waits = (of.network_us, of.exposed_network_us) if network else ()
        return (of.compute_us, of.memory_us, *waits, of.interference_us, of.bubble_us, of.us)

    rows = [head, ("step", *map(_text, times(totals)))]
    for layer in totals.layers:
        if layer.layer in middle or layer.layer is None:
            rows.append(("outside" if layer.layer is None else str(layer.layer), *map(_text, times(layer))))
    lines += _table(rows)
    lines.append(f"busiest: {totals.binding}")
    if totals.tokens_per_second_per_gpu is not None:
        share = "" if totals.share_of_optimum is None else f", {totals.share_of_optimum:.1%} of the optimum"
        lines.append(f"predicted: {totals.tokens_per_second_per_gpu:.0f} tokens/s/GPU{share}")
    lines += ["", f"Findings in the program compiled, its ends included: {len(report.findings) or 'none'}"]
    for group in grouped(report.findings):
        where = f" in layers {', '.join(map(str, group.layers))}" if group.layers else ""
        lines.append(f"  {group.kind} {group.op or ''} x {group.count}{where}: {group.detail}")
    if report.memory:
        m = report.memory
        parts = (
            ("arguments", m.arguments),
            ("temporaries", m.temporaries),
            ("outputs", m.outputs - m.aliased),
            ("headroom", m.headroom),
        )
        lines += ["", "Memory per GPU, GiB: " + ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts)]
    return "\n".join([*lines, "", *report.notes])
