"""What the kernels are meant to reach on an H200, and what the tuning tables expect, beside what was measured.

Where a measurement differs from the expected time, the table is what should change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kernels_pallas.bench.cases import AppendCase, Case, DecodeCase, PrefillCase
from kernels_pallas.tuning import APPEND, DECODE, PREFILL

GOALS_FOR = "h200"
_FULL = {(32, 4096), (1280, 1024)}  # (requests, context) of decode steps that fill the GPU


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


def goal(case: Case) -> Goal | None:
    """None: this case is measured without a goal of its own."""
    if isinstance(case, AppendCase):
        return Goal("percent_of_copy", 100 / 1.3, "within 1.3 of its bytes' time")
    if isinstance(case, PrefillCase):
        at_8k = case.rows == 8192 and not case.prefix
        return Goal("flops_per_second", 600e12, "600 TFLOP/s") if at_8k else None
    if case.fp8:
        return Goal("bytes_per_second", 3.5e12, "3.5 TB/s") if (case.rows, case.context) in _FULL else None
    if case.ragged:
        return Goal("percent_of_copy", 80, "80 % of a copy")
    return Goal("percent_of_copy", 92, "92 % of a copy") if (case.rows, case.context) in _FULL else None


def expected_us(case: Case, gpu: str) -> float | None:
    """Microseconds by the tuning table of `gpu`, with all SMs."""
    if isinstance(case, DecodeCase):
        tuning = DECODE[gpu]
        expected, flops = (tuning.expected_fp8 if case.fp8 else tuning.expected), 0
        moved = case.bytes
    elif isinstance(case, AppendCase):
        tuning, flops, moved = APPEND[gpu], 0, case.bytes
        expected = tuning.expected
    else:
        tuning, flops, moved = PREFILL[gpu], case.flops, 0
        expected = tuning.expected
    return None if expected is None else expected.us(moved=moved, flops=flops, sms=tuning.sms, all_sms=tuning.sms)
