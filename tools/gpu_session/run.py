"""Runs the parts of a GPU session: each in a process group of its own that ends at its time limit, whatever it does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanoflow_jax.system.output_files import create
from tools.gpu_session.parts import SANITIZER, SANITIZER_SECONDS, Part, grouped

CHILD = "tools.gpu_session.child"
LEAST_SECONDS = 5  # of time left: less is not worth beginning a part
POLL = 0.05

State = dict[str, dict[str, Any]]


@dataclass
class Running:
    part: Part
    process: subprocess.Popen[bytes]
    began: float
    limit: float
    seconds: float = 0.0


@dataclass
class Session:
    """Where parts run. state: what is known of each by its name, which `saved` is told to keep after every change.

    end      of the call, by time.monotonic
    digest   of the sources: what was done with others is done again
    """

    folder: Path
    environment: dict[str, str]
    end: float
    digest: str
    saved: Callable[[], None]
    state: State = field(default_factory=dict)
    _running: list[Running] = field(default_factory=list)

    def run(self, parts: Sequence[Part]) -> None:
        """All of them in order, as far as the time reaches. A part may take half as long again as its limit, out of
        what those before it have left of theirs."""
        began, planned = time.monotonic(), 0.0
        for group in grouped(parts):
            spare = max(0.0, planned - (time.monotonic() - began))
            planned += max(part.seconds for part in group)
            ready = [part for part in group if self._begin(part)]
            self._running = [self._start(part, spare=spare) for part in ready]
            self._wait()
            for part in ready:
                if self.state[part.name]["status"] != "done" and part.sanitize:
                    self._sanitize(part)

    def kill(self) -> None:
        """Ends what runs now."""
        for running in self._running:
            if running.process.poll() is None:
                self._stop(running)

    def done(self, part: Part) -> bool:
        known = self.state.get(part.name, {})
        same = known.get("command") == list(part.arguments) and known.get("digest") == self.digest
        return same and known["status"] == "done"

    def _begin(self, part: Part) -> bool:
        """Whether it is to run; else its state says why not."""
        if self.done(part):
            print(f"{part.name}: done before", file=sys.stderr)
            return False
        missing = [name for name in part.needs if self.state.get(name, {}).get("status") != "done"]
        program = part.prefix and shutil.which(part.prefix[0], path=self.environment.get("PATH"))
        if missing:
            self._note(part, f"skipped: {', '.join(missing)} not done")
        elif program is None:
            self._note(part, f"skipped: {part.prefix[0]} is not on this machine")
        elif self.end - time.monotonic() < min(LEAST_SECONDS, part.seconds):
            self._note(part, "no time was left")
        else:
            return True
        return False

    def _start(self, part: Part, suffix: str = "", spare: float = 0.0) -> Running:
        arguments = [a.replace("{out}", str(self.folder)) for a in part.arguments]
        times = self.folder / f"{part.name}{suffix}.times"
        times.unlink(missing_ok=True)
        if arguments[0] == "-m":
            arguments = ["-m", CHILD, str(times), *arguments[1:]]
        # A group of its own, to be ended with all that it has started, but no session: what is left over when this
        # process is killed ends with its terminal or machine.
        with (
            create(self.folder / f"{part.name}{suffix}.json") as out,
            create(self.folder / f"{part.name}{suffix}.log") as err,
        ):
            process = subprocess.Popen(
                [*part.prefix, sys.executable, *arguments],
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0,
                env=self.environment | dict(part.environment),
            )  # fmt: skip
        now = time.monotonic()
        limit = part.seconds + min(spare, part.seconds / 2)
        return Running(part, process, now, max(0.0, min(limit, self.end - now)))

    def _wait(self) -> None:
        left = list(self._running)
        try:
            while left:
                time.sleep(POLL)
                now = time.monotonic()
                for running in list(left):
                    code = running.process.poll()
                    running.seconds = now - running.began
                    if code is None and running.seconds < running.limit:
                        continue
                    left.remove(running)
                    if code is None:
                        status = f"stopped after {running.limit:.0f} s"
                    else:
                        status = "done" if code == 0 else self._last_line(running.part) or f"exit status {code}"
                    self._stop(running)
                    if status == "done" and result(self.folder / f"{running.part.name}.json") is None:
                        status = "printed no JSON"
                    self._note(running.part, status, running.seconds)
        finally:
            self.kill()

    def _stop(self, running: Running) -> None:
        """Whatever is left of its group: a child of a process that has ended too."""
        with suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()

    def _sanitize(self, part: Part) -> None:
        """Runs the smallest case of a part that failed under compute-sanitizer."""
        program = shutil.which(SANITIZER[0], path=self.environment.get("PATH"))
        seconds = min(SANITIZER_SECONDS, self.end - time.monotonic())
        if program is None or seconds < LEAST_SECONDS:
            return
        smallest = replace(part, arguments=part.sanitize, seconds=int(seconds), prefix=SANITIZER)
        running = self._start(smallest, ".sanitizer")
        self._running = [running]
        try:
            code: int | None = running.process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            self._stop(running)
        lines = [
            line
            for kind in ("json", "log")
            for line in (self.folder / f"{part.name}.sanitizer.{kind}").read_text(errors="replace").splitlines()
            if line.startswith("=========") and any(word in line for word in ("Invalid", "Error", "error", "ERROR"))
        ]
        ended = f"stopped after {seconds:.0f} s" if code is None else f"exit status {code}"
        self.state[part.name]["sanitizer"] = "; ".join([ended, *(line.strip("= ") for line in lines[:2])])
        print(f"{part.name}: compute-sanitizer: {self.state[part.name]['sanitizer']}", file=sys.stderr)
        self.saved()

    def _note(self, part: Part, status: str, seconds: float = 0.0) -> None:
        times = result(self.folder / f"{part.name}.times") or {} if seconds else {}
        self.state[part.name] = {
            "status": status,
            "seconds": round(seconds, 1),
            "compile_seconds": round(times.get("compile_seconds", 0.0) + times.get("lower_seconds", 0.0), 1),
            "programs": times.get("programs", 0),
            "cached": times.get("cached", 0),
            "command": list(part.arguments),
            "digest": self.digest,
        }
        self.saved()
        took = f" ({seconds:.0f} s" + (
            f", compiling {self.state[part.name]['compile_seconds']:.0f} s: {times['programs']} programs, "
            f"{times['cached']} from the cache)" if times else ")"
        )  # fmt: skip
        print(f"{part.name}: {status}{took if seconds else ''}", file=sys.stderr, flush=True)

    def _last_line(self, part: Part) -> str:
        log = (self.folder / f"{part.name}.log").read_text(errors="replace")
        lines = [line for line in log.splitlines() if line.strip()]
        return lines[-1].replace("|", "/")[:300] if lines else ""


def result(path: Path) -> dict[str, Any] | None:
    """What a part printed: its JSON object, or {"lines": its JSON lines}; None when there is none."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    try:
        found = json.loads(text)
        return found if isinstance(found, dict) else None
    except ValueError:
        lines = []
        for line in text.splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue
            lines += [found] if isinstance(found, dict) else []
        return {"lines": lines} if lines else None
