"""Before Mosaic kernels are used on a GPU: each once, against the XLA path. A kernel that is wrong is never used, and
never replaced in silence either."""

from __future__ import annotations

import logging
import time
from functools import cache
from typing import Any

import jax

from kernels_pallas.self_check import KernelError, check_kernel
from kernels_pallas.self_check_cases import Heads
from kernels_pallas.tuning import ADD_NORM, APPEND, DECODE, GROUPED, PREFILL, ROWS, tuned_gpu
from nanoflow_jax.config import ConfigError
from nanoflow_jax.step.attention import KernelBackends

logger = logging.getLogger("nanoflow_jax")


def check_mosaic_kernels(backends: KernelBackends, heads: Heads, device: Any, interpret: Any = None) -> None:
    """Checks those kernels whose backend is "mosaic", once per process and shape of heads. Logs how long it took.

    device     a local device like those of the mesh
    interpret  as the kernels take it, for tests without a GPU

    Raises ConfigError, one line saying which kernel failed and how, and what to pass instead.
    """
    gpu = tuned_gpu(device.device_kind)
    kernels = (
        ("decode_attention", backends.decode, DECODE),
        ("prefill_attention", backends.prefill, PREFILL),
        ("append_kv", backends.append, APPEND),
        ("add_rms_norm", backends.norm, ADD_NORM),
        ("rows_to_fp8", backends.rows, ROWS),
        ("grouped_gemm", backends.experts, GROUPED),
    )
    started = time.monotonic()
    errors = {}
    for name, backend, tunings in kernels:
        if backend != "mosaic":
            continue
        try:
            errors[name] = _checked(name, heads, tunings[gpu], device, interpret)
        except KernelError as error:
            raise ConfigError(
                f"attention_backend: the Mosaic kernels are not used: {error} ({device.device_kind}, "
                f"{heads.q_heads} query and {heads.kv_heads} KV heads of {heads.head_dim}); "
                'accepted: attention_backend="xla"'
            ) from None
    logger.info(
        "Mosaic kernels checked against the XLA path in %.1f s: %s",
        time.monotonic() - started,
        ", ".join(f"{name} {error:.1e}" for name, error in errors.items()),
    )


@cache
def _checked(name: str, heads: Heads, tuning: Any, device: Any, interpret: Any) -> float:
    with jax.default_device(device):
        return check_kernel(name, heads, tuning=tuning, interpret=interpret)
