"""Replicas of a model behind one `LLM`: each has a process and devices of its own, which Ray gives it.

    LLM        prepare | hand out | take what has ended | hand out ...      to the one with the fewest tokens in flight
    replica    an LLM with a thread per call, kept full                     says what has ended

The prompts that a replica has are known here, so when it dies they go to others, and none is answered twice. One that
hangs is ended, and then has died.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.feed import Score, Work
from nanoflow_jax.engine.request import CompletionOutput, RequestMetrics, RequestOutput
from nanoflow_jax.options import LLMOptions
from nanoflow_jax.parallel.processes import joined
from nanoflow_jax.replicas import members
from nanoflow_jax.replicas.layout import Layout, find_layout
from nanoflow_jax.replicas.members import Load, Member, Waits
from nanoflow_jax.replicas.process import Found, Growth, Hung, Replica, cause_line, check_plan
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
            self.members = [Member(i) for i in range(layout.count(gpus))]
            for member in self.members:
                self._begin(member)
            waits = Waits(self._ray)
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
        loads = [Load(member, member.actor) for member in self.members[:most]]
        source, more = iter(work), True
        again: deque[tuple[int, Work]] = deque()
        deaths: dict[int, int] = {}
        numbers, waits = itertools.count(), Waits(ray)
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
                if not waited and not more and not again:
                    return
                ended: News = []
                for load in self._listen(waits, waited):
                    actor, ref, load.asked = load.actor, load.asked, None
                    try:
                        results = self._get(load.member, actor, ref)
                    except ray.exceptions.RayActorError:
                        self._died(load.member, actor, len(load.held.keys() - load.begun))
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

    def _listen(self, waits: Waits, waited: dict[Any, Load]) -> list[Load]:
        """Waits a moment for answers. Takes those of replicas that are starting, ends the replicas that hang, and
        returns the loads that have an answer."""
        starting = {member.starting: member for member in self.members if member.starting is not None}
        found, late = waits.wait([*waited, *starting])
        for ref in found & starting.keys():
            self._ready(starting[ref], ref)
        for ref in late:
            load, why = waited.get(ref), f"no answer for {members.SILENT_SECONDS:.0f} s"
            if load is not None:
                self._end(load.member, load.actor, why)
            elif (member := starting[ref]).begun:  # else Ray is looking for a place for it
                self._end(member, member.actor, why)
        return [waited[ref] for ref in found & waited.keys()]

    def _get(self, member: Member, actor: Any, ref: Any) -> Any:
        """As Ray's; a replica that says it hangs is ended first."""
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            if not isinstance(cause := getattr(error, "cause", None), Hung):
                raise
            self._end(member, actor, str(cause))
            raise self._ray.exceptions.RayActorError from None

    def _end(self, member: Member, actor: Any, why: str) -> None:
        """Ends a replica that hangs: what is waited for from it then fails."""
        member.hung = actor, why
        self._ray.kill(actor)

    def _begin(self, member: Member) -> None:
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

    def _ready(self, member: Member, starting: Any) -> None:
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

    def name(self, member: Member) -> str:
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

    def _died(self, member: Member, actor: Any, held: int) -> None:
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
                    f"data_parallel_size: {who} has died or hung {member.failures} times without a result; the results "
                    "so far are kept"
                )
            what = f"hangs ({member.hung[1]}) and is ended" if member.hung[0] is actor else "has died"
            logger.warning("%s %s; it is started again, and its %d prompts are answered anew", who, what, held)
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
