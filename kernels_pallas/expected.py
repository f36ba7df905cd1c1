"""How long a call is expected to take, and how XLA's scheduler is told: it knows nothing of a custom call, and counts
one as about nothing. XLA copies the attribute to the get-tuple-elements of a call, and its estimator for Hopper counts
those too: with several results a call seems to take a multiple, unless a profile says otherwise (the engine's does).

Paged attention's time depends on lengths that are data. Callers say what context to expect (`expected_context`);
without, the whole width of the page table counts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from jax.experimental.xla_metadata import set_xla_metadata

LATENCY = "latency_metadata"  # the frontend attribute, in nanoseconds, that XLA's latency estimator reads


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What one kernel reaches on one GPU.

    bytes_per_second     of memory, with all SMs
    sm_bytes_per_second  what one SM can take, which binds a kernel that is given few of them
    flops_per_second     of the tensor cores, with all SMs
    start_us             what a call takes whatever its size: the launch, the first loads, the last stores
    source               where the rates come from
    """

    source: str
    bytes_per_second: float = float("inf")
    sm_bytes_per_second: float = float("inf")
    flops_per_second: float = float("inf")
    start_us: float = 3.0

    def __post_init__(self) -> None:
        for name in ("bytes_per_second", "sm_bytes_per_second", "flops_per_second"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name}: {value} must be above 0")
        if not self.start_us >= 0:
            raise ValueError(f"start_us: {self.start_us} must be at least 0")

    def us(self, *, moved: float, flops: float = 0.0, sms: int, all_sms: int) -> float:
        """Microseconds of a call that moves so many bytes and needs so many FLOP, on `sms` of the GPU's SMs."""
        bytes_per_second = min(self.bytes_per_second, sms * self.sm_bytes_per_second)
        busy = max(moved / bytes_per_second, flops / (self.flops_per_second * sms / all_sms))
        return self.start_us + busy * 1e6


def expected_us(expected: Expected | None, moved: float, sms: int, all_sms: int) -> float | None:
    """Of a call that moves bytes alone; None where nobody knows."""
    return None if expected is None else expected.us(moved=moved, sms=sms, all_sms=all_sms)


def scheduled_as(us: float | None) -> AbstractContextManager[object]:
    """What is called inside is scheduled as taking so many microseconds; None leaves it to XLA."""
    return nullcontext() if us is None else set_xla_metadata(**{LATENCY: str(max(1, round(us * 1000)))})
