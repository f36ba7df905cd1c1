"""What the kernels are meant to reach, as shares of what the same call measured of the machine, and what the tuning
tables expect, beside what was measured.

Where a measurement differs from the expected time, the table is what should change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kernels_pallas.bench.cases import AppendCase, Case, DecodeCase, PrefillCase
from kernels_pallas.bench.expert_cases import ExpertCase
from kernels_pallas.tuning import APPEND, DECODE, GROUPED, PREFILL

_FULL = {(32, 4096), (1280, 1024)}  # (requests, context) of decode steps that fill the GPU
PREFILL_FLOPS = 600e12  # of 8K tokens, on either GPU
GROUPED_FLOPS = 600e12  # of whole tiles, likewise


@dataclass(frozen=True)
class Ceilings:
    """What was seen on machines with such a GPU: a device copy, bytes read and written per second, and a bfloat16 GEMM
    of 8192^3 random numbers, FLOP/s. A machine that is far from them is not well."""

    copy: float
    gemm: float


CEILINGS = {"h100": Ceilings(3.0e12, 798e12), "h200": Ceilings(4.3e12, 788e12)}


@dataclass(frozen=True)
class Goal:
    """`figure` of a result, as `report.with_rates` names it, is to be at least `least`."""

    figure: str
    least: float
    text: str

    def judge(self, result: dict[str, Any]) -> dict[str, Any]:
        """{"goal", "met"}; met is None where nothing was measured."""
        found = result.get(self.figure)
        return {"goal": self.text, "met": None if found is None else bool(found >= self.least)}


def known_gpu(device_kind: str) -> str | None:
    """The key of CEILINGS for a GPU by the name that its driver gives it; None for one without goals."""
    return next((key for key in CEILINGS if key in device_kind.lower()), None)


def goal(case: Case, gpu: str) -> Goal | None:
    """None: this case is measured without a goal of its own."""

    def of_copy(percent: float) -> Goal:
        return Goal("percent_of_copy", percent, f"{percent:.0f} % of a copy")

    if isinstance(case, ExpertCase):
        seen, figure = CEILINGS[gpu], "percent_of_gemm" if case.compute_bound else "percent_of_copy"
        took = max(case.bytes / (0.92 * seen.copy), case.tile_flops / GROUPED_FLOPS)
        rate = case.flops / seen.gemm if case.compute_bound else case.bytes / seen.copy
        percent, of = 100 * rate / took, "a GEMM" if case.compute_bound else "a copy"
        return Goal(figure, percent, f"{percent:.0f} % of {of}" + (", in whole tiles" if case.flops else ""))
    if isinstance(case, AppendCase):
        return Goal("percent_of_copy", 100 / 1.3, "within 1.3 of its bytes' time")
    if isinstance(case, PrefillCase):
        percent = 100 * PREFILL_FLOPS / CEILINGS[gpu].gemm
        at_8k = case.rows == 8192 and not case.prefix
        return Goal("percent_of_gemm", percent, f"{percent:.0f} % of a GEMM, 600 TFLOP/s") if at_8k else None
    full = (case.rows, case.context) in _FULL
    if case.fp8:
        return of_copy(81) if full else None
    if case.ragged:
        return of_copy(80)
    return of_copy(92) if full else None


def expected_us(case: Case, gpu: str) -> float | None:
    """Microseconds by the tuning table of `gpu`, with all SMs."""
    if isinstance(case, DecodeCase):
        tuning, flops, moved = DECODE[gpu], 0, case.bytes
    elif isinstance(case, ExpertCase):
        tuning, flops, moved = GROUPED[gpu], case.tile_flops, case.bytes
    elif isinstance(case, AppendCase):
        tuning, flops, moved = APPEND[gpu], 0, case.bytes
    else:
        tuning, flops, moved = PREFILL[gpu], case.flops, 0
    expected = DECODE[gpu].expected_fp8 if isinstance(case, DecodeCase) and case.fp8 else tuning.expected
    return None if expected is None else expected.us(moved=moved, flops=flops, sms=tuning.sms, all_sms=tuning.sms)
