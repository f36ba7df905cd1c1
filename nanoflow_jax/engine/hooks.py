"""What admission and eviction do on the device: bias rows, token histories, pages that go and come back."""

from __future__ import annotations

import numpy as np

from nanoflow_jax.engine.offload import OffloadStore
from nanoflow_jax.engine.pages import Key
from nanoflow_jax.engine.request import Request
from nanoflow_jax.engine.runner import Runner
from nanoflow_jax.engine.slot_table import SlotTable
from nanoflow_jax.step.sampler_tables import SamplerTables


class Hooks:
    """offload: where evicted pages go; None: nowhere."""

    def __init__(self, runner: Runner, tables: SamplerTables, running: SlotTable, offload: OffloadStore | None):
        self._runner, self._tables, self._running, self.offload = runner, tables, running, offload
        self._biases: dict[Request, tuple[int, int]] = {}

    def biases(self, request: Request) -> tuple[int, int] | None:
        """Rows of the bias table for a request (below min_tokens, then), or None while the table is full."""
        rows = self._tables.acquire(request.params, request.stop_tokens)
        if rows is not None:
            self._biases[request] = rows
        return rows

    def release(self, request: Request) -> None:
        """Gives its rows back."""
        for row in self._biases.pop(request, ()):
            self._tables.release(row)

    def enter(self, request: Request) -> None:
        """A request has taken its slot: its token history goes to the device."""
        assert request.slot is not None
        if self._running.history[request.slot] == request.slot:
            self._tables.write_history(request.slot, request.prompt_token_ids, request.output_token_ids)

    def evict(self, pages: list[int], keys: list[Key]) -> None:
        """Copies pages away before they are reused."""
        if self.offload is not None and (wanted := self.offload.missing(keys)):
            contents = self._runner.extract([pages[i] for i in wanted])
            self.offload.put([keys[i] for i in wanted], contents)

    def offloaded(self, keys: list[Key]) -> int:
        """How many of these keys, from the first on, could be restored."""
        return 0 if self.offload is None else self.offload.count(keys)

    def restore(self, keys: list[Key], pages: np.ndarray) -> int:
        """Copies offloaded pages with these keys back to these pages; returns how many, from the first on."""
        assert self.offload is not None
        contents = self.offload.get(keys)
        self._runner.insert(pages[: len(contents)].tolist(), contents)
        return len(contents)

    def reset(self) -> None:
        """The device's state is fresh: nobody has a row."""
        self._biases.clear()
        self._tables.reset()
