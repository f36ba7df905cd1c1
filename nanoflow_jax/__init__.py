"""Throughput-first LLM inference in JAX: nano-batches whose GEMMs run beside attention and collectives.

from nanoflow_jax import LLM, SamplingParams, generate
generate("tiny", ["12+30="], max_tokens=8)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanoflow_jax.platform import prefer_cpu_without_gpu, use_cuda_toolkit

prefer_cpu_without_gpu()
use_cuda_toolkit()

if TYPE_CHECKING:
    from nanoflow_jax.api import LLM, generate
    from nanoflow_jax.engine.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "generate"]


def __getattr__(name: str) -> Any:
    """Loads JAX only when something that needs it is used."""
    if name in ("LLM", "generate"):
        from nanoflow_jax import api

        return getattr(api, name)
    if name == "SamplingParams":
        from nanoflow_jax.engine.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
