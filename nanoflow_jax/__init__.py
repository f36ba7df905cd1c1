"""Throughput-first LLM inference in JAX: nano-batches whose GEMMs run beside attention and collectives.

from nanoflow_jax import LLM, SamplingParams, generate
generate("tiny", ["12+30="], max_tokens=8)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanoflow_jax.system.platform import prefer_cpu_without_gpu, use_cuda_toolkit
from nanoflow_jax.version import __version__

prefer_cpu_without_gpu()
use_cuda_toolkit()

if TYPE_CHECKING:
    from nanoflow_jax.api import LLM, generate
    from nanoflow_jax.sampling_params import SamplingParams, StructuredOutputsParams

__all__ = ["LLM", "SamplingParams", "StructuredOutputsParams", "__version__", "generate"]


def __getattr__(name: str) -> Any:
    """Loads JAX only when something that needs it is used."""
    if name in ("LLM", "generate"):
        from nanoflow_jax import api

        return getattr(api, name)
    if name in ("SamplingParams", "StructuredOutputsParams"):
        from nanoflow_jax import sampling_params

        return getattr(sampling_params, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """With what is loaded when it is used, for tab completion."""
    return sorted({*globals(), *__all__})
