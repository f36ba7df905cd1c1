"""Which GPU has which kernel. Decided by compute capability before anything is lowered, never by catching an error:
lowering a Mosaic kernel for a GPU older than Hopper ends the process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A generation of GPUs. `mosaic`: the kernels that have a Mosaic path there; all of them have the XLA path."""

    gpus: tuple[str, ...]
    major: int  # of the compute capability
    architecture: str
    mosaic: tuple[str, ...]
    note: str


TARGETS = (
    Target(("A100",), 8, "sm_80", (), "Mosaic GPU emits instructions that start with Hopper"),
    Target(
        ("H100", "H200"),
        9,
        "sm_90a",
        (
            "decode_attention",
            "prefill_attention",
            "append_kv",
            "add_rms_norm",
            "rows_to_fp8",
            "grouped_gemm",
            "gather_rows",
            "combine_rows",
        ),
        "TMA and wgmma",
    ),
    Target(("B200",), 10, "sm_100a", (), "has no wgmma; a tcgen05 kernel is not written"),
)


def mosaic_supported(capability: tuple[int, int], kernel: str = "decode_attention") -> bool:
    """Whether `kernel` has a Mosaic path on GPUs of this compute capability."""
    return any(target.major == capability[0] and kernel in target.mosaic for target in TARGETS)
