"""A profile run: what the machine can do, the points that a table lacks, and each measured and written in turn."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kernels_pallas.bench.report import commit
from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.cost.shapes import Shapes
from nanoflow_jax.hardware import Hardware, hardware_of, hardware_of_device
from nanoflow_jax.parallel.mesh import AXIS, check_divides
from nanoflow_jax.plan.known import check_sms
from nanoflow_jax.plan.plan import SchedulePlan
from nanoflow_jax.profile import programs
from nanoflow_jax.profile.kernels import Kernel, kernel
from nanoflow_jax.profile.points import GRIDS, Grid, Pair, Point, Scope, points
from nanoflow_jax.profile.table import FORMAT, Table, TableWriter, foreign, read_table, these_versions, this_machine
from nanoflow_jax.profile.timing import US, PairTiming, Timing, time_pair, time_programs
from nanoflow_jax.step.attention import choose_backend
from nanoflow_jax.system.progress import Progress

CPU_POOL_BYTES = 64 * 2**20
GPU_POOL_SHARE = 0.25  # of the device's memory
PROGRAM_US = 1000  # of a program on a GPU, about: much more than its dispatch takes
CALLS = (2, 32)  # in one program, at least and at most
SIZES = (  # of a model, by which its table is known
    "dtype", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size"
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a run did. skipped: lines on what this machine cannot measure."""

    table: Table
    planned: int
    measured_now: int
    seconds: float
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Machine:
    """The present devices as a profile sees them."""

    bench: programs.Bench
    backend: str
    page_size: int
    hardware: Hardware | None


def profile(
    name: str,
    config: ModelConfig,
    plans: Sequence[SchedulePlan],
    output: Path,
    *,
    devices: int | None = None,
    tokens: int = 2048,
    context: int = 8192,
    page_size: int = 64,
    density: str = "normal",
    ops: Iterable[str] | None = None,
    attention_backend: str = "auto",
    force: bool = False,
    command: str = "",
    progress: bool = True,
) -> Outcome:
    """Measures what `output` lacks and appends it.

    devices   that share the model: local shapes are one device's. With fewer present, collectives are left out; None:
              those present
    tokens    per step; context: the longest
    force     begin anew where `output` is of another machine, version or model; what it held is kept beside it

    Raises ConfigError naming what cannot be used.
    """
    devices = devices or jax.device_count()
    check_divides(config, devices)
    config = replace(config, dtype="bfloat16" if config.dtype == "float16" else config.dtype)
    if density not in GRIDS:
        raise ConfigError(f"points: {density!r} is not accepted; accepted: {', '.join(GRIDS)}")
    if tokens < 8 or context < page_size:
        raise ConfigError(f"tokens: {tokens} must be at least 8, and context: {context} at least a page, {page_size}")
    for plan in plans:
        check_sms(plan, hardware_of(jax.devices()[0]))
    machine, skipped = _machine(config, devices, page_size, attention_backend)
    scope = _scope(machine, config, tuple(plans), devices, tokens, context)
    wanted = points(scope, GRIDS[density], *(() if ops is None else (ops,)))
    sizes = {
        "name": name,
        "devices": devices,
        **{field: getattr(config, field) for field in SIZES},
        "attention_backend": machine.backend,
        "page_size": page_size,
        **({"experts": asdict(config.experts)} if config.experts else {}),
    }
    header = {
        "format": FORMAT,
        "points": density,
        "machine": this_machine(),
        "versions": these_versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "model": sizes,
        "sms": _sms(machine.hardware),
        "memory_bytes": _memory(jax.devices()[0]),
    }
    found = _resume(output, sizes, force)
    left = [point for point in wanted if found is None or point not in found.measured]
    started = time.monotonic()
    with TableWriter(output, header, found.torn if found else 0) as writer:
        _measure_all(machine, left, GRIDS[density], writer, progress)
    return Outcome(read_table(output), len(wanted), len(left), time.monotonic() - started, tuple(skipped))


def _resume(output: Path, sizes: dict[str, Any], force: bool) -> Table | None:
    """The table that `output` holds, None when a new one is begun there."""
    if not output.exists() or output.stat().st_size == 0:
        if not output.absolute().parent.is_dir():
            raise ConfigError(f"output: {output}: its folder does not exist")
        return None
    try:
        table = read_table(output)
        why = foreign(table.header)
        if not why and table.header.get("model") != sizes:
            other = table.header.get("model", {})
            why = "; ".join(f"{k} {other.get(k)!r}, not {v!r}" for k, v in sizes.items() if other.get(k) != v)
        if not why:
            return table
    except ConfigError as error:
        why = str(error)
    if not force:
        raise ConfigError(f"output: {output} is another profile ({why}); name a new file, or --force keeps it aside")
    number = 1
    while (aside := output.with_name(f"{output.name}.{number}")).exists():
        number += 1
    output.rename(aside)
    print(f"kept aside: {aside}", file=sys.stderr)
    return None


def _machine(config: ModelConfig, devices: int, page_size: int, backend: str) -> tuple[Machine, list[str]]:
    present = jax.devices()
    device, gpu = present[0], present[0].platform == "gpu"
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    backend = choose_backend(backend, config, (int(major), int(minor)) if gpu else None, page_size)
    hardware = hardware_of_device(device.device_kind) if gpu else None
    skipped = []
    if devices == 1:
        skipped.append("collectives: one device has none")
    elif len(present) < devices:
        skipped.append(f"collectives: {devices} devices share the model, {len(present)} present")
    if gpu and backend == "xla":
        skipped.append("decode attention by SM budget and beside a GEMM: XLA's attention cannot leave SMs free")
    mesh = Mesh(np.array(present[: min(devices, len(present))]), (AXIS,))
    l2 = (hardware.l2_bytes if hardware else 64 * 2**20) if gpu else 0
    most = int(_memory(device) * GPU_POOL_SHARE) if gpu else CPU_POOL_BYTES
    return Machine(programs.Bench(mesh, gpu, l2, most), backend, page_size, hardware), skipped


def _sms(hardware: Hardware | None) -> int:
    return hardware.sm_count if hardware else int(getattr(jax.devices()[0], "core_count", 0))


def _memory(device: Any) -> int:
    """Bytes of one device; of a CPU that plays several, its share."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.device_count()
    return int((device.memory_stats() or {}).get("bytes_limit", 16 * 2**30))


def _scope(
    machine: Machine, config: ModelConfig, plans: tuple[SchedulePlan, ...], devices: int, tokens: int, context: int
) -> Scope:
    gpu, mosaic = machine.bench.gpu, machine.backend == "mosaic"
    return Scope(
        shapes=Shapes.of(config, devices),
        plans=plans,
        tokens=tokens,
        context=context,
        page_size=machine.page_size,
        sms=_sms(machine.hardware) if gpu and mosaic else 0,
        streams=mosaic or not gpu,
        network=machine.bench.mesh.size == devices > 1,
        pool_bytes=machine.bench.most_bytes,
    )


def _measure_all(
    machine: Machine, left: Sequence[Point | Pair], grid: Grid, writer: TableWriter, progress: bool
) -> None:
    taken: dict[str, list[float]] = defaultdict(list)
    with Progress(len(left), "profile", "points", progress) as bar:
        for number, point in enumerate(left, start=1):
            started = time.monotonic()
            writer.add(point, measure(machine, point, grid))
            taken[point.op].append(time.monotonic() - started)
            bar.advance(1, f"{point.op}, {_duration(time_left(taken, left[number:]))} left")


def measure(machine: Machine, point: Point | Pair, grid: Grid) -> Timing | PairTiming | str:
    """The figures of a point, or one line on why there are none: it does not fit, or cannot run here."""
    try:
        if isinstance(point, Pair):
            first = kernel(point.first, machine.page_size, machine.backend)

            def second(times: int) -> Kernel:
                return kernel(point.second.times(times), machine.page_size, machine.backend)

            return time_pair(programs.pair(machine.bench, first, second), grid)
        one = kernel(point, machine.page_size, machine.backend)
        program = programs.single(machine.bench, one, _calls(machine, one, point))
        return time_programs([(program, program.calls[0])], grid)[0]
    except (RuntimeError, ValueError, NotImplementedError) as error:  # of memory, of a kernel, of a pair
        return " ".join(str(error).split())[:300] or type(error).__name__


def _calls(machine: Machine, one: Kernel, point: Point) -> int:
    """Calls in a program: enough to fill PROGRAM_US, by bandwidth and arithmetic of the data sheet."""
    if machine.hardware is None:
        return CALLS[1] // 2
    us = one.set_bytes / machine.hardware.memory_bandwidth * US
    if point.op == "gemm":
        us = max(us, 2.0 * point["m"] * point["n"] * point["k"] / machine.hardware.bf16_flops * US)
    if point.op == "grouped_gemm":
        flops = 2.0 * point["rows"] * point["parts"] * point["n"] * point["k"]
        us = max(us, flops / machine.hardware.bf16_flops * US)
    return int(min(CALLS[1], max(CALLS[0], PROGRAM_US / max(us, 1))))


def time_left(taken: dict[str, list[float]], left: Sequence[Point | Pair]) -> float:
    """Seconds, by the mean of what points of the same op have taken; of all where an op has not been seen."""
    means = {op: sum(times) / len(times) for op, times in taken.items()}
    rest = sum(map(sum, taken.values())) / max(sum(map(len, taken.values())), 1)
    return sum(means.get(point.op, rest) for point in left)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
