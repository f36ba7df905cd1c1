"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_NOTES = 0.5  # on a terminal, while the count stands


class Progress:
    """Counts to `total`; None: to what the first `report` says, and nothing is shown before it. Use as a context
    manager; `advance` moves on, perhaps by nothing, with a new `note` behind the count."""

    def __init__(self, total: int | None, title: str, unit: str = "it", enabled: bool = True):
        self._bar: Any = None
        self._enabled, self._lines = enabled, enabled and not sys.stderr.isatty()
        self._title, self._unit, self._done, self._note = title, unit, 0, ""
        self._last, self._total = time.monotonic(), total
        if total is not None:
            self._begin(total)

    def _begin(self, total: int) -> None:
        self._total = total
        if self._enabled and not self._lines:
            self._bar = tqdm(
                total=total, desc=self._title, unit=self._unit, unit_scale=self._unit == "B", dynamic_ncols=True
            )

    def report(self, done: int, total: int) -> None:
        """So much is done of so much."""
        if self._total is None:
            self._begin(total)
        self.advance(done - self._done)

    def advance(self, count: int = 1, note: str = "") -> None:
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(count)
            if not count and time.monotonic() - self._last > SECONDS_BETWEEN_NOTES:
                self._last = time.monotonic()
                self._bar.refresh()
        elif self._lines and (
            (count and self._done == self._total) or time.monotonic() - self._last > SECONDS_BETWEEN_LINES
        ):
            self._last = time.monotonic()
            in_bytes = self._unit == "B"
            scale, unit = (1e6 if in_bytes else 1), ("MB" if in_bytes else self._unit)
            done = f"{self._done / scale:.4g}/{(self._total or 0) / scale:.4g}"
            print(f"{self._title}: {done} {unit} {self._note}".rstrip(), file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
