"""Inspections as a page for a browser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from nanoflow_jax.inspect.compare import figures
from nanoflow_jax.inspect.findings import grouped
from nanoflow_jax.inspect.step import MEMORY_UTILIZATION, StepInspection
from nanoflow_jax.inspect.versions import text as versions_text
from nanoflow_jax.timeline.html import Shown, write_page


def shown(one: StepInspection, network: bool = True) -> Shown:
    """network: whether any plan of the page has one."""
    m = one.memory
    memory = {
        "weights": m.weights,
        "temporaries": m.temporaries,
        f"KV pages ({m.kv_tokens:,} tokens)": max(0, m.headroom),
        f"beyond {MEMORY_UTILIZATION:.0%}": m.device - m.weights - m.temporaries - max(0, m.headroom),
    }
    return Shown(
        report=one,
        inner=one.inner_layer,
        figures=figures(one, network),
        findings=[asdict(group) for group in grouped(one.report.findings)],
        memory=memory,
        more={"report": one.text().splitlines()},
    )


def write_inspections(inspections: Sequence[StepInspection], path: str | Path) -> None:
    """Writes the page; the first inspection says what was compiled."""
    first = inspections[0]
    network = any(one.devices > 1 for one in inspections)
    layers = "" if first.layers == first.model_layers else f", {first.layers} of its {first.model_layers} layers"
    about = (
        f"{first.decode_tokens} decode + {first.tokens - first.decode_tokens} prefill tokens of context "
        f"{first.context}{layers}; {versions_text(first.versions)}. Programs are compiled for the GPU, times are "
        f"predicted: {'; '.join(first.report.timeline.sources)}."
    )
    title = f"{first.model} on {first.devices} x {first.hardware.name}"
    write_page([shown(one, network) for one in inspections], path, title, about)
