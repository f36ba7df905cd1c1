"""The table file: JSON lines, a header and one line per point, each on the disk before the next is measured.

    {"format": 1, "machine": {...}, "versions": {...}, "commit": "...", "date": "...", "command": "...", "model": {...}}
    {"op": "gemm", "dtype": "f32", "k": 128, "m": 8, "n": 48, "us": 2.41, "low": ..., "high": ..., "runs": 5}
    {"op": "pair", "first": {...}, "second": {...}, "first_us": ..., "first_speed": ..., "second_speed": ...}
    {"op": "gemm", ..., "failed": "why"}

A run that is killed leaves whole lines and at most a torn last one, which the next run cuts off.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from nanoflow_jax.config import ConfigError
from nanoflow_jax.profile.points import LARGEST_SIZE, Pair, Point
from nanoflow_jax.profile.timing import PairTiming, Timing
from nanoflow_jax.system.reading import Malformed, parse_json, read_text
from nanoflow_jax.version import __version__

FORMAT = 1


@dataclass(frozen=True)
class Table:
    """A table as read. times: microseconds of each point; pairs: speeds of both; failed: why a point has none."""

    path: str
    header: Mapping[str, Any]
    times: Mapping[Point, Timing]
    pairs: Mapping[Pair, PairTiming]
    failed: Mapping[Point | Pair, str]
    torn: int = 0  # bytes of a line that was not finished

    @property
    def measured(self) -> set[Point | Pair]:
        """Every point that has a line."""
        return {*self.times, *self.pairs, *self.failed}


def this_machine() -> dict[str, Any]:
    """What must be the same for times to be comparable: devices and processor."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
    }


def these_versions() -> dict[str, str]:
    return {"nanoflow_jax": __version__, **{name: version(name) for name in ("jax", "jaxlib")}}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def foreign(header: Mapping[str, Any], ignore: Collection[str] = ()) -> str:
    """What of a table's machine and versions is not that of this process, in a few words; "" when all is. `ignore`:
    keys that may differ."""
    found = []
    for name, here in (("machine", this_machine()), ("versions", these_versions())):
        there = header.get(name, {})
        differ = [key for key, value in here.items() if there.get(key) != value and key not in ignore]
        found += [f"{key} {there.get(key)!r}, here {here[key]!r}" for key in differ]
    return "; ".join(found)


def read_table(path: str | Path) -> Table:
    """The table in a file; an unfinished last line is left out.

    Raises ConfigError naming the file and the line that is not one of a table's.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path}: no such file; nanoflow profile --output {path} makes it")
    data = read_text(path).encode()
    whole, newline, torn = data.rpartition(b"\n")
    lines = whole.split(b"\n") if newline else []
    if not lines:
        raise ConfigError(f"{path}: not a profile; its first line must be a header")
    header = _parsed(path, 1, lines[0])
    if header.get("format") != FORMAT:
        raise ConfigError(f"{path}:1: not the header of a profile of format {FORMAT}")
    _check_header(path, header)
    times: dict[Point, Timing] = {}
    pairs: dict[Pair, PairTiming] = {}
    failed: dict[Point | Pair, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        record = _parsed(path, number, line)
        try:
            _add(record, times, pairs, failed)
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}:{number}: not a line of a profile: {error}") from None
    return Table(str(path), header, times, pairs, failed, len(torn))


def _check_header(path: Path, header: Mapping[str, Any]) -> None:
    """Raises ConfigError unless it has what `profile.measured` reads."""
    machine, versions = header.get("machine"), header.get("versions")
    if not isinstance(machine, dict) or not isinstance(versions, dict):
        raise ConfigError(f"{path}:1: a profile's header holds the objects machine and versions")
    if not isinstance(machine.get("device"), str):
        raise ConfigError(f"{path}:1: machine.device: {machine.get('device')!r} must be a text")
    sizes = {"machine.devices": machine.get("devices"), "memory_bytes": header.get("memory_bytes")}
    sizes |= {"machine.cpus": machine.get("cpus") or 1, "sms": header.get("sms") or 1}
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
            raise ConfigError(f"{path}:1: {name}: {value!r} must be a whole number above 0")


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = parse_json(line.decode())
    except Malformed as error:
        raise ConfigError(f"{path}:{number}: not a line of a profile: {error}") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{path}:{number}: not a line of a profile: {line[:40]!r}")
    return record


TIMES = ("us", "low", "high", "runs")
SPEEDS = ("first_us", "second_us", "rounds", "first_speed", "second_speed")


def _add(
    record: dict[str, Any], times: dict[Point, Timing], pairs: dict[Pair, PairTiming], failed: dict[Point | Pair, str]
) -> None:
    figures = {name: record.pop(name) for name in (*TIMES, *SPEEDS, "failed") if name in record}
    point = Pair.from_json(record) if record.get("op") == "pair" else Point.from_json(record)
    if "failed" in figures:
        failed[point] = str(figures["failed"])
    elif isinstance(point, Pair):
        rounds = tuple((_count(a), _count(b), _above_zero("rounds", us)) for a, b, us in figures.pop("rounds"))
        if len(rounds) != 2:
            raise ValueError("rounds must be two")
        alone = {name: _above_zero(name, figures[name]) for name in ("first_us", "second_us")}
        kept = {name: figures[name] for name in ("first_speed", "second_speed")}
        if bad := [n for n, speed in kept.items() if type(speed) not in (int, float) or not 0 <= speed <= 1]:
            raise ValueError(f"{bad[0]} must be from 0 to 1")
        pairs[point] = PairTiming(rounds=rounds, **alone, **kept)  # pyright: ignore[reportArgumentType]
    else:
        us, low, high = (_above_zero(name, figures[name]) for name in TIMES[:3])
        times[point] = Timing(us, low, high, _count(figures["runs"]))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"runs and rounds: {value!r} must be a whole number above 0")
    return value


def _above_zero(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-9 < value < 1e15:
        raise ValueError(f"{name} = {value!r} must be a number above 0")
    return float(value)


class TableWriter:
    """Appends points to a table file that no other process writes to. Use as a context manager."""

    def __init__(self, path: Path, header: Mapping[str, Any], torn: int):
        """Begins the file when there is none or it is empty; else cuts off `torn` bytes and goes on after its last
        line. Raises ConfigError when another process has it open for writing."""
        self._file = open(path, "ab")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError(f"{path}: another process is writing it") from None
        if torn:
            self._file.truncate(self._file.tell() - torn)
        if os.fstat(self._file.fileno()).st_size == 0:
            self._write(dict(header))

    def add(self, point: Point | Pair, result: Timing | PairTiming | str) -> None:
        """A point's figures, or why there are none; on the disk when this returns."""
        figures = {"failed": result} if isinstance(result, str) else asdict(result)
        self._write(point.to_json() | figures)

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
