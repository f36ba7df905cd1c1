"""A latency model over a profile's table: measured where the table has the op's shape, else the roofline, and every
answer says which."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanoflow_jax.config import ConfigError
from nanoflow_jax.cost.latency import EXTRAPOLATED, PROFILE, US, Prediction, Rate, RooflineModel, wire_bytes
from nanoflow_jax.hardware import Calibration, Hardware, hardware_of_device
from nanoflow_jax.profile.grid import Curve, Place, SampleGrid
from nanoflow_jax.profile.points import AXES, BYTES, Point, Size
from nanoflow_jax.profile.table import Table, foreign, read_table

EXTRAPOLATED_RATE = "profile, line to share 0 or 1"
DTYPES = {width: name for name, width in BYTES.items()}
HALF = 0.5  # the share of two ops that no budget holds back
WITHOUT_ZERO = ("sms",)  # axes on which size 0 means nothing

Family = tuple[str, tuple[tuple[str, Size], ...]]


def load_profile(path: str | Path, gpu: Hardware | None = None, allow_foreign: bool = False) -> ProfileModel:
    """The latency model of a table file.

    gpu            the hardware that the answers are for; None: the table's own
    allow_foreign  accept a table of another machine or version

    Raises ConfigError when the file is not a table, or is of another machine, version or GPU.
    """
    table = read_table(path)
    if (why := foreign(table.header, ignore=["devices"])) and not allow_foreign:  # nothing runs here
        raise ConfigError(f"{path}: measured elsewhere ({why}); --allow-foreign uses it all the same")
    device = str(table.header["machine"].get("device"))
    own = hardware_of_device(device)
    if gpu is not None and (own is None or own.device_name != gpu.device_name) and not allow_foreign:
        raise ConfigError(f"{path}: measured on {device!r}, not on {gpu.name}; --allow-foreign uses it all the same")
    return ProfileModel.of(table, gpu or own)


@dataclass(frozen=True)
class ProfileModel(RooflineModel):
    """grids: by op and the sizes that are not axes; curves: P(R) by the kinds of both ops."""

    table: Table
    grids: Mapping[Family, SampleGrid]
    curves: Mapping[tuple[str, str], Curve]

    @staticmethod
    def of(table: Table, hardware: Hardware | None = None) -> ProfileModel:
        """hardware: gives the shape of what was not measured; made from the table itself when None. Raises ConfigError
        for a table without points."""
        if not table.times:
            raise ConfigError(f"{table.path}: no point is measured yet")
        hardware = hardware or measured_hardware(table)
        roofline = RooflineModel(hardware)
        samples: dict[Family, dict[Place, float]] = defaultdict(dict)
        for point, timing in table.times.items():
            if point.op != "copy":
                samples[point.op, point.family][_place(point, hardware)] = timing.us
        grids = {
            (op, family): SampleGrid.of(
                found, _estimated_us(roofline, op, family), [axis not in WITHOUT_ZERO for axis in AXES[op]]
            )
            for (op, family), found in samples.items()
        }
        model = ProfileModel(hardware, table, grids, {})
        return replace(model, curves=_curves(model))

    @property
    def correction(self) -> float:
        """The largest change that made the samples of an op grow with size, as a share: the noise of the table."""
        return max(grid.correction for grid in self.grids.values())

    def _answer(self, estimate: Prediction, op: str, place: Place, **family: Size) -> Prediction:
        """The estimate with the measured time in it, where the table has the op."""
        grid = self.grids.get((op, tuple(sorted(family.items()))))
        if grid is None:
            return estimate
        us, measured = grid.at(tuple(float(x) for x in place))
        return replace(estimate, us=us, source=PROFILE if measured else EXTRAPOLATED)

    def gemm(self, m: int, n: int, k: int, dtype: str = "bf16") -> Prediction:
        return self._answer(super().gemm(m, n, k, dtype), "gemm", (m,), n=n, k=k, dtype=dtype)

    def decode_attention(
        self, requests: int, context: float, q_heads: int, kv_heads: int, head_dim: int, *,
        kv_bytes: float = 2.0, sms: int | None = None,
    ) -> Prediction:  # fmt: skip
        estimate = super().decode_attention(requests, context, q_heads, kv_heads, head_dim, kv_bytes=kv_bytes, sms=sms)
        place = (requests, context, _per_sm(sms or 0, self.hardware))
        return self._answer(estimate, "decode_attention", place, **_heads(q_heads, kv_heads, head_dim, kv_bytes))

    def prefill_attention(
        self, tokens: int, context: float, q_heads: int, kv_heads: int, head_dim: int, *, kv_bytes: float = 2.0
    ) -> Prediction:
        estimate = super().prefill_attention(tokens, context, q_heads, kv_heads, head_dim, kv_bytes=kv_bytes)
        family = _heads(q_heads, kv_heads, head_dim, kv_bytes)
        return self._answer(estimate, "prefill_attention", (tokens, context), **family)

    def collective(self, kind: str, whole_bytes: float, devices: int) -> Prediction:
        estimate = super().collective(kind, whole_bytes, devices)
        return self._answer(estimate, "collective", (whole_bytes,), kind=kind, devices=devices)

    def append(self, rows: int, kv_heads: int, head_dim: int, *, kv_bytes: float = 2.0) -> Prediction:
        estimate = super().append(rows, kv_heads, head_dim, kv_bytes=kv_bytes)
        dtype = DTYPES.get(int(kv_bytes), "")
        return self._answer(estimate, "append", (rows,), kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)

    def norm(self, rows: int, hidden: int, *, element_bytes: float = 2.0) -> Prediction:
        estimate = super().norm(rows, hidden, element_bytes=element_bytes)
        return self._answer(estimate, "norm", (rows,), hidden=hidden, dtype=DTYPES.get(int(element_bytes), ""))

    def sampling(self, rows: int, vocab: int) -> Prediction:
        return self._answer(super().sampling(rows, vocab), "sampling", (rows,), vocab=vocab)

    def grouped_gemm(
        self, rows: float, experts: int, n: int, k: int, parts: int = 1, *, room: int = 1, dtype: str = "bf16"
    ) -> Prediction:
        estimate = super().grouped_gemm(rows, experts, n, k, parts, room=room, dtype=dtype)
        family: dict[str, Size] = {"experts": experts, "n": n, "k": k, "parts": parts, "room": room, "dtype": dtype}
        return self._answer(estimate, "grouped_gemm", (rows,), **family)

    def gather(self, rows: float, hidden: int, *, room: int = 1, element_bytes: float = 2.0) -> Prediction:
        estimate = super().gather(rows, hidden, room=room, element_bytes=element_bytes)
        dtype = DTYPES.get(int(element_bytes), "")
        return self._answer(estimate, "gather", (rows,), hidden=hidden, room=room, dtype=dtype)

    def combine(
        self, rows: int, here: float, hidden: int, choices: int, spread: int, *, element_bytes: float = 2.0
    ) -> Prediction:
        """Measured where choices are spread evenly; where more of them are here, as much longer as by the roofline."""
        estimate, even = (
            super(ProfileModel, self).combine(rows, n, hidden, choices, spread, element_bytes=element_bytes)
            for n in (here, rows * choices / spread)
        )
        dtype = DTYPES.get(int(element_bytes), "")
        found = self._answer(even, "combine", (rows,), hidden=hidden, choices=choices, spread=spread, dtype=dtype)
        return replace(estimate, us=found.us * estimate.us / even.us, source=found.source)

    def rate(self, kind: str, share: float, beside: str) -> Rate:
        """From the pairs, where such a pair was measured; else the published curve."""
        published = super().rate(kind, share, beside)  # and checks kind and share
        if (curve := self.curves.get((kind, beside))) is None:
            return published
        speed, measured = curve.at(share)
        return Rate(speed, PROFILE if measured else EXTRAPOLATED_RATE)


def _heads(q_heads: int, kv_heads: int, head_dim: int, kv_bytes: float) -> dict[str, Size]:
    dtype = DTYPES.get(int(kv_bytes), "")
    return {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}


def _per_sm(sms: int, hardware: Hardware) -> float:
    """Time falls with SMs and grows with this; 0: all SMs."""
    return 1.0 / min(sms or hardware.sm_count, hardware.sm_count)


def _place(point: Point, hardware: Hardware) -> Place:
    return tuple(_per_sm(point[axis], hardware) if axis == "sms" else float(point[axis]) for axis in AXES[point.op])


def _estimated_us(model: RooflineModel, op: str, family: tuple[tuple[str, Size], ...]) -> Callable[[Place], float]:
    estimate = _estimate(model, op, family)
    return lambda place: estimate(*place).us


def _estimate(model: RooflineModel, op: str, family: tuple[tuple[str, Size], ...]) -> Callable[..., Prediction]:
    """The roofline of an op by its place on its axes."""
    f: dict[str, Any] = dict(family)

    def attention(method: Callable[..., Prediction], *sizes: float, **options: Any) -> Prediction:
        return method(*sizes, f["q_heads"], f["kv_heads"], f["head_dim"], kv_bytes=float(BYTES[f["dtype"]]), **options)

    estimates: dict[str, Callable[..., Prediction]] = {
        "gemm": lambda m: model.gemm(m, f["n"], f["k"], f["dtype"]),
        "decode_attention": lambda requests, context, per_sm: attention(
            model.decode_attention, requests, context, sms=round(1 / per_sm)
        ),
        "prefill_attention": lambda tokens, context: attention(model.prefill_attention, tokens, context),
        "collective": lambda moved: model.collective(f["kind"], moved, f["devices"]),
        "append": lambda rows: model.append(rows, f["kv_heads"], f["head_dim"], kv_bytes=BYTES[f["dtype"]]),
        "norm": lambda rows: model.norm(rows, f["hidden"], element_bytes=BYTES[f["dtype"]]),
        "sampling": lambda rows: model.sampling(rows, f["vocab"]),
        "grouped_gemm": lambda rows: model.grouped_gemm(
            rows, f["experts"], f["n"], f["k"], f["parts"], room=f["room"], dtype=f["dtype"]
        ),
        "gather": lambda rows: model.gather(rows, f["hidden"], room=f["room"], element_bytes=BYTES[f["dtype"]]),
        "combine": lambda rows: model.combine(
            rows,
            rows * f["choices"] / f["spread"],
            f["hidden"],
            f["choices"],
            f["spread"],
            element_bytes=BYTES[f["dtype"]],
        ),
    }
    return estimates[op]


def _curves(model: ProfileModel) -> dict[tuple[str, str], Curve]:
    """P(R) of both ops of each kind of pair; an op's kind is what bounds it, as where the curves are asked for.

    R of decode attention with an SM budget: that part of the SMs; its speed is relative to all SMs. R of a collective:
    the share that the simulator gives one (`Calibration.network_share`). Without either, both have a half.
    """
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    hardware = model.hardware
    for pair, timing in model.table.pairs.items():
        second, speed = pair.second, timing.second_speed
        share = HALF
        if second.op == "collective":
            share = hardware.calibration.network_share
        elif second.op == "decode_attention" and second["sms"]:
            share = min(second["sms"], hardware.sm_count - 1) / hardware.sm_count
            heads: dict[str, Any] = {name: size for name, size in second.family if name != "dtype"}
            width = float(BYTES[second["dtype"]])
            alone = model.decode_attention(second["requests"], second["context"], **heads, kv_bytes=width)
            speed *= min(1.0, alone.us / timing.second_us)
        first_kind, second_kind = (
            _estimate(RooflineModel(hardware), point.op, point.family)(*_place(point, hardware)).bound
            for point in (pair.first, second)
        )
        found[first_kind, second_kind].append((1.0 - share, timing.first_speed))
        found[second_kind, first_kind].append((share, speed))
    return {kinds: Curve.of(points) for kinds, points in found.items()}


def measured_hardware(table: Table) -> Hardware:
    """A device that no hardware file names, such as a CPU, from its own table: the best rates and the least times that
    were measured. Raises ConfigError when the table lacks GEMMs or the copy."""
    times = table.times
    copies = [2 * point["bytes"] / timing.us * US for point, timing in times.items() if point.op == "copy"]
    rates = [
        2.0 * p["m"] * p["n"] * p["k"] / t.us * US * (2 if p["dtype"] == "f32" else 1)  # `Hardware.flops` halves it
        for p, t in times.items()
        if p.op == "gemm"
    ]
    if not copies or not rates:
        raise ConfigError(f"{table.path}: no hardware file for this device, and no copy or gemm in the table")
    moved = {
        timing.us: wire_bytes(point["kind"], point["bytes"], point["devices"])
        for point, timing in times.items()
        if point.op == "collective"
    }
    machine = table.header["machine"]
    return Hardware(
        name=str(machine["device"]).lower().replace(" ", "_"),
        device_name=str(machine["device"]),
        compute_capability="0.0",
        sm_count=max(1, int(table.header.get("sms") or machine.get("cpus") or 1)),
        fpus_per_sm=1,
        clock_ghz=1.0,
        bf16_flops=max(rates),
        fp8_flops=0.0,
        memory_bytes=int(table.header["memory_bytes"]),
        memory_bandwidth=max(copies),
        l2_bytes=1,
        shared_memory_per_sm=1,
        nvlink_bandwidth=max((sent / us * US for us, sent in moved.items()), default=max(copies)),
        nvlink_links=1,
        pcie_bandwidth=max(copies),
        node_size=int(machine["devices"]),
        calibration=Calibration(1.0, 1.0, 1.0, min(moved, default=0.0), min(t.us for t in times.values())),
    )
