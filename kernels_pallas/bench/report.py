"""The report: JSON that is whole after every case, and the same as Markdown tables."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from kernels_pallas.bench.cases import Case, PrefillCase
from kernels_pallas.bench.expert_cases import ExpertCase
from kernels_pallas.bench.goals import CEILINGS, known_gpu


def commit() -> str | None:
    """Of the checkout this package lies in, with "+" when files differ from it; None outside one."""
    where = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    name = git("rev-parse", "--short=12", "HEAD")
    return name and name + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def header(command: str, interpreted: bool) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "driver": getattr(device.client, "platform_version", "").splitlines()[:1],
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": version("jaxlib")},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "interpreted": interpreted,  # then its times say nothing about a GPU
        "finished": False,
        "cases": {},
    }


def with_rates(case: Case, result: dict[str, Any], copy: float | None, gemm: float | None) -> dict[str, Any]:
    """`seconds` as a rate, and as a share of the bound where that was measured: the copy's bytes per second, the GEMM's
    FLOP/s for prefill and for experts of many rows."""
    if "seconds" not in result:
        return result
    result = dict(result)
    took = result.pop("seconds")
    result["us"] = took * 1e6
    if isinstance(case, PrefillCase) or (isinstance(case, ExpertCase) and case.compute_bound):
        result["flops_per_second"] = case.flops / took
        if gemm is not None:
            result["percent_of_gemm"] = 100 * case.flops / took / gemm
    else:
        result["bytes_per_second"] = case.bytes / took
        if copy is not None:
            result["percent_of_copy"] = 100 * case.bytes / took / copy
    return result


def save(report: dict[str, Any], out: Path | None, tables: Path | None) -> None:
    """Replaces the files in one step each: a run that is stopped leaves the last whole report."""
    for path, make in ((out, lambda: json.dumps(report, indent=2) + "\n"), (tables, lambda: markdown(report))):
        if path is not None:
            draft = path.with_name(path.name + ".part")
            draft.unlink(missing_ok=True)  # of a run that was stopped, or a link of someone else's
            with open(draft, "x") as file:  # which follows none
                file.write(make())
            os.replace(draft, path)


def _seen(report: dict[str, Any]) -> list[str]:
    """What such machines have given before."""
    if report["interpreted"] or (gpu := known_gpu(report["device"])) is None:
        return []
    seen = CEILINGS[gpu]
    return [f"Seen on such a GPU before: {seen.copy / 1e12:.1f} TB/s and {seen.gemm / 1e12:.0f} TFLOP/s."]


def _cell(result: dict[str, Any]) -> str:
    if "us" in result:
        bound = "percent_of_gemm" if "flops_per_second" in result else "percent_of_copy"
        rate = (
            f"{result['flops_per_second'] / 1e12:.0f} TFLOP/s"
            if "flops_per_second" in result
            else f"{result['bytes_per_second'] / 1e12:.2f} TB/s"
        )
        share = f", {result[bound]:.0f} %" if bound in result else ""
        return f"{result['us']:.1f} µs, {rate}{share}"
    return "failed: " + result["failed"] if "failed" in result else "not available"


def _goal(case: dict[str, Any]) -> str:
    if "goal" not in case:
        return ""
    return f"{case['goal']}: " + {True: "met", False: "missed", None: "not measured"}[case["met"]]


def markdown(report: dict[str, Any]) -> str:
    """A table per kernel; why something is missing stands below, once."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"# Kernels on {report['device']}",
        "",
        f"{report['date']}, commit {report['commit']}, {versions}. `{report['command']}`",
        "",
    ]
    if report["interpreted"]:
        lines += ["Under the interpreter, on a CPU: the times say nothing about a GPU.", ""]
    if not report["finished"]:
        lines += ["The run did not finish: what is not here was not measured.", ""]
    copy, gemm = report.get("copy_bytes_per_second"), report.get("gemm_flops_per_second")
    if copy:
        lines += [
            f"Device copy {copy / 1e12:.2f} TB/s" + (f", bf16 GEMM {gemm / 1e12:.0f} TFLOP/s." if gemm else "."),
            *_seen(report),
            "",
        ]
    lines += [
        "Percent: of the copy's rate; where TFLOP/s are given, of the GEMM's. Error: the worst row's, relative to "
        "float32. "
        "Expected: what the tuning table says, which the scheduler is told.",
        "",
    ]
    why: dict[str, None] = {}
    for kind in dict.fromkeys(name.split("/")[0] for name in report["cases"]):
        cases = {n.split("/")[1]: case for n, case in report["cases"].items() if n.startswith(kind + "/")}
        columns = list(dict.fromkeys(name for case in cases.values() for name in case["results"]))
        lines += [f"## {kind}", "", f"| case | {' | '.join(columns)} | error | expected | goal |"]
        lines += ["|" + " --- |" * (len(columns) + 4)]
        for name, case in cases.items():
            results, expected = case["results"], case.get("expected_us")
            cells = [_cell(results[column]) if column in results else "" for column in columns]
            error = next((f"{r['error']:.1e}" for r in results.values() if "error" in r), "")
            after = f"{error} | {'' if expected is None else f'{expected:.1f} µs'} | {_goal(case)}"
            lines.append(f"| {name} | {' | '.join(cells)} | {after} |")
            why |= {f"{c}: {r['not_available']}": None for c, r in results.items() if "not_available" in r}
        lines.append("")
    lines += [f"- {line}" for line in why]
    return "\n".join(lines).rstrip() + "\n"
