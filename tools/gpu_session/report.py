"""The summary of a GPU session: one Markdown page from the parts' JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RUNS = (
    *("part", "model", "plan", "workload", "tokens/s/GPU", "of optimum", "served", "ratio"),
    *("step ms", "ms a layer", "gap ms", "dispatch ms", "window s"),
)
KERNELS = ("kernel", "implementation", "us", "expected us", "rate", "of the ceiling", "error", "goal")
PARTS = ("part", "status", "seconds", "compiling", "programs", "from the cache", "compute-sanitizer")


def summary(headers: Sequence[Mapping[str, str]], parts: Mapping[str, dict[str, Any]]) -> str:
    """headers: what was run where, by call. parts: name → {"status": "done" or why not, "seconds": n, "result": JSON or
    None, ...}."""
    lines = ["# GPU session"]
    for header in headers:
        lines += ["", *(f"- {name}: {value}" for name, value in header.items())]
    results = {name: part["result"] for name, part in parts.items() if part["result"]}
    measured = [row for result in results.values() for row in _kernels(result)]
    if measured:
        lines += ["", "Kernels, each with the L2 cold; the ceiling is a device copy's or a GEMM's rate in this call"]
        ceilings = [line for result in results.values() for line in result.get("lines", ()) if "tuning" in line]
        rates = [
            f"{line['copy_bytes_per_second'] / 1e12:.2f} TB/s, {line['gemm_flops_per_second'] / 1e12:.0f} TFLOP/s"
            for line in ceilings[:1]
            if "copy_bytes_per_second" in line
        ]
        lines[-1] += f": {rates[0]}." if rates else "."
        lines += _table(KERNELS, measured)
    runs = [_run(name, result) for name, result in results.items() if "lost" in result]
    if runs:
        lines += [
            "",
            "Tokens per second and GPU are prompt and output tokens that were computed, and their share of the "
            "optimum; served: with prompt tokens found in kept pages. Ratios are of served tokens. A rank slice has no "
            "network in it: with a modelled one, the figure lies between those in brackets. A step: the device's time "
            "for it, that over the layers (head and sampler included), idle before it, and the host's call.",
            *_table(RUNS, runs),
        ]
    notes = [f"- {name}: {note}" for name, result in results.items() if (note := _note(result))]
    return (
        "\n".join([*lines, *([""] if notes else []), *notes, *_table(PARTS, map(_part, parts, parts.values()))]) + "\n"
    )


def _table(columns: Sequence[str], rows: Any) -> list[str]:
    lines = [" | ".join(columns), " | ".join(["---"] * len(columns)), *(" | ".join(row) for row in rows)]
    return ["", *(f"| {line} |" for line in lines)]


def _part(name: str, part: Mapping[str, Any]) -> list[str]:
    compiling = f"{part['compile_seconds']:.0f} s" if part.get("programs") else ""
    counts = [str(part[key]) if part.get("programs") else "" for key in ("programs", "cached")]
    return [name, part["status"], f"{part['seconds']:.0f}", compiling, *counts, part.get("sanitizer", "")]


def _kernels(result: Mapping[str, Any]) -> list[list[str]]:
    return [
        _kernel(line["case"], name, found, line)
        for line in result.get("lines", ())
        if "case" in line and "results" in line
        for name, found in line["results"].items()
    ]


def _kernel(case: str, name: str, found: Mapping[str, Any], line: Mapping[str, Any]) -> list[str]:
    if "us" not in found:
        return [case, name, found.get("failed") or found.get("not_available", ""), *[""] * 5]
    flops, moved = found.get("flops_per_second"), found.get("bytes_per_second")
    share = found.get("percent_of_gemm", found.get("percent_of_copy"))
    expected = line.get("expected_us")
    met = {True: "met", False: "missed", None: "not measured"}[line.get("met")]
    return [
        case,
        name,
        f"{found['us']:.1f}",
        "" if expected is None else f"{expected:.1f}",
        f"{flops / 1e12:.0f} TFLOP/s" if flops else f"{moved / 1e12:.2f} TB/s" if moved else "",
        "" if share is None else f"{share:.0f} %",
        f"{found['error']:.1e}",
        f"{line['goal']}: {met}" if "goal" in line and name == "mosaic" else "",
    ]


def _run(name: str, r: Mapping[str, Any]) -> list[str]:
    layers = "" if r["layers"] == r["model_layers"] else f", {r['layers']} of {r['model_layers']} layers"
    rate = f"{r['tokens_per_second_per_gpu']:,.0f}"
    network = r.get("network") or {}
    if (low := network.get("tokens_per_second_per_gpu_exposed")) is not None:
        rate += f" [{low:,.0f} to {network['tokens_per_second_per_gpu_hidden']:,.0f}]"
    share = r["share_of_optimum"]
    ratios = [f"{r['ratio']:.3f} ({' / '.join(r['compared'])})"] if "ratio" in r else []
    if "ratio_to_transformers" in r:
        ratios.append(f"{r['ratio_to_transformers']:.2f} (transformers, {r['transformers']['measure']})")
    window = r["window"]
    return [
        name,
        f"{r['model']}{layers}, {r['dtype']}" + (f", rank of {r['rank_of']}" if r["rank_of"] else ""),
        f"{r['plan']}, attention {r['options']['attention_backend']}",
        r["workload"],
        rate,
        "" if share is None else f"{share:.1%}",
        f"{r['served_tokens_per_second_per_gpu']:,.0f}",
        "; ".join(ratios),
        *(f"{window[key]:.3f}" for key in ("step_ms_median", "layer_ms", "gap_ms_median", "dispatch_ms_median")),
        f"{window['seconds']:.0f}" + ("" if r["steady"] else ", not steady"),
    ]


def _note(r: Mapping[str, Any]) -> str:
    lines = r.get("lines", [r])
    if "variant" in lines[0]:
        worst = max(line["error"] for line in lines)
        return f"{len(lines)} ways right, the worst row off by {worst:.1e} of its norm, each the same bits in repeats"
    if "mismatches" in r:
        return (
            f"{' against '.join(r['compared'])}: {r['tokens']} greedy tokens of {r['requests']} requests equal, "
            f"{r['near_ties']} near ties, {r['mismatches']} mismatches"
        )
    if "ptxas" in r:
        return (
            f"{r['device']}, {r['memory_gib']} GiB for JAX, ptxas {r['ptxas']}, a tiny program in {r['jit_seconds']} s"
        )
    if "gemm_keeps" in lines[0]:
        return "; ".join(
            f"decode attention on {x['sms']} SMs keeps {x['attention_keeps']:.2f} of its speed and a GEMM beside it "
            f"{x['gemm_keeps']:.2f}"
            for x in lines
        )
    if "implementation" in lines[0]:
        times = [f"{x['implementation']} {x['case']} {x['seconds'] * 1e6:.1f} us" for x in lines if "seconds" in x]
        return "; ".join(times) or str(lines[0].get("not_available", ""))
    if "host_ms_median" in r:
        return f"host work per step, median {r['host_ms_median']:.3f} ms, 99th percentile {r['host_ms_p99']:.3f} ms"
    if "measured_now" in r:
        return f"{r['measured_now']} of {r['points']} points measured now"
    return ""
