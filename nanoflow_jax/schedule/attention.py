"""Which attention kernels a model can use on a GPU, decided before anything is lowered."""

from __future__ import annotations

from kernels_pallas.targets import mosaic_supported
from nanoflow_jax.config import ModelConfig

KERNELS = ("decode_attention", "prefill_attention", "append_kv")
HEAD_DIMS, MAX_REPEATS, PAGE_SIZE = (64, 128), 16, 64  # what the Mosaic backends of all accept


def why_not_mosaic(config: ModelConfig, capability: tuple[int, int] | None, page_size: int) -> str | None:
    """One line on why the Mosaic kernels cannot run a model; None when it can. `capability` is None where there is no
    GPU."""
    if capability is None or not all(mosaic_supported(capability, kernel) for kernel in KERNELS):
        found = "no GPU" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
        return f"it needs a Hopper GPU (compute capability 9.x), not {found}"
    if config.dtype != "bfloat16":
        return f"it needs dtype 'bfloat16', not {config.dtype!r}"
    if page_size != PAGE_SIZE:
        return f"it needs page_size {PAGE_SIZE}, not {page_size}"
    if config.head_dim not in HEAD_DIMS:
        return f"it needs a head_dim of {HEAD_DIMS[0]} or {HEAD_DIMS[1]}, not {config.head_dim}"
    if config.heads_per_kv_head > MAX_REPEATS:
        return f"it needs at most {MAX_REPEATS} query heads per KV head, not {config.heads_per_kv_head}"
    return None
