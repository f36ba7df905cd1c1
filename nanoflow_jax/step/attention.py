"""Which of our kernels a model uses on a GPU, decided before anything is lowered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from kernels_pallas.checks import FP8, HEAD_DIMS, PAGE_SIZE
from kernels_pallas.targets import mosaic_supported
from kernels_pallas.tuning import ADD_NORM, APPEND, DECODE, GROUPED, PREFILL, ROWS
from nanoflow_jax.config import ConfigError, Mlp, ModelConfig
from nanoflow_jax.models.layout import kv_groups

KERNELS = ("decode_attention", "prefill_attention", "append_kv", "add_rms_norm", "rows_to_fp8")
MAX_REPEATS = 16  # query heads per KV head, that the Mosaic backends of all accept
APPEND_ALIGNMENT = 128  # bytes of a token's K that the Mosaic append writes
ROWS_ALIGNMENT, ROWS_ROW = 128, 65_536  # columns of one device that the Mosaic rounding to fp8 takes
SCALED_ROW = 8192  # of the norm's, where it multiplies the update by scales
NORM_ALIGNMENT, NORM_ROW = 256, 16_384  # columns of one device that the Mosaic norm takes, and of a whole row at most
BACKENDS = ("auto", "mosaic", "xla")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3")
QUANTIZATIONS = (None, "fp8")


def page_dtype(config: ModelConfig, kv_cache_dtype: str) -> Any:
    """Of the KV pages: the model's own for "auto", float8_e4m3fn for "fp8" and "fp8_e4m3". Raises ConfigError."""
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        accepted = ", ".join(map(repr, KV_CACHE_DTYPES))
        raise ConfigError(f"kv_cache_dtype: {kv_cache_dtype!r} is not supported; accepted: {accepted}")
    return jnp.dtype(config.dtype if kv_cache_dtype == "auto" else FP8)


def check_quantization(config: ModelConfig, capability: tuple[int, int] | None) -> None:
    """Raises ConfigError for a `config.quantization` that there is not, and for a GPU that cannot multiply such
    weights; `capability` is None where there is no GPU, which can, slowly."""
    if config.quantization not in QUANTIZATIONS:
        accepted = ", ".join(map(repr, QUANTIZATIONS))
        raise ConfigError(f"quantization: {config.quantization!r} is not supported; accepted: {accepted}")
    if config.quantization is not None and config.experts is not None:
        raise ConfigError(f"quantization: {config.quantization!r} is not there for models with experts; accepted: None")
    if config.quantization == "fp8" and capability is not None and capability < (8, 9):
        needed = "fp8 tensor cores (compute capability 8.9 or more: Ada, Hopper and later), not "
        needed += ".".join(map(str, capability))
        if config.fp8_checkpoint is not None:
            raise ConfigError(
                f"quantization: the checkpoint's weights are in fp8, which needs {needed}; "
                "accepted: the 16-bit checkpoint"
            )
        raise ConfigError(f"quantization: 'fp8' needs {needed}; accepted: None")


def why_not_mosaic(config: ModelConfig, capability: tuple[int, int] | None, page_size: int) -> str | None:
    """One line on why the Mosaic kernels cannot run a model; None when they can. `capability` is None where there is no
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


def choose_backend(wanted: str, config: ModelConfig, capability: tuple[int, int] | None, page_size: int) -> str:
    """ "mosaic" or "xla". "auto" takes Mosaic where the GPU and the model allow it. Raises ConfigError."""
    if wanted not in BACKENDS:
        accepted = ", ".join(map(repr, BACKENDS))
        raise ConfigError(f"attention_backend: {wanted!r} is not accepted; accepted: {accepted}")
    if wanted == "xla":
        return wanted
    refusal = why_not_mosaic(config, capability, page_size)
    if wanted == "mosaic" and refusal:
        raise ConfigError(f"attention_backend: 'mosaic' cannot be used: {refusal}; accepted: 'auto', 'xla'")
    return "xla" if refusal else "mosaic"


def norm_fits(hidden: int, devices: int) -> bool:
    """Whether the Mosaic norm takes rows of so many elements, gathered from so many devices."""
    return hidden <= NORM_ROW and 8 % devices == 0 and hidden % (devices * NORM_ALIGNMENT) == 0


def rows_fit(config: ModelConfig, devices: int) -> bool:
    """Whether the Mosaic rounding to fp8 takes what KQV, O, UG and D read on one of so many devices."""
    sizes = config.hidden_size, config.num_heads * config.head_dim // devices, config.intermediate_size // devices
    return all(size % ROWS_ALIGNMENT == 0 and 0 < size <= ROWS_ROW for size in sizes)


def gated_in_one(config: ModelConfig, mlp: Mlp) -> bool:
    """Whether what fp8 D reads is made of what fp8 UG gives by one kernel, scales, gate and rounding."""
    return mlp.activation == "silu" and not mlp.bias and config.residual_multiplier == 1.0


def adds_products(config: ModelConfig, devices: int) -> bool:
    """Whether the residual's addition takes what fp8 O and D give ahead of the scales: no collective comes between."""
    return devices == 1 and config.norms == "before" and config.hidden_size <= SCALED_ROW


def experts_fit(config: ModelConfig, split: int) -> bool:
    """Whether the kernels take a model's experts, each split over so many devices."""
    experts, hidden = config.experts, config.hidden_size
    return experts is not None and hidden % 64 == 0 and hidden >= 128 and experts.size % (split * 64) == 0


@dataclass(frozen=True)
class KernelBackends:
    """The backend of each kernel: what `attention_backend` asks for, where the kernel has it for these pages."""

    decode: str
    prefill: str
    append: str
    norm: str
    experts: str | None = None  # the model has none
    rows: str | None = None  # to fp8: the weights are not

    @classmethod
    def of(
        cls, backend: str, pages: Any, config: ModelConfig, devices: int, expert_parallel: bool = False
    ) -> KernelBackends:
        """pages: their dtype; devices: of the mesh; expert_parallel: as `Layouts` has it."""
        split = 1 if expert_parallel else devices  # of an expert
        fp8, groups = jnp.dtype(pages) == FP8, kv_groups(config, devices) // devices
        aligned = groups * config.head_dim * jnp.dtype(pages).itemsize % APPEND_ALIGNMENT == 0
        return cls(
            decode=backend,
            prefill="xla" if fp8 else backend,
            append=backend if aligned else "xla",
            norm=backend if norm_fits(config.hidden_size, devices) else "xla",
            experts=None if config.experts is None else backend if experts_fit(config, split) else "xla",
            rows=None if config.quantization is None else backend if rows_fit(config, devices) else "xla",
        )

    def text(self) -> str:
        others = {name: getattr(self, name) for name in ("prefill", "append", "norm", "experts", "rows")}
        different = ", ".join(
            f"{name} {backend}" for name, backend in others.items() if backend not in (self.decode, None)
        )
        return f"{self.decode} ({different})" if different else self.decode

    def options(self, gpu: str, expected_context: int) -> KernelOptions:
        """gpu: a key of the tuning tables."""
        context = {"expected_context": expected_context}
        return KernelOptions(
            *(
                {"backend": backend} | ({"tuning": table[gpu], **more} if backend == "mosaic" else {})
                for backend, table, more in (
                    (self.decode, DECODE, context),
                    (self.prefill, PREFILL, context),
                    (self.append, APPEND, {}),
                    (self.norm, ADD_NORM, {}),
                    (self.experts or "xla", GROUPED, {}),
                    (self.rows or "xla", ROWS, {}),
                )
            )
        )


class KernelOptions(NamedTuple):
    """Keyword arguments of decode_attention, prefill_attention, append_kv, add_rms_norm, of grouped_gemm, gather_rows
    and combine_rows, and of rows_to_fp8."""

    decode: dict[str, Any]
    prefill: dict[str, Any]
    append: dict[str, Any]
    norm: dict[str, Any]
    experts: dict[str, Any]
    rows: dict[str, Any]
