"""How long an op takes, alone and beside another: the one model that the simulator, the search, the inspector and the
benchmarks ask.

`RooflineModel` answers in terms of local shapes (what one GPU computes), from a hardware file: the longer of arithmetic
and memory traffic, corrected by `Hardware.calibration`, and NanoFlow's published curves for ops that share a GPU. A
profile's model (`profile.measured`) is one that answers from measurements where it has them. Whoever does not mind asks
a `LatencyModel`.

Every answer says where it comes from (`source`), so that no table mixes a measurement with an estimate unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from kernels_pallas.group_tiles import TILE
from kernels_pallas.targets import mosaic_supported
from nanoflow_jax.config import ConfigError
from nanoflow_jax.hardware import Hardware

US = 1e6
TILE_ROWS = 128  # rows of a prefill attention tile: each reads the pages of its context once

# Where an answer comes from.
PROFILE = "profile"
EXTRAPOLATED = "profile, extrapolated by roofline"
ROOFLINE = "roofline"
PUBLISHED = "published curve"

# NanoFlow's P(R), measured on A100: the speed that an op keeps, as a share of its speed alone, with resource share R
# while another runs beside it. Between the points and to (0, 0) and (1, 1): straight lines. GEMM: P(R) = R.
PUBLISHED_RATES: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "compute": ((0.0, 1.0), (0.0, 1.0)),
    "memory": (
        (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        (0.0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0),
    ),
    "network": ((0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0), (0.0, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)),
}


@dataclass(frozen=True)
class Prediction:
    """Time of one op alone on the GPU, in microseconds. bound: compute, memory, network or host."""

    us: float
    bound: str
    source: str
    flops: float = 0.0
    bytes: float = 0.0

    def times(self, share: float) -> Prediction:
        return replace(self, us=self.us * share, flops=self.flops * share, bytes=self.bytes * share)


@dataclass(frozen=True)
class Rate:
    """The speed that an op keeps beside another, as a share of its speed alone, in [0, 1]."""

    speed: float
    source: str


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


def published_rate(kind: str, share: float) -> float:
    """NanoFlow's P(R) of a kind. Raises ConfigError for another kind, or a share outside (0, 1]."""
    if kind not in PUBLISHED_RATES:
        raise ConfigError(f"rate: unknown kind {kind!r}; accepted: {', '.join(PUBLISHED_RATES)}")
    if not 0 < share <= 1:
        raise ConfigError(f"rate: share {share} is not accepted; expected a number above 0 and at most 1")
    return float(np.interp(share, *PUBLISHED_RATES[kind]))


@dataclass(frozen=True)
class RooflineModel:
    """Times of ops by their local shapes. Heads, groups and columns are those of one GPU; dtypes are HLO's names.
    kv_bytes: of one element of K or V.

    hardware  the GPU that the answers are for
    """

    hardware: Hardware

    def kernel(self, flops: float, memory_bytes: float, dtype: str = "bf16") -> Prediction:
        """Any kernel, by its FLOP and the bytes that it reads and writes once: the longer of arithmetic and memory
        traffic, plus the gap before the next kernel. Always an estimate."""
        calibration = self.hardware.calibration
        compute_us = flops / (self.hardware.flops(dtype) * calibration.gemm_efficiency) * US
        memory_us = memory_bytes / (self.hardware.memory_bandwidth * calibration.memory_efficiency) * US
        bound = "compute" if compute_us > memory_us else "memory"
        us = max(compute_us, memory_us) + calibration.kernel_latency_us
        return Prediction(us, bound, ROOFLINE, flops, memory_bytes)

    def gemm(self, m: int, n: int, k: int, dtype: str = "bf16") -> Prediction:
        """`[m, k] @ [k, n] -> [m, n]`; dtype of what is multiplied, as HLO names it. fp8 gives bfloat16."""
        width = {"f32": 4, "bf16": 2, "f16": 2}.get(dtype, 1)
        return self.kernel(2.0 * m * n * k, float(width * (m * k + k * n) + max(width, 2) * m * n), dtype)

    def decode_attention(
        self, requests: int, context: float, q_heads: int, kv_heads: int, head_dim: int, *,
        kv_bytes: float = 2.0, sms: int | None = None,
    ) -> Prediction:  # fmt: skip
        """GEMV: one row of each request attends to `context` tokens, on average, of its pages, which pass through
        memory once for all query heads. sms: the most SMs it may use, by the published curve; None: all."""
        flops = 4.0 * requests * context * q_heads * head_dim
        whole = self.kernel(flops, requests * context * kv_heads * head_dim * 2 * kv_bytes)
        if sms is None or sms >= self.hardware.sm_count:
            return whole
        speed = published_rate("memory", sms / self.hardware.sm_count)
        return Prediction(whole.us / speed, whole.bound, PUBLISHED, whole.flops, whole.bytes)

    def prefill_attention(
        self, tokens: int, context: float, q_heads: int, kv_heads: int, head_dim: int, *, kv_bytes: float = 2.0
    ) -> Prediction:
        """PF: rows of chunks, each attending to `context` tokens on average."""
        flops = 4.0 * tokens * context * q_heads * head_dim
        return self.kernel(flops, tokens / TILE_ROWS * context * kv_heads * head_dim * 2 * kv_bytes)

    def collective(self, kind: str, whole_bytes: float, devices: int) -> Prediction:
        """Latency + bytes on the wire over the share of NVLink that is reached. kind and whole_bytes: see `wire_bytes`.
        `bytes` of the answer are those on the wire."""
        sent = wire_bytes(kind, whole_bytes, devices)
        if devices == 1:
            return Prediction(0.0, "network", ROOFLINE)
        calibration = self.hardware.calibration
        rate = self.hardware.nvlink_bandwidth * calibration.network_efficiency
        return Prediction(sent / rate * US + calibration.network_latency_us, "network", ROOFLINE, 0.0, sent)

    def append(self, rows: int, kv_heads: int, head_dim: int, *, kv_bytes: float = 2.0) -> Prediction:
        """New K and V of `rows` tokens are read, and written into their pages."""
        return self.kernel(0.0, rows * kv_heads * head_dim * 2 * 2 * kv_bytes)

    def norm(self, rows: int, hidden: int, *, element_bytes: float = 2.0) -> Prediction:
        """Residual and update are added and written back, and the normed sum is written."""
        return self.kernel(0.0, 4 * rows * hidden * element_bytes)

    def sampling(self, rows: int, vocab: int) -> Prediction:
        """The next token of `rows` rows from `vocab` local columns of float32 logits, which are read twice: for the
        largest, and for the sum of the exponentials."""
        return self.kernel(0.0, 2 * rows * vocab * 4)

    def grouped_gemm(
        self, rows: float, experts: int, n: int, k: int, parts: int = 1, *, room: int = 1, dtype: str = "bf16"
    ) -> Prediction:
        """Rows spread at random over experts, `[rows, k]` by weights `[experts, parts, n, k]` -> `[rows, n]`, in arrays
        with room for `room` times as many. Whole tiles, of which an expert's last is half full, and the weights of
        those experts that have any row. Where there is no kernel, every row that there is room for by every expert."""
        used = experts * (1 - (1 - 1 / experts) ** rows)
        tiles = max(used, rows / TILE + used / 2)
        if not mosaic_supported(self.hardware.capability, "grouped_gemm"):
            used, tiles = experts, experts * rows * room / TILE
        moved = {"f32": 4, "bf16": 2}[dtype] * (used * parts * n * k + rows * (k + n))
        return self.kernel(2.0 * tiles * TILE * parts * n * k, moved, dtype)

    def gather(self, rows: float, hidden: int, *, room: int = 1, element_bytes: float = 2.0) -> Prediction:
        """Rows are brought into another order, likewise; where there is no kernel, all that there is room for."""
        moved = rows * (1 if mosaic_supported(self.hardware.capability, "gather_rows") else room)
        return self.kernel(0.0, 2 * moved * hidden * element_bytes)

    def combine(
        self, rows: int, here: float, hidden: int, choices: int, spread: int, *, element_bytes: float = 2.0
    ) -> Prediction:
        """Weighted sums for `rows` tokens of `choices` rows each, which are spread over so many devices: `here` of them
        are on this one. XLA reads a row for every choice; for those that are not here the first, again and again."""
        read = here if mosaic_supported(self.hardware.capability, "combine_rows") else rows * choices
        return self.kernel(0.0, (read + rows) * hidden * element_bytes)

    def host_copy(self, copied_bytes: float) -> Prediction:
        """Between device and host memory, one direction, at the data sheet's rate of PCIe."""
        us = copied_bytes / self.hardware.pcie_bandwidth * US + self.hardware.calibration.kernel_latency_us
        return Prediction(us, "host", ROOFLINE, 0.0, copied_bytes)

    def rate(self, kind: str, share: float, beside: str) -> Rate:
        """P(R): the speed that an op of a kind (compute, memory, network) keeps with resource share R in (0, 1] while
        an op of kind `beside` runs: NanoFlow's curve of the kind, whatever is beside it."""
        return Rate(published_rate(kind, share), PUBLISHED)


LatencyModel = RooflineModel  # or one of its kind, which knows more


def optimal_tokens_per_second(
    hardware: Hardware, parameters: float, calibrated: bool = False, fp8: bool = False
) -> float:
    """NanoFlow's optimum per GPU, tensor cores always busy: FLOP/s ÷ (2 × parameters).

    calibrated: use the GEMM rate that is reached, as NanoFlow's figures do, instead of the data sheet's; fp8: of the
    GEMMs.
    """
    rate = hardware.fp8_flops if fp8 else hardware.bf16_flops
    rate *= hardware.calibration.gemm_efficiency if calibrated else 1.0
    return rate / (2 * parameters)
