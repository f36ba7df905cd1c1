"""The summary of a GPU session: one Markdown page from the parts' JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ("part", "model", "plan", "workload", "tokens/s/GPU", "of optimum", "served", "ratio", "window s")


def summary(header: Mapping[str, str], parts: Mapping[str, dict[str, Any]]) -> str:
    """header: what was run where. parts: name → {"status": "done" or why not, "seconds": n, "result": JSON or None}."""
    lines = ["# GPU session", "", *(f"- {name}: {value}" for name, value in header.items()), ""]
    rows = [_row(name, p["result"]) for name, p in parts.items() if p["result"] and "lost" in p["result"]]
    if rows:
        lines += [
            "Tokens per second and GPU are prompt and output tokens that were computed, and their share of the "
            "optimum; served: with prompt tokens found in kept pages. Ratios are of served tokens. A rank slice has no "
            "network in it: with a modelled one, the figure lies between those in brackets.",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + " --- |" * len(COLUMNS),
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
        ]
    for name, part in parts.items():
        if note := _note(part["result"]):
            lines.append(f"- {name}: {note}")
    lines += ["", "| part | status | seconds |", "| --- | --- | --- |"]
    lines += [f"| {name} | {part['status']} | {part['seconds']:.0f} |" for name, part in parts.items()]
    return "\n".join(lines) + "\n"


def _row(name: str, r: dict[str, Any]) -> list[str]:
    layers = "" if r["layers"] == r["model_layers"] else f", {r['layers']} of {r['model_layers']} layers"
    rate = f"{r['tokens_per_second_per_gpu']:,.0f}"
    network = r.get("network") or {}
    if (low := network.get("tokens_per_second_per_gpu_exposed")) is not None:
        rate += f" [{low:,.0f} to {network['tokens_per_second_per_gpu_hidden']:,.0f}]"
    share = r["share_of_optimum"]
    ratios = [f"{r['ratio']:.3f} ({' / '.join(r['compared'])})"] if "ratio" in r else []
    if "ratio_to_transformers" in r:
        ratios.append(f"{r['ratio_to_transformers']:.2f} (transformers, {r['transformers']['measure']})")
    return [
        name,
        f"{r['model']}{layers}, {r['dtype']}" + (f", rank of {r['rank_of']}" if r["rank_of"] else ""),
        f"{r['plan']}, attention {r['options']['attention_backend']}",
        r["workload"],
        rate,
        "" if share is None else f"{share:.1%}",
        f"{r['served_tokens_per_second_per_gpu']:,.0f}",
        "; ".join(ratios),
        f"{r['window']['seconds']:.0f}",
    ]


def _note(r: dict[str, Any] | None) -> str:
    if r and "mismatches" in r:
        return (
            f"{' against '.join(r['compared'])}: {r['tokens']} greedy tokens of {r['requests']} requests equal, "
            f"{r['near_ties']} near ties, {r['mismatches']} mismatches"
        )
    if r and "host_ms_median" in r:
        return f"host work per step, median {r['host_ms_median']:.3f} ms, 99th percentile {r['host_ms_p99']:.3f} ms"
    if r and "measured_now" in r:
        return f"{r['measured_now']} of {r['points']} points measured now"
    return "tables in kernels.md" if r and "cases" in r else ""
