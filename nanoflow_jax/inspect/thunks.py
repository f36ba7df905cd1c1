"""What the host does at run time: the sequence of thunks that XLA's runtime works through, from the compiler's dump.

Thunks inside a command buffer are one launch. For a conditional, or a loop of unknown length, outside of one the host
copies the predicate back and waits: the next step cannot be dispatched before this one is nearly done.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nanoflow_jax.step.compile import Option

WAITING = ("Conditional", "While")
COUNTED = "CountedWhile"  # a loop whose trip count XLA knows: the host asks nobody
_DUMPED = "*thunk_sequence*.txt"  # with command buffers, once more after the passes that make them
_TOP = re.compile(r"(\d+): k(\w+)")


@dataclass(frozen=True)
class Thunks:
    """Of one device's program. outside: kinds of the thunks that are in no command buffer, with how many of each."""

    command_buffers: int
    outside: Mapping[str, int]

    @property
    def host_waits(self) -> int:
        """Conditionals and loops for which the host waits."""
        return sum(self.outside.get(kind, 0) for kind in WAITING)

    def text(self) -> str:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(self.outside.items())) or "nothing"
        return (
            f"launches: {self.command_buffers} command buffers, outside of them {listed}; "
            f"the host waits {self.host_waits} times for a predicate"
        )


def parse_thunks(text: str, hlo: str = "") -> Thunks:
    """Reads the dump of a thunk sequence, whose loops are counted ones when all of the program's are (hlo: its text).
    Raises ValueError when there is no thunk in it."""
    found = [match.group(2) for line in text.splitlines() if (match := _TOP.match(line))]
    loops = [line for line in hlo.splitlines() if " while(" in line]
    if loops and all("known_trip_count" in line for line in loops):
        found = [COUNTED if kind == "While" else kind for kind in found]
    if not found:
        raise ValueError("no thunk at the top level: this is not the dump of a thunk sequence")
    outside = Counter(kind for kind in found if kind != "CommandBuffer")
    return Thunks(len(found) - outside.total(), dict(outside))


def dump_options(folder: Path) -> dict[str, Option]:
    """Compiler options that make XLA write the thunk sequence, among much else, to a folder."""
    return {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}


def dumped_thunks(folder: Path, hlo: str) -> Thunks | None:
    """Of the program compiled last with `dump_options(folder)`, whose text is `hlo`; None where this XLA writes no
    thunk sequence."""
    files = sorted(folder.glob(_DUMPED), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return parse_thunks(files[-1].read_text(), hlo) if files else None
