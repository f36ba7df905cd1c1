"""The engine of several processes. All run the same scheduler on the same requests, so that all dispatch the same
steps; nothing but what process 0 does can make a difference, and what it does is sent before each step.

    process 0   add, add | send, step | add | send, step | ... | send the end
    others               | receive, add, add, step | receive, add, step | ...

A message also carries a digest of all inputs of the steps so far: processes that were ever to differ end at the next
step, and never go on with a wrong result.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.engine import Engine
from nanoflow_jax.engine.request import Request
from nanoflow_jax.options import LLMOptions
from nanoflow_jax.parallel.processes import PeerError, Processes, joined
from nanoflow_jax.plan.file import parse_plan, plan_toml
from nanoflow_jax.plan.plan import SchedulePlan
from nanoflow_jax.sampling_params import SamplingParams, StructuredOutputsParams
from nanoflow_jax.system.reading import parse_toml


class MultiprocessEngine(Engine):
    """An engine whose steps run in several processes at once."""

    def __init__(self, processes: Processes, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.processes, self.digest = processes, 0
        self.runner.on_dispatch = self._digest

    def _digest(self, packed: np.ndarray) -> None:
        self.digest = zlib.crc32(packed.data, self.digest)

    def abort_all(self) -> None:
        if self.failure is None:  # else the device may never answer again, and the run ends
            super().abort_all()

    def _recover(self, error: Exception) -> list[Request]:
        """Finding the request at fault would need all processes to fail alike; the run ends, and can be resumed."""
        self.failure = error
        raise self.processes.explain(error) from error


class LeaderEngine(MultiprocessEngine):
    """In process 0: all that is done to it is sent to the others before the next step."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._done: list[list[Any]] = []
        self._flight_message = -1  # the message whose step is in flight

    def add(self, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams, **options: Any) -> Request:
        self._done.append(["add", prompt_token_ids, params_fields(params), options])
        return super().add(prompt, prompt_token_ids, params, **options)

    def abort(self, request: Request) -> None:
        self._done.append(["abort", request.number])
        super().abort(request)

    def abort_all(self) -> None:
        self._done.append(["abort_all"])
        super().abort_all()

    def step(self) -> list[Request]:
        done, self._done = self._done, []
        in_flight, steps = self._flight is not None, self.num_steps
        number = self.processes.send({"step": done, "digest": self.digest})
        with self.processes.waiting():
            finished = super().step()
        if in_flight:  # it has ended, so all processes have begun it
            self.processes.forget(self._flight_message)
        if self.num_steps > steps:
            self._flight_message = number
        return finished


class FollowerEngine(MultiprocessEngine):
    """In the other processes: does what the messages say."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._requests: dict[int, Request] = {}

    def follow(self, message: Mapping[str, Any]) -> None:
        """One message of a LeaderEngine: what was done to it, and a step."""
        for what, *given in message["step"]:
            if what == "add":
                tokens, params, options = given
                request = self.add(None, tokens, params_from(params), **options)
                self._requests[request.number] = request
            elif what == "abort":
                if (request := self._requests.pop(given[0], None)) is not None:
                    self.abort(request)
            else:
                self.abort_all()
                self._requests.clear()
        if message["digest"] != self.digest:
            raise PeerError(
                f"process {self.processes.rank} of {self.processes.count} has run other steps than process 0: "
                "the same versions of all packages are needed on all hosts"
            )
        with self.processes.waiting():
            for request in self.step():
                self._requests.pop(request.number, None)


def params_fields(params: SamplingParams | StructuredOutputsParams) -> dict[str, Any]:
    """The fields that are not the defaults, for JSON."""
    found = {}
    for field in fields(params):
        value = getattr(params, field.name)
        if value != field.default:
            if isinstance(value, StructuredOutputsParams):
                value = params_fields(value)
            elif isinstance(value, Mapping):
                value = dict(value) if field.name == "json" else list(value.items())
            elif value is not None and not isinstance(value, (str, int, float)):
                value = list(value)
            found[field.name] = value
    return found


def params_from(found: dict[str, Any]) -> SamplingParams:
    """The inverse of `params_fields`."""
    if found.get("logit_bias") is not None:
        found = {**found, "logit_bias": dict(found["logit_bias"])}
    if (form := found.get("structured_outputs")) is not None:
        found = {**found, "structured_outputs": StructuredOutputsParams(**form)}
    return SamplingParams(**found)


def lead(options: LLMOptions) -> None:
    """Makes the processes that follow this one make an LLM with the same options. Does nothing when there are none.

    Raises ConfigError when there are other processes that cannot be led.
    """
    processes = joined()
    if processes is not None and processes.leads:
        processes.send({"llm": options_for(replace(options, progress=False))})
    elif processes is None and jax.process_count() > 1:
        raise ConfigError(
            f"distributed: jax.distributed has {jax.process_count()} processes; join them with "
            "nanoflow_jax.distributed.join() in its place"
        )


def options_for(options: LLMOptions) -> dict[str, Any]:
    """Arguments of an LLM, for JSON."""

    def simple(value: Any) -> Any:
        if isinstance(value, SchedulePlan):
            return {"name": value.name, "toml": plan_toml(value, [])}
        return str(value) if isinstance(value, Path) else value

    return {name: simple(value) for name, value in options.arguments().items()}


def options_from(found: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `options_for`."""
    if isinstance(plan := found["plan"], dict):
        found = {**found, "plan": parse_plan(plan["name"], parse_toml(plan["toml"]))}
    return found
