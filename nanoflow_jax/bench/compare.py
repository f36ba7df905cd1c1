"""Two runs of the same requests that differ in one thing: another plan, or one option toggled.

On a machine that others use too, or whose clock wanders, one pair says little: `repeat` pairs run in turn, A B A B, and
each pair gives a ratio.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from nanoflow_jax.bench.report import ThroughputOptions, ThroughputReport

SWITCHES = {  # by name: the option, and what it is called on and off
    "deterministic": ("deterministic", "deterministic", "not deterministic"),
    "no-prefix-caching": ("enable_prefix_caching", "prefix caching", "no prefix caching"),
}
TOGGLES = (*SWITCHES, "xla-attention")

Measure = Callable[[ThroughputOptions], ThroughputReport]


@dataclass(frozen=True)
class Side:
    """One of the two: what is run, and what it is called beside the other."""

    label: str
    options: ThroughputOptions


@dataclass(frozen=True)
class Comparison:
    """All runs, in the order of their pairs. `b` is empty where nothing was compared."""

    a: tuple[ThroughputReport, ...]
    b: tuple[ThroughputReport, ...]
    labels: tuple[str, str] | None = None

    @property
    def shown(self) -> list[ThroughputReport]:
        """Of each side, the run of median speed."""
        return [_middle(runs) for runs in (self.a, self.b) if runs]

    @property
    def ratios(self) -> list[float]:
        """a ÷ b by served tokens per second, of each pair."""
        return [
            x.served_tokens_per_second_per_gpu / y.served_tokens_per_second_per_gpu
            for x, y in zip(self.a, self.b, strict=True)
        ]

    def text(self) -> str:
        assert self.labels is not None
        ratios, count = self.ratios, len(self.ratios)
        spread = f" (median of {count} pairs in turn, {min(ratios):.3f} to {max(ratios):.3f})" if count > 1 else ""
        a, b = self.labels
        return f"{a} / {b}: {median(ratios):.3f} times the tokens/s served, in one run{spread}"

    def to_json(self) -> dict[str, Any]:
        """What is added to the report of the first side."""
        found: dict[str, Any] = {}
        if len(self.a) > 1:
            found["runs"] = [[r.served_tokens_per_second_per_gpu for r in runs] for runs in (self.a, self.b) if runs]
        if self.b:
            ratios = self.ratios
            found |= {"compare": self.shown[1].to_json(), "compared": list(self.labels or ())}
            found |= {"ratio": median(ratios), "ratios": ratios, "ratio_range": [min(ratios), max(ratios)]}
        return found


def sides(options: ThroughputOptions, other: str) -> tuple[Side, Side]:
    """What --compare OTHER runs: one of TOGGLES changes that option, anything else is a plan."""
    if other in SWITCHES:
        field, on, off = SWITCHES[other]
        was = getattr(options, field)
        first, second = (on, off) if was else (off, on)
        return Side(first, options), Side(second, replace(options, **{field: not was}))
    if other == "xla-attention":
        changed = replace(options, attention_backend="xla")
        return Side(f"attention {options.attention_backend}", options), Side("attention xla", changed)
    return Side(str(options.plan), options), Side(other, replace(options, plan=other))


def measure_in_turn(options: ThroughputOptions, other: str | None, repeat: int, measure: Measure) -> Comparison:
    """`repeat` runs, or pairs of runs when there is something to compare with. All have as many requests as the first,
    so that they are the same ones."""
    pair = sides(options, other) if other else (Side(str(options.plan), options),)
    found: tuple[list[ThroughputReport], ...] = ([], [])
    requests = options.requests
    for _ in range(repeat):
        for runs, side in zip(found, pair, strict=False):
            if found[0]:
                gc.collect()  # the engine before holds the device's memory
            runs.append(measure(replace(side.options, requests=requests)))
            requests = requests or runs[-1].options["requests"]
    labels = (found[0][0].plan, found[1][0].plan) if other and other not in TOGGLES else None
    if other and labels is None:
        labels = (pair[0].label, pair[-1].label)
    return Comparison(tuple(found[0]), tuple(found[1]), labels)


def _middle(runs: Sequence[ThroughputReport]) -> ThroughputReport:
    return sorted(runs, key=lambda r: r.served_tokens_per_second_per_gpu)[(len(runs) - 1) // 2]
