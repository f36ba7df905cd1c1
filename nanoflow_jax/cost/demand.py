"""What a step has to do: its rows, and how much context they attend to; and what a workload asks of the average
step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nanoflow_jax.config import ConfigError
from nanoflow_jax.plan.plan import ROW_QUANTUM
from nanoflow_jax.workload import Workload

PAGE_SIZE = 64  # tokens per KV page, the engine's default
SAMPLES = 4096  # requests drawn from a workload with random lengths


@dataclass(frozen=True)
class StepLoad:
    """Rows of a step and the mean number of tokens that each kind attends to."""

    decode_rows: int
    prefill_rows: int
    decode_context: float
    prefill_context: float

    def __post_init__(self) -> None:
        if min(self.decode_rows, self.prefill_rows) < 0 or not self.rows:
            raise ConfigError(f"load: {self.decode_rows} decode and {self.prefill_rows} prefill rows; a step has some")
        for name in ("decode_context", "prefill_context"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"load: {name} {getattr(self, name)} must not be negative")

    @property
    def rows(self) -> int:
        return self.decode_rows + self.prefill_rows


@dataclass(frozen=True)
class Demand:
    """Averages over the requests of a workload, in tokens.

    prefill_rows    of a request: its prompt
    decode_rows     of a request: its output without the first token, which the prompt's last row gives
    decode_context  that a decode row attends to
    prefill_context that a prefill row attends to
    """

    name: str
    prefill_rows: float
    decode_rows: float
    decode_context: float
    prefill_context: float

    @staticmethod
    def of(workload: Workload, model_limit: int, seed: int = 0) -> Demand:
        """Raises ConfigError when the workload's requests do not fit the model."""
        limit = workload.limit(model_limit)
        pairs = np.array(workload.lengths(len(workload.entries) or SAMPLES, limit, seed), dtype=float)
        prompt, steps = pairs[:, 0], pairs[:, 1] - 1
        contexts = (steps * (prompt + (steps + 1) / 2)).sum()
        return Demand(
            workload.name,
            float(prompt.mean()),
            float(steps.mean()),
            float(contexts / steps.sum()) if steps.any() else 0.0,
            float((prompt * (prompt + 1) / 2).sum() / prompt.sum()),
        )

    def step(
        self,
        tokens: int,
        most_resident: float | None = None,
        decode_slots: int | None = None,
        quantum: int = ROW_QUANTUM,
    ) -> StepLoad:
        """The average step of `tokens` rows once the engine runs steadily: as many requests end as begin, so
        decode and prefill rows are to each other as in a request. Both are multiples of `quantum`.

        most_resident: tokens of KV that may be in pages at once; decode_slots: requests that may run at once. When
        either is the tighter limit, a step has fewer rows. `tokens` is at least 2 * quantum.
        """
        if not self.decode_rows:
            return StepLoad(0, tokens, 0.0, self.prefill_context)
        wanted = tokens * self.decode_rows / (self.decode_rows + self.prefill_rows)
        most = math.inf if most_resident is None else max(0.0, most_resident - self.prefill_rows) / self.held
        most = min(most, math.inf if decode_slots is None else decode_slots)
        if wanted <= most:
            rows = max(quantum, min(round(wanted / quantum) * quantum, tokens - quantum))
            prefill = tokens - rows
        else:
            rows = max(quantum, int(most) // quantum * quantum)
            prefill = max(quantum, round(rows * self.prefill_rows / self.decode_rows / quantum) * quantum)
        return StepLoad(rows, prefill, self.decode_context, self.prefill_context)

    def resident(self, load: StepLoad) -> float:
        """Tokens of KV in pages during such a step: of the requests that decode, and of a prompt on its way in."""
        return load.decode_rows * self.held + (self.prefill_rows if load.prefill_rows else 0.0)

    @property
    def request(self) -> int:
        """Tokens of KV of the average request at its end."""
        return round(self.prefill_rows + self.decode_rows)

    @property
    def held(self) -> float:
        """By one request: its context, and half a page that is not full."""
        return self.decode_context + PAGE_SIZE / 2
