"""A GPU and its node as figures: what the latency model divides by and what XLA compiles for.

The files in `configs/hardware/*.toml` carry the source of each figure. A user's own file has the same fields.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from nanoflow_jax.config import ConfigError, config_path, configs_root
from nanoflow_jax.system.reading import read_toml


@dataclass(frozen=True)
class Calibration:
    """How much of the data sheet is reached. Efficiencies are shares in (0, 1], latencies microseconds.

    network_share: of the SMs, that a collective takes from what runs beside it. A file may leave it out.
    """

    gemm_efficiency: float
    memory_efficiency: float
    network_efficiency: float
    network_latency_us: float
    kernel_latency_us: float
    network_share: float = 0.3


@dataclass(frozen=True)
class Hardware:
    """One GPU of a node of `node_size`. Rates are per second and per GPU, sizes are bytes.

    `nvlink_bandwidth` and `pcie_bandwidth` count one direction. `fp8_flops` is 0 where there are no fp8 tensor cores.
    """

    name: str
    device_name: str
    compute_capability: str
    sm_count: int
    fpus_per_sm: int
    clock_ghz: float
    bf16_flops: float
    fp8_flops: float
    memory_bytes: int
    memory_bandwidth: float
    l2_bytes: int
    shared_memory_per_sm: int
    nvlink_bandwidth: float
    nvlink_links: int
    pcie_bandwidth: float
    node_size: int
    calibration: Calibration

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability as (major, minor)."""
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)

    def flops(self, dtype: str) -> float:
        """Dense FLOP/s of the tensor cores for operands of an HLO dtype; fp8 without fp8 units runs at the bf16
        rate."""
        if dtype.startswith("f8") and self.fp8_flops:
            return self.fp8_flops
        if dtype == "f32":  # TF32 on every generation here: half the bf16 rate
            return self.bf16_flops / 2
        return self.bf16_flops


def _read_field(where: str, name: str, kind: str, value: Any) -> Any:
    if kind == "str":
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{where}: {value!r} is not accepted; expected a text")
        if name == "compute_capability":
            parts = value.split(".")
            if len(parts) != 2 or not all(part.isdecimal() for part in parts):
                raise ConfigError(f'{where}: {value!r} is not accepted; expected a text like "9.0"')
        return value
    high = 1 if name.endswith("efficiency") else 0.9 if name.endswith("share") else float("inf")
    may_be_zero = name == "fp8_flops" or name.endswith("latency_us")
    good_type = isinstance(value, int if kind == "int" else int | float) and not isinstance(value, bool)
    if not good_type or not (0 < value <= high or (value == 0 and may_be_zero)):
        wanted = f"{'a whole' if kind == 'int' else 'a'} number above 0" + f" and at most {high:g}" * (high < 1e9)
        raise ConfigError(f"{where}: {value!r} is not accepted; expected {wanted}")
    return int(value) if kind == "int" else float(value)


def _read_table(path: Path, table: dict[str, Any], cls: type, prefix: str, given: dict[str, Any]) -> Any:
    wanted = {field.name: str(field.type) for field in fields(cls) if field.name not in given}
    optional = {field.name for field in fields(cls) if field.default is not MISSING}
    for name in table:
        if name not in wanted and name not in given:
            raise ConfigError(f"{path.name}: unknown field {prefix}{name!r}; accepted: {', '.join(sorted(wanted))}")
    missing = [name for name in wanted if name not in table and name not in optional]
    if missing:
        raise ConfigError(
            f"{path.name}: missing field {prefix}{missing[0]!r}; a hardware file needs {', '.join(wanted)}"
        )
    read = {
        name: _read_field(f"{path.name}: {prefix}{name}", name, kind, table[name])
        for name, kind in wanted.items()
        if name in table
    }
    return cls(**read, **given)


def load_hardware(name_or_path: str | Path) -> Hardware:
    """Hardware from a name of `configs/hardware` ("h200") or the path of a TOML file.

    Raises ConfigError, one line naming the field and what is accepted.
    """
    path = config_path("hardware", str(name_or_path))
    table = read_toml(path)
    inner = table.pop("calibration", None)
    if not isinstance(inner, dict):
        names = ", ".join(field.name for field in fields(Calibration))
        raise ConfigError(f"{path.name}: missing table [calibration]; it holds {names}")
    calibration = _read_table(path, inner, Calibration, "calibration.", {})
    if "name" in table:
        raise ConfigError(f"{path.name}: unknown field 'name'; the file's own name is used")
    return _read_table(path, table, Hardware, "", {"name": path.stem, "calibration": calibration})


def hardware_of(device: Any) -> Hardware | None:
    """The hardware file of a JAX device; None for a CPU, and for a GPU that no file names."""
    return hardware_of_device(device.device_kind) if device.platform == "gpu" else None


def known_hardware() -> list[Hardware]:
    """All of `configs/hardware`, by name."""
    return [load_hardware(path) for path in sorted((configs_root() / "hardware").glob("*.toml"))]


def hardware_of_device(kind: str) -> Hardware | None:
    """The hardware file of a GPU that JAX calls `kind`; None when no file names it."""
    for hardware in known_hardware():
        if hardware.device_name.startswith(kind) or kind.startswith(hardware.device_name):
            return hardware
    return None
