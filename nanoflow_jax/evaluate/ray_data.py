"""A batch file through many replicas, by Ray Data: the driver reads, checks and writes; each actor is an LLM.

    input  ->  blocks of lines (byte ranges)  ->  actors: read a block, answer it  ->  the driver's journal

A block whose actor dies is answered again by another one; its results reach the driver once, all together. The journal
is the one of `run_batch`, so a run may be begun with Ray and continued without, and the other way round.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from nanoflow_jax.config import ConfigError
from nanoflow_jax.evaluate.batch import BatchReport, Settings, answer, parse_lines
from nanoflow_jax.evaluate.journal import Journal, record_number
from nanoflow_jax.evaluate.lines import FileIdentity, Line, read_lines
from nanoflow_jax.evaluate.records import Problem, parse_line
from nanoflow_jax.evaluate.response import Json, encode_record, error_record
from nanoflow_jax.system.install import install_command
from nanoflow_jax.system.progress import Progress

BLOCK_LINES = 2048
BLOCK_BYTES = 16 * 2**20
RETRIES = 3  # of a block whose actor has died


class RayError(ConfigError):
    """The replicas cannot go on; one line."""


@dataclass(frozen=True)
class RayOptions:
    """replicas     actors; None: as many as the cluster's GPUs hold
    devices      of each: a node's GPUs, or with `on_cpu` the CPU's as which JAX runs
    block_lines  of the input that an actor answers at a time, and that are lost with it
    """

    replicas: int | None
    devices: int
    on_cpu: bool
    block_lines: int = BLOCK_LINES


@dataclass(frozen=True)
class Block:
    """Lines of the input: `count` of them, the first one numbered `first` and at byte `start`; those in `skip` have a
    record already."""

    start: int
    first: int
    count: int
    skip: list[int]


def blocks(
    source: Path, found: FileIdentity, journal: Journal, settings: Settings, block_lines: int
) -> Iterator[Block]:
    """The blocks in which something is to be done. Writes the error records of lines that cannot be served."""
    start = first = count = size = 0
    skip: list[int] = []
    shown: list[Line] = []

    def watched() -> Iterator[Line]:
        for line in read_lines(source, identity=found):
            shown[:] = [line]
            yield line

    for item in parse_lines(watched(), (settings.model,), journal.done):
        line = shown[0]
        if count and (count == block_lines or size >= BLOCK_BYTES):
            if len(skip) < count:
                yield Block(start, first, count, skip)
            count, size, skip = 0, 0, []
        if not count:
            start, first = line.start, line.number
        count, size = count + 1, size + len(line.data)
        if isinstance(item, Problem):
            journal.write(encode_record(error_record(item)))
        if item is None or isinstance(item, Problem):
            skip.append(line.number)
    if len(skip) < count:
        yield Block(start, first, count, skip)


class Replica:
    """An LLM in an actor of Ray; answers blocks."""

    def __init__(self, source: str, found: FileIdentity, llm: Mapping[str, Any], settings: Settings, fingerprint: str):
        from nanoflow_jax.api import LLM
        from nanoflow_jax.evaluate.manifest import model_fingerprint, plan_identity

        self._source, self._found, self._settings = Path(source), found, settings
        if not self._source.is_file():
            raise ConfigError(f"--input: {source} is not on every node; accepted: a file on a shared file system")
        self._llm = LLM(**{**llm, "progress": False})
        if model_fingerprint(self._llm.folder) != fingerprint:
            raise ConfigError(f"--model: {llm['model']} is another model on node {os.uname().nodename}")
        self._plan = plan_identity(self._llm.plan)
        self._device = self._llm.mesh.devices.flat[0].device_kind

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Rows of `block` (JSON) to rows of `record` (encoded), with their tokens, and the plan and the kind of device
        that have made them."""
        found: dict[str, list[Any]] = {
            name: [] for name in ("record", "prompt_tokens", "completion_tokens", "plan", "device")
        }

        def emit(record: Json) -> None:
            usage = record["response"]["body"]["usage"] if record["response"] is not None else {}
            found["record"].append(encode_record(record))
            found["plan"].append(self._plan)
            found["device"].append(self._device)
            for name in ("prompt_tokens", "completion_tokens"):
                found[name].append(usage.get(name, 0))

        for text in batch["block"]:
            block = Block(**json.loads(str(text)))
            skip = set(block.skip)
            lines = read_lines(self._source, start=block.start, number=block.first, identity=self._found)
            lines = islice(lines, block.count)
            items = [parse_line(line, (self._settings.model,)) for line in lines]
            answer(self._llm, (item for item in items if item.line not in skip), self._settings, emit)
        return found


def run_batch_on_ray(
    llm: Mapping[str, Any],
    fingerprint: str,
    source: Path,
    found: FileIdentity,
    journal: Journal,
    settings: Settings,
    options: RayOptions,
    on_plan: Callable[[str, str], None],
    progress: bool = True,
) -> BatchReport:
    """As `run_batch`, with replicas of LLM(**llm) on Ray; `fingerprint` is the model's, and checked on each node.

    on_plan  called with the plan and the kind of device of each block's replica, before a record of it is written

    Starts Ray on this machine, or joins the cluster that RAY_ADDRESS names. Raises RayError, one line, when replicas
    cannot be made, or a block fails again and again.
    """
    before, num_lines = len(journal.done), found.lines
    todo = [
        {"block": json.dumps(asdict(block))} for block in blocks(source, found, journal, settings, options.block_lines)
    ]
    arguments = (str(source.absolute()), found, dict(llm), settings, fingerprint)
    prompt_tokens = completion_tokens = 0
    started = time.monotonic()
    with Progress(num_lines - before, "answering", "requests", progress) as bar:
        bar.advance(len(journal.done) - before)
        for results in _answered(todo, arguments, options):
            for plan, device in sorted(set(zip(results["plan"], results["device"], strict=True))):
                on_plan(str(plan), str(device))
            prompt_tokens += int(results["prompt_tokens"].sum())
            completion_tokens += int(results["completion_tokens"].sum())
            written = 0
            for record in results["record"]:
                number = record_number(record)
                if number is None or number not in journal.done:  # never twice, whatever was retried
                    journal.write(record)
                    written += 1
            seconds = time.monotonic() - started
            bar.advance(written, f"{(prompt_tokens + completion_tokens) / seconds:.0f} tokens/s")
    journal.finish()
    assert len(journal.done) == num_lines, (len(journal.done), num_lines)
    seconds = time.monotonic() - started
    return BatchReport(num_lines, journal.errors, before, prompt_tokens, completion_tokens, seconds)


def _answered(todo: list[dict[str, str]], arguments: tuple[Any, ...], options: RayOptions) -> Iterator[dict[str, Any]]:
    """The results of the blocks, in the order in which they come."""
    if not todo:
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
        from ray.exceptions import RayError as RaysError
    except ModuleNotFoundError as error:
        raise ConfigError(f"--ray: not installed ({error.name}); accepted: {install_command('ray')}") from None

    started_here = not ray.is_initialized()
    if started_here:
        _start(ray, options)
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        replicas = _replicas(ray, options)
        with warnings.catch_warnings():
            # Ray 2.60 warns of any remote option without a parameter of its own; nothing else bounds retries.
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            dataset = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
                Replica,
                fn_constructor_args=arguments,
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=replicas),
                num_cpus=1,
                num_gpus=0 if options.on_cpu else options.devices,
                max_task_retries=RETRIES,
            )
        yield from cast(Iterator[dict[str, Any]], dataset.iter_batches(batch_size=None, prefetch_batches=0))
    except RaysError as error:
        raise RayError(f"--ray: {_line(error)}") from None
    finally:
        if started_here:
            ray.shutdown()


def _start(ray: Any, options: RayOptions) -> None:
    variables = {
        name: os.environ[name]
        for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "NANOFLOW_COMPILE_CACHE")
        if name in os.environ
    }
    if options.on_cpu:
        variables |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
    given: dict[str, Any] = {"runtime_env": {"env_vars": variables}, "log_to_driver": False, "logging_level": "ERROR"}
    if not os.environ.get("RAY_ADDRESS"):
        given |= {"address": "local", "include_dashboard": False}
        if options.on_cpu:
            given["num_cpus"] = max(options.replicas or 1, os.cpu_count() or 1)
    ray.init(**given)


def _replicas(ray: Any, options: RayOptions) -> int:
    gpus = int(ray.cluster_resources().get("GPU", 0))
    most = 1 if options.on_cpu else gpus // options.devices
    wanted = options.replicas or most
    if not options.on_cpu and not 1 <= wanted <= most:
        raise RayError(
            f"--ray-replicas: {wanted} replicas of {options.devices} GPUs wanted, and the cluster has {gpus} GPUs; "
            "accepted: fewer, smaller ones (--ray-devices), or --cpu-devices"
        )
    return wanted


def _line(error: BaseException) -> str:
    """The cause that a user can act on, without the traces around it."""
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None and cause is not error:
        error = cause
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    if isinstance(error, ConfigError):
        return " ".join(lines)
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"
