"""How long one op takes: a roofline over FLOP, bytes of memory and bytes of network, corrected by
`Hardware.calibration`.

Every prediction says where it comes from (`source`) and what binds it (`bound`), so that a table never mixes a
measurement with an estimate unseen.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow_jax.config import ConfigError
from nanoflow_jax.hardware import Hardware

US = 1e6


@dataclass(frozen=True)
class Prediction:
    """Time of one kernel alone on the GPU, in microseconds. bound: compute, memory, network or host."""

    us: float
    bound: str
    source: str
    flops: float = 0.0
    bytes: float = 0.0


def kernel(hardware: Hardware, flops: float, memory_bytes: float, dtype: str = "bf16") -> Prediction:
    """Roofline of one kernel: the longer of arithmetic and memory traffic, plus the gap before the next kernel.

    flops: FLOP of the tensor cores; memory_bytes: bytes read and written once; dtype: HLO dtype of the operands.
    """
    calibration = hardware.calibration
    compute_us = flops / (hardware.flops(dtype) * calibration.gemm_efficiency) * US
    memory_us = memory_bytes / (hardware.memory_bandwidth * calibration.memory_efficiency) * US
    bound = "compute" if compute_us > memory_us else "memory"
    us = max(compute_us, memory_us) + calibration.kernel_latency_us
    return Prediction(us, bound, "roofline", flops, memory_bytes)


def gemm(hardware: Hardware, m: int, n: int, k: int, dtype: str = "bf16", bytes_per_element: float = 2) -> Prediction:
    """`[m, k] @ [k, n] -> [m, n]`: 2·m·n·k FLOP; operands and result pass through memory once."""
    return kernel(hardware, 2.0 * m * n * k, bytes_per_element * (m * k + k * n + m * n), dtype)


def wire_bytes(kind: str, whole_bytes: float, devices: int) -> float:
    """Bytes that each GPU sends (and receives) over NVLink in a ring, or through the switch, of `devices` GPUs.

    whole_bytes: size of the whole tensor: the result of an all-gather, the operand of a reduce-scatter, the tensor
    of an all-reduce, what one GPU holds for an all-to-all or a permute. An all-reduce is a reduce-scatter and an
    all-gather: twice. Raises ConfigError for another kind.
    """
    share = whole_bytes * (devices - 1) / devices
    if kind in ("all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"):
        return share
    if kind == "all-reduce":
        return 2 * share
    if kind in ("collective-permute", "collective-broadcast", "collective-reduce"):
        return whole_bytes if devices > 1 else 0.0
    raise ConfigError(
        f"collective: unknown kind {kind!r}; accepted: all-gather, reduce-scatter, all-reduce, all-to-all, ..."
    )


def collective(hardware: Hardware, kind: str, whole_bytes: float, devices: int) -> Prediction:
    """Time of a collective: latency + bytes on the wire over the share of NVLink that is reached."""
    sent = wire_bytes(kind, whole_bytes, devices)
    if devices == 1:
        return Prediction(0.0, "network", "roofline")
    calibration = hardware.calibration
    us = sent / (hardware.nvlink_bandwidth * calibration.network_efficiency) * US + calibration.network_latency_us
    return Prediction(us, "network", "roofline", 0.0, sent)


def host_copy(hardware: Hardware, copied_bytes: float) -> Prediction:
    """Copy between device and host memory over PCIe, one direction, at the data sheet's rate."""
    us = copied_bytes / hardware.pcie_bandwidth * US + hardware.calibration.kernel_latency_us
    return Prediction(us, "host", "roofline", 0.0, copied_bytes)


def optimal_tokens_per_second(hardware: Hardware, parameters: float, calibrated: bool = False) -> float:
    """NanoFlow's optimum per GPU, tensor cores always busy: FLOP/s ÷ (2 × parameters).

    calibrated: use the GEMM rate that is reached, as NanoFlow's figures do, instead of the data sheet's.
    """
    rate = hardware.bf16_flops * (hardware.calibration.gemm_efficiency if calibrated else 1.0)
    return rate / (2 * parameters)
