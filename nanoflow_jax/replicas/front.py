"""Replicas of a model behind one `LLM`: each has a process and devices of its own, which Ray gives it.

    LLM        prepare | hand out | take what has ended | hand out ...      to the replica with the most room
    replica    an LLM with a thread per call, kept full                     says what has ended

The prompts that a replica has are known here, so when it dies they go to others, and none is answered twice. One that
hangs is ended, and then has died.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.feed import Score, Work
from nanoflow_jax.engine.request import RequestOutput
from nanoflow_jax.options import LLMOptions
from nanoflow_jax.parallel.processes import joined
from nanoflow_jax.replicas.layout import Layout, find_layout
from nanoflow_jax.replicas.process import POLL_SECONDS, About, Hung, Replica, cause_line, check_plan
from nanoflow_jax.system.install import install_command
from nanoflow_jax.system.platform import num_gpus
from nanoflow_jax.weights.fingerprint import model_fingerprint

logger = logging.getLogger("nanoflow_jax")

TRIES = 3  # of a prompt, or of a replica's start, after a replica has died
PULLS = 4096  # of "nothing this time" in a turn
CALLS = 16  # that a replica answers at once
SILENT_SECONDS = 60.0  # a replica's process, which answers every POLL_SECONDS whatever its engine does, is then hung

Ended = list[tuple[Work, RequestOutput | Score]]


class ReplicaError(ConfigError):
    """The replicas cannot go on; one line."""


@dataclass(eq=False)
class _Member:
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
class _Load:
    """What a call has given a member: `held` is all that has no result, of which `new` is not sent yet."""

    member: _Member
    actor: Any
    held: dict[int, Work] = field(default_factory=dict)
    new: list[Work] = field(default_factory=list)
    count: int = 0  # completions held
    asked: Any = None  # the answer that is waited for

    @property
    def room(self) -> int:
        about = self.member.about
        return 0 if about is None or self.member.starting is not None else about.capacity - self.count

    def give(self, number: int, work: Work) -> None:
        self.held[number] = work
        self.new.append(replace(work, key=number))
        self.count += work.completions

    def take(self, number: int) -> Work:
        work = self.held.pop(number)
        self.count -= work.completions
        return work


class Replicas:
    """Starts the replicas, and runs prompts on them. Several threads may do so at once.

    Raises ConfigError, one line: Ray is not installed, too few devices, an LLM that cannot be made. Ray is started on
    this machine, or joined where RAY_ADDRESS names a cluster or the program has called `ray.init`."""

    num_rows = 0  # prompt tokens of what has ended, and tokens it generated

    def __init__(self, make: Callable[..., Any], options: LLMOptions, folder: Path):
        if joined() is not None:
            raise ConfigError(
                "data_parallel_size: a replica is one process; accepted: several replicas, or several processes "
                "(--distributed, --coordinator), not both"
            )
        layout = find_layout(options)
        self._ray = _ray()
        self._make, self._options, self._layout = make, options, layout
        self._fingerprint, self._plan = model_fingerprint(folder), None
        self._started_here = not self._ray.is_initialized()
        self._lock, self._calls, self._seeds = threading.Lock(), itertools.count(), itertools.count()
        try:
            if self._started_here:
                _start(self._ray, layout)
            gpus = int(self._ray.cluster_resources().get("GPU", 0))
            self.members = [_Member(i) for i in range(layout.count(gpus))]
            for member in self.members:
                self._begin(member)
            waits = _Waits(self._ray)
            while any(member.starting is not None for member in self.members):
                self._listen(waits, {})
            first = self.members[0].about
            assert first is not None
            self.plan, self.device_kind, self.prefill_rows = first.plan, first.device_kind, first.prefill_rows
            self._plan = first.plan.identity
            for about in (m.about for m in self.members if m.about is not None):
                check_plan(self._plan, about.plan, about.device_kind, about.node)
            self.max_model_len = min(m.about.max_model_len for m in self.members if m.about is not None)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the replicas, and Ray where it was started here."""
        if self._started_here:
            self._ray.shutdown()
        else:
            for member in self.members:
                self._ray.kill(member.actor)

    def run(self, work: Iterable[Work | None], most: int | None = None) -> Generator[Ended]:
        """As `LLM.run_steps`: yields what has ended, now and then nothing. most: only so many replicas are used.

        Raises ReplicaError when a prompt has lost its replica several times, or a replica does not start again.
        """
        ray, call = self._ray, next(self._calls)
        loads = [_Load(member, member.actor) for member in self.members[:most]]
        source, more = iter(work), True
        again: deque[tuple[int, Work]] = deque()
        deaths: dict[int, int] = {}
        numbers, waits = itertools.count(), _Waits(ray)
        try:
            while True:
                for _ in range(PULLS):
                    load = max(loads, key=lambda load: load.room)
                    if load.room <= 0:
                        break
                    if again:
                        load.give(*again.popleft())
                        continue
                    if not more:
                        break
                    try:
                        item = next(source)
                    except StopIteration:
                        more = False
                        break
                    if item is not None:
                        load.give(next(numbers), self._seeded(item))
                for load in loads:
                    load.actor = load.actor if load.held else load.member.actor
                    if load.held and load.asked is None:
                        load.asked, load.new = load.actor.exchange.remote(call, load.new), []
                waited = {load.asked: load for load in loads if load.asked is not None}
                if not waited and not more and not again:
                    return
                ended: Ended = []
                for load in self._listen(waits, waited):
                    actor, ref, load.asked = load.actor, load.asked, None
                    try:
                        results = self._get(load.member, actor, ref)
                    except ray.exceptions.RayActorError:
                        self._died(load.member, actor, len(load.held))
                        for number, item in load.held.items():
                            deaths[number] = deaths.get(number, 0) + 1
                            if deaths[number] > TRIES:
                                raise ReplicaError(
                                    f"data_parallel_size: a prompt has lost its replica {deaths[number]} times; the "
                                    "results so far are kept"
                                ) from None
                            again.append((number, item))
                        load.held, load.new, load.count = {}, [], 0
                        continue
                    except ray.exceptions.RayError as error:
                        raise ReplicaError(f"data_parallel_size: {cause_line(error)}") from None
                    if results:
                        load.member.failures = 0
                    ended += [(load.take(number), output) for number, output in results]
                    self.num_rows += sum(_rows(output) for _, output in results)
                yield ended
        finally:
            for load in loads:
                if load.held:
                    load.actor.close.remote(call)

    def _seeded(self, work: Work) -> Work:
        """A request without a seed has one by its order of arrival, as in one LLM: not one of its replica's, where
        others have the same."""
        params = work.params
        if params.seed is not None or work.scored_from is not None or params.temperature == 0:
            return work
        spawn = np.random.SeedSequence([self._options.seed, next(self._seeds)])
        return replace(work, params=replace(params, seed=int(spawn.generate_state(1, np.uint32)[0])))

    def _listen(self, waits: _Waits, waited: dict[Any, _Load]) -> list[_Load]:
        """Waits a moment for answers. Takes those of replicas that are starting, ends the replicas that hang, and
        returns the loads that have an answer."""
        starting = {member.starting: member for member in self.members if member.starting is not None}
        found, late = waits.wait([*waited, *starting])
        for ref in found & starting.keys():
            self._ready(starting[ref], ref)
        for ref in late:
            load, why = waited.get(ref), f"no answer for {SILENT_SECONDS:.0f} s"
            if load is not None:
                self._end(load.member, load.actor, why)
            elif (member := starting[ref]).begun:  # else Ray is looking for a place for it
                self._end(member, member.actor, why)
        return [waited[ref] for ref in found & waited.keys()]

    def _get(self, member: _Member, actor: Any, ref: Any) -> Any:
        """As Ray's; a replica that says it hangs is ended first."""
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            if not isinstance(cause := getattr(error, "cause", None), Hung):
                raise
            self._end(member, actor, str(cause))
            raise self._ray.exceptions.RayActorError from None

    def _end(self, member: _Member, actor: Any, why: str) -> None:
        """Ends a replica that hangs: what is waited for from it then fails."""
        member.hung = actor, why
        self._ray.kill(actor)

    def _begin(self, member: _Member) -> None:
        """Starts its actor; `starting` tells when it is ready."""
        layout, options = self._layout, {**self._options.arguments(), "data_parallel_size": 1, "progress": False}
        options["tensor_parallel_size"] = layout.devices
        if self._options.kv_offload_folder is not None:  # two processes do not share one
            options["kv_offload_folder"] = str(Path(self._options.kv_offload_folder) / f"replica-{member.number}")
        given: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0 if layout.on_cpu else layout.devices}
        if layout.on_cpu:
            given["scheduling_strategy"] = "SPREAD"
        if not self._started_here or layout.cluster:  # else they have the variables of this process
            given["runtime_env"] = {"env_vars": _variables(layout)}
        actor = self._ray.remote(Replica).options(**given, max_concurrency=CALLS)
        member.actor, member.begun = actor.remote(self._make, options, self._fingerprint, self._plan), False
        member.starting = member.actor.about.remote()

    def _ready(self, member: _Member, starting: Any) -> None:
        """Takes what a starting replica says of itself: that it is not ready yet, or how it is."""
        with self._lock:
            actor = member.actor
            if member.starting is not starting:  # another call has
                return
        try:
            about = self._ray.get(starting)
        except self._ray.exceptions.RayActorError:
            self._died(member, actor, 0)
        except self._ray.exceptions.RayError as error:
            raise ReplicaError(cause_line(error)) from None
        else:
            with self._lock:
                if member.starting is starting:
                    member.begun, member.about = True, about or member.about
                    member.starting = actor.about.remote() if about is None else None

    def _died(self, member: _Member, actor: Any, held: int) -> None:
        """Starts a dead replica again, and says so."""
        with self._lock:
            if member.actor is not actor:  # another call has
                return
            about, member.failures = member.about, member.failures + 1
            who = f"replica {member.number + 1} of {len(self.members)}"
            if about is not None:
                who += f" (process {about.process}{f' on GPUs {about.gpus}' if about.gpus else ''})"
            if member.failures > TRIES:
                raise ReplicaError(
                    f"data_parallel_size: {who} has died or hung {member.failures} times without a result; the results "
                    "so far are kept"
                )
            what = f"hangs ({member.hung[1]}) and is ended" if member.hung[0] is actor else "has died"
            logger.warning("%s %s; it is started again, and its %d prompts are answered anew", who, what, held)
            self._begin(member)


class _Waits:
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


def _rows(output: RequestOutput | Score) -> int:
    if not isinstance(output, RequestOutput):
        return 0
    return len(output.prompt_token_ids) + sum(len(completion.token_ids) for completion in output.outputs)


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"data_parallel_size: Ray starts the replicas, and is not installed ({error.name}); accepted: "
            f"{install_command('ray')}"
        ) from None
    return ray


def _start(ray: Any, layout: Layout) -> None:
    given: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    variables = {}
    if not layout.cluster:
        given |= {"address": "local", "include_dashboard": False, "num_cpus": 1}
        variables = _variables(layout)
        if not layout.on_cpu:
            given["num_gpus"] = num_gpus()
    # What Ray says of dead workers would go to standard output, where results are; it is told here, in a line.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)  # JAX's: its processes exec
            ray.init(**given)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _variables(layout: Layout) -> dict[str, str]:
    """Of a replica's process."""
    found = {name: os.environ[name] for name in ("NANOFLOW_COMPILE_CACHE", "XLA_FLAGS") if name in os.environ}
    if layout.on_cpu:
        count = os.environ.get("JAX_NUM_CPU_DEVICES") or str(layout.devices)
        found |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": count}
    return found
