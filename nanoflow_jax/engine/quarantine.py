"""Finding the request that makes steps fail: the suspects are tried in groups, halved at each failure.

A group that gets on (each of its requests has a new token, or has ended) waits until the last one has been tried. The
answer is exact when one request fails whatever runs beside it: only one that has failed in two trials of its own, one
right after the other, is given up. So one failure that passes by itself costs nobody anything but time, whenever it
comes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nanoflow_jax.engine.request import Request, error_line
from nanoflow_jax.engine.scheduler import Scheduler

GIVE_UP = 3  # requests that fail alone twice, one after another, with none that gets on: it is not the requests


@dataclass
class Quarantine:
    scheduler: Scheduler
    groups: list[list[Request]] = field(default_factory=list)  # still to be tried
    tried: list[Request] = field(default_factory=list)  # the group that has rows in the step in flight
    trial: list[tuple[Request, int]] = field(default_factory=list)  # the same until it gets on: request, tokens it had
    held: list[Request] = field(default_factory=list)  # everybody else, until all groups have been tried
    accused: Request | None = None  # failed in a trial of its own, and is on trial again
    failed_alone: int = 0  # requests given up, or that had ended, since somebody got on

    @property
    def has_work(self) -> bool:
        return bool(self.groups or self.tried or self.held)

    @property
    def is_open(self) -> bool:
        """No trial is under way."""
        return not self.groups and not self.tried

    def add(self, request: Request) -> None:
        if self.is_open:
            self.scheduler.add(request)
        else:
            self.held.append(request)

    def remove(self, request: Request) -> None:
        """Forgets a request that has ended or is about to."""
        self.held = [r for r in self.held if r is not request]
        self.groups = [g for group in self.groups if (g := [r for r in group if r is not request])]

    def clear(self) -> list[Request]:
        """Forgets everything; returns the requests that were here and not in the scheduler."""
        there = set(map(id, self.scheduler.waiting))
        gone = [r for r in [*self.held, *(r for group in self.groups for r in group)] if id(r) not in there]
        self.groups, self.tried, self.trial, self.held = [], [], [], []
        self.accused, self.failed_alone = None, 0
        return gone

    def failed(self, suspects: list[Request], error: Exception) -> list[Request]:
        """A step with `suspects` has failed; all of them wait in the scheduler now. Returns those given up, with the
        error. Raises it when it is plainly not a request's fault."""
        alone = len(self.tried) == 1
        suspects = [r for r in self.tried or suspects if not r.finish_reason]  # in a trial nobody else runs
        given_up: list[Request] = []
        if alone and suspects and suspects[0] is not self.accused:
            self.accused = suspects[0]
            self.groups.append(suspects)  # the next to be tried
        elif alone or not suspects:
            self.accused = None
            self.failed_alone += 1
            if self.failed_alone >= GIVE_UP:
                raise error
            for request in suspects:
                request.finish("error", error=error_line(error))
                given_up.append(request)
        else:
            middle = len(suspects) // 2
            self.groups += [group for group in (suspects[middle:], suspects[:middle]) if group]
        known = {id(r) for group in self.groups for r in group} | {id(r) for r in given_up}
        self.held = [r for r in [*self.held, *self.scheduler.waiting] if id(r) not in known]
        self.scheduler.waiting.clear()
        self._go_on()
        return given_up

    def progressed(self) -> None:
        """A step has gone well: the group on trial may have passed."""
        if not self.tried:
            self.failed_alone = 0
        elif not self.trial:  # it passed the last time, and its last step has been booked now
            self._go_on()
        elif all(request.finish_reason or self._length(request) > had for request, had in self.trial):
            self.accused, self.failed_alone = None, 0
            for request in self.tried:
                if request.slot is not None:
                    self.scheduler.preempt(request.slot)
                if request in self.scheduler.waiting:
                    self.scheduler.waiting.remove(request)
                    self.held.append(request)
            self.trial = []

    def _length(self, request: Request) -> int:
        return len(request.tokens) if request.slot is None else int(self.scheduler.running.known[request.slot])

    def _go_on(self) -> None:
        """Starts the next trial, or lets everybody in when there is none left."""
        if self.groups:
            self.tried = self.groups.pop()
            self.trial = [(r, len(r.tokens)) for r in self.tried]
            entering = self.tried
        else:
            self.tried, self.trial = [], []
            entering, self.held = self.held, []
        for request in entering:
            self.scheduler.add(request)
