"""What a model takes of each GPU, by the precision of its weights and the size of the mesh, and on which GPUs it fits.
From the sizes alone: no device is asked, no weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.cost.footprint import request_kv_bytes, weight_bytes
from nanoflow_jax.hardware import Hardware
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.parallel.mesh import valid_sizes
from nanoflow_jax.plan.known import known_plan, plans_with_target
from nanoflow_jax.plan.plan import NanoBatch, SchedulePlan
from nanoflow_jax.search.predict import TOKENS_PER_STEP, kv_capacity
from nanoflow_jax.step.attention import QUANTIZATIONS, check_quantization, page_dtype

PAGES = ("auto", "fp8")  # values of kv_cache_dtype that differ


@dataclass(frozen=True)
class Fit:
    """On GPUs of one kind. kv_tokens: by kv_cache_dtype, 0: the weights do not fit; max_model_len: of a request, with
    pages in the model's dtype; plan: what `auto` takes; refused: why none of it can be, in one line."""

    kv_tokens: dict[str, int]
    max_model_len: int
    plan: str
    refused: str | None = None


@dataclass(frozen=True)
class Share:
    """What one of `devices` GPUs holds.

    quantization  of the layers' weights, as `LLM` takes it
    weight_bytes  with one layout of O; a plan that needs both has more
    kv_bytes      of a token, in a request of the model's whole length, by kv_cache_dtype
    fits          by the GPU's name
    """

    devices: int
    quantization: str | None
    weight_bytes: int
    kv_bytes: dict[str, float]
    fits: dict[str, Fit]


PLAIN = SchedulePlan("plain", (NanoBatch(None, "reduce"),))  # one layout of O


def quantizations(config: ModelConfig) -> tuple[str | None, ...]:
    """Precisions in which the layers' weights can be had: of a checkpoint that comes quantized, its own."""
    return QUANTIZATIONS if config.quantization is None and config.experts is None else (config.quantization,)


def shares(config: ModelConfig, gpus: Sequence[Hardware]) -> list[Share]:
    """By mesh size, those of one node, and by precision."""
    known = plans_with_target()
    sizes = [n for n in valid_sizes(config) if n <= max(gpu.node_size for gpu in gpus)]
    return [_share(replace(config, quantization=q), n, gpus, known) for n in sizes for q in quantizations(config)]


def _share(config: ModelConfig, devices: int, gpus: Sequence[Hardware], known: Sequence[SchedulePlan]) -> Share:
    length = config.max_length
    item = {kind: page_dtype(config, kind).itemsize for kind in PAGES}
    return Share(
        devices,
        config.quantization,
        weight_bytes(param_infos(config, devices, PLAIN.layouts(config, devices)), devices),
        {kind: request_kv_bytes(config, devices, item[kind], length) / length for kind in PAGES},
        {gpu.name: _fit(config, gpu, devices, known) for gpu in gpus if devices <= gpu.node_size},
    )


def _fit(config: ModelConfig, gpu: Hardware, devices: int, known: Sequence[SchedulePlan]) -> Fit:
    """A model in the precision of `config`, with the plan that `auto` takes at the default size of a step."""
    rows, length = TOKENS_PER_STEP, config.max_length
    plan, _ = known_plan(config, gpu.name, devices, rows, rows * 5 // 8, known)
    try:
        check_quantization(config, gpu.capability)
    except ConfigError as error:
        return Fit(dict.fromkeys(PAGES, 0), 0, plan.name, str(error))
    kv = {
        kind: max(0, kv_capacity(config, plan, gpu, devices, rows, kv_cache_dtype=kind, request=length))
        for kind in PAGES
    }
    refused = None if kv["auto"] else "the weights do not fit"
    return Fit(kv, min(length, kv["auto"]), plan.name, refused)
