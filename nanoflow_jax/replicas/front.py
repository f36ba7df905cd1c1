"""Replicas of a model behind one `LLM`: each has a process and devices of its own, which Ray gives it.

    LLM        prepare | hand out | take what has ended | hand out ...      to the one with the fewest tokens in flight
    replica    an LLM with a thread per call, kept full                     says what has ended

The prompts that a replica has are known here, so when it dies they go to others, and none is answered twice.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.feed import Score, Work
from nanoflow_jax.engine.request import CompletionOutput, RequestMetrics, RequestOutput
from nanoflow_jax.options import AS_MANY_AS_FIT, LLMOptions
from nanoflow_jax.parallel.processes import joined
from nanoflow_jax.replicas.process import POLL_SECONDS, About, Found, Growth, Replica, cause_line, check_plan
from nanoflow_jax.system.install import install_command
from nanoflow_jax.system.platform import num_gpus
from nanoflow_jax.weights.fingerprint import model_fingerprint

logger = logging.getLogger("nanoflow_jax")

TRIES = 3  # of a prompt, or of a replica's start, after a replica has died
PULLS = 4096  # of "nothing this time" in a turn
COUNT_SECONDS = 2.0  # in which a replica says its counts
CALLS = 16  # that a replica answers at once

Ended = list[tuple[Work, RequestOutput | Score]]
News = list[tuple[Work, Found]]


class ReplicaError(ConfigError):
    """The replicas cannot go on; one line."""


@dataclass(frozen=True)
class Layout:
    """replicas  None: as many as the GPUs hold
    devices   of each
    on_cpu    as which JAX runs the CPU, each replica for itself
    cluster   RAY_ADDRESS names one; else all is on this machine"""

    replicas: int | None
    devices: int
    on_cpu: bool
    cluster: bool

    def count(self, gpus: int) -> int:
        """Replicas on so many GPUs. Raises ConfigError where they do not fit."""
        if self.on_cpu:
            return self.replicas or max(1, (os.cpu_count() or 1) // self.devices)
        wanted = self.replicas or gpus // self.devices
        if not 1 <= wanted * self.devices <= gpus:
            where = "the cluster has" if self.cluster else "this machine has"
            raise ConfigError(
                f"data_parallel_size: {max(wanted, 1)} replicas of {self.devices} GPUs (tensor_parallel_size) wanted, "
                f"and {where} {gpus}; accepted: a product of at most {gpus}, or --cpu-devices"
            )
        return wanted


def find_layout(options: LLMOptions) -> Layout:
    """How the devices are cut; JAX is not started. Raises ConfigError, one line."""
    size, devices = options.data_parallel_size, options.tensor_parallel_size
    cluster, cpu = bool(os.environ.get("RAY_ADDRESS")), os.environ.get("JAX_NUM_CPU_DEVICES")
    replicas = None if size == AS_MANY_AS_FIT else int(size)
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu") and (cpu or not cluster):
        present = int(cpu or devices or 1)
        if devices is not None and devices > present:
            raise ConfigError(
                f"tensor_parallel_size: {devices} devices wanted, and each replica has {present}; accepted: at most "
                f"{present}, or --cpu-devices {devices} (JAX_NUM_CPU_DEVICES), which is of each replica"
            )
        return Layout(replicas, devices or present, True, cluster)
    if cluster:
        if devices is None:
            raise ConfigError("tensor_parallel_size: on a Ray cluster it says how many GPUs a replica has; give it")
        return Layout(replicas, devices, False, cluster)
    if not (gpus := num_gpus()):
        return Layout(replicas, devices or 1, True, cluster)
    found = Layout(replicas, devices or max(1, gpus // (replicas or gpus)), False, cluster)
    found.count(gpus)
    return found


@dataclass(eq=False)
class _Member:
    """A replica as it is seen here. starting: the answer to `about` that is waited for; None: it is ready. failures:
    deaths since it last gave a result."""

    number: int
    actor: Any = None
    starting: Any = None
    about: About | None = None
    failures: int = 0


@dataclass(eq=False)
class _Load:
    """What a call has given a member: `held` is all that has no result, of which `new` is not sent yet."""

    member: _Member
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
            for member in self.members:
                while member.starting is not None:
                    self._ready(member)
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
        run: Any = self.watch(work, most)  # of what is not watched there are no parts
        return run

    def watch(
        self, work: Iterable[Work | None], most: int | None = None, gone: deque[Work] | None = None
    ) -> Generator[News]:
        """The same with what watched prompts get as it comes.

        gone  prompts that are not wanted any more are put there. It makes this one go on, too, where a prompt has lost
              its replicas: as one where a part of a watched one has been handed on, it ends with an error.

        Raises ReplicaError when a prompt has lost its replica several times, or a replica does not start again.
        """
        ray, call = self._ray, next(self._calls)
        loads = [_Load(member, member.actor) for member in self.members[:most]]
        source, more = iter(work), True
        again: deque[tuple[int, Work]] = deque()
        deaths: dict[int, int] = {}
        numbers = itertools.count()
        try:
            while True:
                for _ in range(PULLS):
                    free = [load for load in loads if load.room > 0]
                    if not free:
                        break
                    load = min(free, key=lambda load: (load.tokens, -load.room))
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
                    elif gone is not None:
                        break
                while gone:
                    unwanted = gone.popleft()
                    again = deque(entry for entry in again if entry[1] is not unwanted)
                    for load in loads:
                        for number in [number for number, item in load.held.items() if item is unwanted]:
                            load.drop(number)
                for load in loads:
                    load.actor = load.actor if load.held else load.member.actor
                    if (load.held or load.gone) and load.asked is None:
                        load.asked = load.actor.exchange.remote(call, load.new, load.gone)
                        load.new, load.gone = [], []
                waited = {load.asked: load for load in loads if load.asked is not None}
                starting = [load.member.starting for load in loads if load.member.starting is not None]
                if not waited and not more and not again:
                    return
                found = self._wait([*waited, *starting])
                ended: News = []
                for load in (waited[ref] for ref in found if ref in waited):
                    actor, ref, load.asked = load.actor, load.asked, None
                    try:
                        results = ray.get(ref)
                    except ray.exceptions.RayActorError:
                        self._died(load.member, actor, len(load.held))
                        for number, item in load.held.items():
                            deaths[number] = deaths.get(number, 0) + 1
                            if number in load.begun or (gone is not None and deaths[number] > TRIES):
                                ended.append((item, _lost(item, self.name(load.member))))
                                continue
                            if deaths[number] > TRIES:
                                raise ReplicaError(
                                    f"data_parallel_size: a prompt has lost its replica {deaths[number]} times; the "
                                    "results so far are kept"
                                ) from None
                            again.append((number, item))
                        load.held, load.new, load.gone, load.begun, load.count, load.tokens = {}, [], [], set(), 0, 0
                        continue
                    except ray.exceptions.RayError as error:
                        raise ReplicaError(f"data_parallel_size: {cause_line(error)}") from None
                    if results:
                        load.member.failures = 0
                    for number, output in results:
                        if number not in load.held:  # dropped meanwhile
                            continue
                        if isinstance(output, Growth):
                            load.begun.add(number)
                            ended.append((load.held[number], output))
                        else:
                            ended.append((load.take(number), output))
                            self.num_rows += _rows(output)
                for load in loads:
                    if load.member.starting in found:
                        self._ready(load.member)
                yield ended
        finally:
            for load in loads:
                if load.held:
                    load.actor.close.remote(call)

    def stream(self, work: Iterable[Work]) -> Generator[RequestOutput]:
        """As `LLM.stream`: a prompt's output so far whenever it has grown."""
        outputs: dict[Work, RequestOutput] = {}
        for turn in self.watch(replace(item, watched=True) for item in work):
            for item, found in turn:
                if isinstance(found, RequestOutput):
                    outputs.pop(item, None)
                    yield found
                elif isinstance(found, Growth):
                    if (output := outputs.get(item)) is None:
                        nothing = [CompletionOutput(i, "", [], content="") for i in range(item.completions)]
                        output = RequestOutput("", item.prompt, item.prompt_token_ids, nothing, found.metrics)
                    output = replace(output, outputs=list(output.outputs))
                    output.prompt_logprobs = output.prompt_logprobs or found.prompt_logprobs
                    before = output.outputs[found.part.index]
                    output.outputs[found.part.index] = _joined(before, found.part)
                    outputs[item] = output
                    if not output.finished:  # else the whole one follows
                        yield output

    def _seeded(self, work: Work) -> Work:
        """A request without a seed has one by its order of arrival, as in one LLM: not one of its replica's, where
        others have the same."""
        params = work.params
        if params.seed is not None or work.scored_from is not None or params.temperature == 0:
            return work
        spawn = np.random.SeedSequence([self._options.seed, next(self._seeds)])
        return replace(work, params=replace(params, seed=int(spawn.generate_state(1, np.uint32)[0])))

    def _wait(self, refs: list[Any]) -> set[Any]:
        """Those that are there; after a moment at the latest, so that a Ctrl-C is seen."""
        if not refs:
            return set()
        if not self._ray.wait(refs, num_returns=1, timeout=2 * POLL_SECONDS)[0]:
            return set()
        return set(self._ray.wait(refs, num_returns=len(refs), timeout=0)[0])

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
        member.actor = actor.remote(self._make, options, self._fingerprint, self._plan)
        member.starting = member.actor.about.remote()

    def _ready(self, member: _Member) -> None:
        """Takes what a starting replica says of itself."""
        with self._lock:
            starting, actor = member.starting, member.actor
        if starting is None:  # another call has
            return
        try:
            about = self._ray.get(starting)
        except self._ray.exceptions.RayActorError:
            self._died(member, actor, 0)
        except self._ray.exceptions.RayError as error:
            raise ReplicaError(cause_line(error)) from None
        else:
            with self._lock:
                member.about, member.starting = about, None

    def name(self, member: _Member) -> str:
        return f"replica {member.number + 1} of {len(self.members)}"

    @property
    def num_ready(self) -> int:
        return sum(member.starting is None for member in self.members)

    def counts(self) -> dict[str, int]:
        """`engine_counts` of those that answer, added up."""
        refs = [member.actor.counts.remote() for member in self.members if member.starting is None]
        total: Counter[str] = Counter()
        for ref in refs:
            with suppress(self._ray.exceptions.RayError):
                total.update(self._ray.get(ref, timeout=COUNT_SECONDS))
        return dict(total)

    def _died(self, member: _Member, actor: Any, held: int) -> None:
        """Starts a dead replica again, and says so."""
        with self._lock:
            if member.actor is not actor:  # another call has
                return
            about, member.failures = member.about, member.failures + 1
            who = self.name(member)
            if about is not None:
                who += f" (process {about.process}{f' on GPUs {about.gpus}' if about.gpus else ''})"
            if member.failures > TRIES:
                raise ReplicaError(
                    f"data_parallel_size: {who} has died {member.failures} times without a result; the results so far "
                    "are kept"
                )
            logger.warning("%s has died; it is started again, and its %d prompts are answered anew", who, held)
            self._begin(member)


def _joined(before: CompletionOutput, part: CompletionOutput) -> CompletionOutput:
    found = {}
    for name in ("text", "token_ids", "logprobs", "text_offsets", "reasoning_content", "content", "cumulative_logprob"):
        one, other = getattr(before, name), getattr(part, name)
        found[name] = other if one is None else one if other is None else one + other
    return replace(part, **found)


def _lost(work: Work, who: str) -> RequestOutput:
    error = f"{who} has died while it answered; try again"
    outputs = [CompletionOutput(i, "", [], "error", error=error) for i in range(work.completions)]
    return RequestOutput("", work.prompt, work.prompt_token_ids, outputs, RequestMetrics(0.0))


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
