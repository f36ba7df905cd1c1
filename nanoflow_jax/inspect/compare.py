"""Inspections side by side: per inner layer, then per step."""

from __future__ import annotations

from collections.abc import Sequence

from nanoflow_jax.inspect.step import StepInspection
from nanoflow_jax.system.table import table


def figures(one: StepInspection, network: bool = True) -> dict[str, str]:
    """Its row by column, as texts. network: whether any of those beside it has one."""
    inner, totals = one.inner_layer, one.report.totals
    found = {"collectives": f"{inner.collectives:g}", "MiB": f"{inner.bytes / 2**20:.1f}"} if network else {}
    found["layer us"] = f"{inner.us:.0f}"
    if network:
        found |= {"network us": f"{inner.network_us:.0f}", "exposed us": f"{inner.exposed_network_us:z.0f}"}
    return found | {
        "lost us": f"{inner.interference_us:z.0f}",
        "step ms": f"{totals.us / 1e3:.1f}",
        "tokens/s/GPU": f"{totals.tokens_per_second_per_gpu:.0f}",
        "of optimum": f"{totals.share_of_optimum:.1%}",
        "findings": f"{len(one.report.findings)}",
        "in a layer": f"{inner.findings:g}",
    }


def compare(inspections: Sequence[StepInspection]) -> str:
    """The plans, or GPUs, as a table. One device has no network."""
    network = any(i.devices > 1 for i in inspections)
    gpus = len({i.hardware.name for i in inspections}) > 1
    rows: list[tuple[str, ...]] = []
    for one in inspections:
        found = figures(one, network)
        names = (one.plan.name, *((one.hardware.name,) if gpus else ()))
        if not rows:
            rows.append(("plan", *(("GPU",) if gpus else ()), *found))
        rows.append((*names, *found.values()))
    what = "collectives, MiB, length, network, exposed network, " if network else "length, "
    layers = sorted({one.layers for one in inspections})
    counted = f"Findings: of all {' or '.join(map(str, layers))} layers compiled and the step's ends; in an inner layer"
    return "\n".join(
        [f"Per inner layer: {what}lost beside others. {counted}. Predicted.", table(rows, left=2 if gpus else 1)]
    )
