"""The compiler options of a step, in one place, each with its reason."""

from __future__ import annotations


def compiler_options(platform: str) -> dict[str, str | int | bool]:
    """Options for `lowered.compile(compiler_options=...)` on platform "gpu" (or "cuda"); none elsewhere."""
    if platform not in ("gpu", "cuda"):
        return {}
    return {
        # Two nano-batches share a weight: merged, their GEMMs become one and nothing is left to overlap with.
        "xla_gpu_dot_merger_threshold_mb": 0,
        # Combined, collectives of different nano-batches would wait for each other.
        "xla_gpu_all_gather_combine_threshold_bytes": 0,
        "xla_gpu_all_reduce_combine_threshold_bytes": 0,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 0,
    }
