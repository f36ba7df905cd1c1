"""A replica as its front sees it, what a call has given it, and how long its answers are waited for."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from nanoflow_jax.engine.feed import Work
from nanoflow_jax.replicas.process import POLL_SECONDS, About

SILENT_SECONDS = 60.0  # a replica's process, which answers every POLL_SECONDS whatever its engine does, is then hung


@dataclass(eq=False)
class Member:
    """A replica as it is seen here. starting: the answer to `about` that is waited for; None: it is ready. begun: its
    process is there. hung: the actor that was ended for it, and why. failures: deaths since it last gave a result."""

    number: int
    actor: Any = None
    starting: Any = None
    begun: bool = False
    hung: tuple[Any, str] = (None, "")
    about: About | None = None
    failures: int = 0


@dataclass(eq=False)
class Load:
    """What a call has given a member: `held` is all that has no result, of which `new` is not sent yet."""

    member: Member
    actor: Any
    held: dict[int, Work] = field(default_factory=dict)
    new: list[Work] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)  # not wanted any more, and not told yet
    begun: set[int] = field(default_factory=set)  # numbers of which parts have been handed on
    count: int = 0  # completions held
    tokens: int = 0  # of these, at most
    asked: Any = None  # the answer that is waited for

    @property
    def room(self) -> int:
        about = self.member.about
        return 0 if about is None or self.member.starting is not None else about.capacity - self.count

    def give(self, number: int, work: Work) -> None:
        self.held[number] = work
        self.new.append(replace(work, key=number))
        self.count += work.completions
        self.tokens += self._tokens(work)

    def take(self, number: int) -> Work:
        work = self.held.pop(number)
        self.begun.discard(number)
        self.count -= work.completions
        self.tokens -= self._tokens(work)
        return work

    def drop(self, number: int) -> None:
        """It is not wanted any more."""
        self.take(number)
        sent = len(self.new)
        self.new = [work for work in self.new if work.key != number]
        if len(self.new) == sent:
            self.gone.append(number)

    def _tokens(self, work: Work) -> int:
        about, prompt = self.member.about, len(work.prompt_token_ids)
        room = about.max_model_len - prompt if about is not None else 0
        most = room if work.most_tokens is None else min(work.most_tokens, room)
        return prompt + work.completions * most


class Waits:
    """How long each answer has been waited for: only while someone was here to hear it. Where this process itself was
    stopped (Ctrl-Z, a laptop that sleeps), or its caller took its time, the answers may have come meanwhile."""

    def __init__(self, ray: Any):
        self._ray, self._seconds, self._last = ray, dict[Any, float](), 0.0

    def wait(self, refs: list[Any]) -> tuple[set[Any], list[Any]]:
        """Answers that are there, after a moment at the latest, so that a Ctrl-C is seen; and those that are late."""
        found = set[Any]()
        if refs and self._ray.wait(refs, num_returns=1, timeout=2 * POLL_SECONDS)[0]:
            found = set(self._ray.wait(refs, num_returns=len(refs), timeout=0)[0])
        passed, self._last = min(time.monotonic() - self._last, 1.0), time.monotonic()
        self._seconds = {ref: self._seconds.get(ref, 0.0) + passed for ref in refs if ref not in found}
        late = [ref for ref, seconds in self._seconds.items() if seconds > SILENT_SECONDS]
        for ref in late:
            del self._seconds[ref]
        return found, late
