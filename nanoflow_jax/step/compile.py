"""Compiling a step: the same way for the devices at hand and for GPUs that are not, with every compiler option in
one place."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from kernels_pallas.expected import LATENCY
from nanoflow_jax.config import ModelConfig
from nanoflow_jax.models.layout import ModelParams, padded_vocab
from nanoflow_jax.models.params import abstract_params
from nanoflow_jax.parallel.mesh import AXIS, local_aval, replicated
from nanoflow_jax.plan.plan import SchedulePlan
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.extras import LARGEST, MASK_SPECS, Extra, Logprobs, Sample, build_extra
from nanoflow_jax.step.logprobs import no_scores
from nanoflow_jax.step.sampler import Masks
from nanoflow_jax.step.slots import (
    CACHE_SPEC,
    KVCache,
    SlotSizes,
    StepState,
    abstract_slots,
    cache_shape,
    packed_length,
)
from nanoflow_jax.step.trace import END_SPECS, StepSpec, build_step

Option = str | int | bool

GPU_OPTIONS: Mapping[str, Option] = {
    # Off by default below compute capability 9.0, where every collective would then be synchronous.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # Two nano-batches share a weight: merged, their GEMMs become one and nothing is left to overlap with.
    "xla_gpu_dot_merger_threshold_mb": 0,
    # Combined, collectives of different nano-batches would wait for each other.
    "xla_gpu_all_gather_combine_threshold_bytes": 0,
    "xla_gpu_all_reduce_combine_threshold_bytes": 0,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 0,
    # XLA counts the donated pages twice: with a pool that fills the memory it would recompute, and move collectives
    # to where nothing runs beside them.
    "xla_disable_hlo_passes": "rematerialization",
    # GPUs without bfloat16 addition (A100) would keep the residual's float32 sum: another rounding than elsewhere, and
    # one more pass over memory, in float32, per norm.
    "xla_allow_excess_precision": False,
    # Triton GEMMs are chosen by measuring; without the GPU they would be untuned fusions that no deployment runs.
    "xla_gpu_enable_triton_gemm": False,
    # XLA's own list and the conditionals and loops of `step.extras`: outside of a command buffer the host waits for
    # a predicate, so that the next step could not be dispatched before this one is nearly done.
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
}

PROFILE_OPTION = "xla_gpu_pgle_profile_file_or_directory_path"


# A gather in fp8 is two, of values and of their scales, for which this makes one: each has a latency. Those of
# different nano-batches depend on each other, where the order is enforced, and stay apart.
FP8_GATHER_OPTIONS: Mapping[str, Option] = {"xla_gpu_all_gather_combine_threshold_bytes": 2**40}
# For programs with kernels on a stream of their own: command buffers would put them back on one.
STREAM_OPTIONS: Mapping[str, Option] = {"xla_gpu_enable_command_buffer": ""}


def compiler_options(platform: str, plan: SchedulePlan | None) -> dict[str, Option]:
    """Options for `lowered.compile(compiler_options=...)` on platform "gpu" or "cuda"; none elsewhere."""
    if platform not in ("gpu", "cuda"):
        return {}
    if plan is None:
        return dict(GPU_OPTIONS)
    more = {**(FP8_GATHER_OPTIONS if plan.gathers else {}), **(STREAM_OPTIONS if plan.lanes else {})}
    return {**GPU_OPTIONS, **more}


def abstract_cache(
    config: ModelConfig, mesh: Mesh | AbstractMesh, dtype: Any, num_pages: int, page_size: int
) -> KVCache:
    """The KV cache as abstract arrays on `mesh`."""
    shape = cache_shape(config, mesh.size, num_pages, page_size)
    pages = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, CACHE_SPEC))
    return KVCache(pages, pages)


@dataclass(frozen=True)
class Program:
    """The step of an engine, but for its size: a program of its own is compiled for each `StepShape`.

    spec   its shape does not matter
    infos  the weights, declared for the mesh (of `spec.rank_of` devices: that rank's shards)
    """

    spec: StepSpec
    mesh: Mesh  # whose devices may be compile-only
    infos: ModelParams
    sizes: SlotSizes
    num_pages: int
    page_size: int

    @property
    def state(self) -> StepState:
        """Cache and slots as abstract arrays on the mesh."""
        spec, config, whole = self.spec, self.spec.config, self._whole_mesh
        fp8 = spec.kv_cache_dtype != "auto"
        dtype = spec.page_dtype if fp8 else self.infos.embedding.dtype
        cache = abstract_cache(config, whole, dtype, self.num_pages, self.page_size)
        return self._local(StepState(cache, abstract_slots(config, whole, self.sizes)))

    @property
    def _whole_mesh(self) -> Mesh | AbstractMesh:
        rank_of = self.spec.rank_of
        return self.mesh if rank_of is None else AbstractMesh((rank_of,), (AXIS,))

    def _local(self, avals: Any) -> Any:
        """On the mesh, of arrays on the whole one."""
        if self.spec.rank_of is None:
            return avals
        return jax.tree.map(lambda aval: local_aval(aval, self.mesh), avals)

    def _replicated(self, *dims: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=replicated(self.mesh))

    @property
    def _leaves(self) -> tuple[Any, ...]:
        return tuple(jax.tree.leaves(abstract_params(self.infos, self.mesh)))

    def trace(self, shape: StepShape, *, enforce_order: bool | None = None) -> jax.stages.Traced:
        """Traces the step of a size. enforce_order: None is what `spec` says."""
        ordered = self.spec.enforce_order if enforce_order is None else enforce_order
        spec = replace(self.spec, shape=shape, enforce_order=ordered)
        step = build_step(spec, self.mesh, self.infos, self.page_size)
        return step.trace(self._leaves, self.state, self._replicated(packed_length(shape)))

    def lower(self, shape: StepShape, *, enforce_order: bool | None = None) -> jax.stages.Lowered:
        """The step of a size, traced and lowered."""
        return self.trace(shape, enforce_order=enforce_order).lower()

    def lower_extra(self, extra: Extra, shape: StepShape) -> jax.stages.Lowered:
        """What some rows want after a step of a size, traced and lowered."""
        return self.trace_extra(extra, shape).lower()

    def trace_extra(self, extra: Extra, shape: StepShape) -> jax.stages.Traced:
        """Traces what some rows want after a step of a size; `Score` needs one with prefill rows."""
        program = build_extra(extra, replace(self.spec, shape=shape), self.mesh, self.infos)
        packed, count, config = self._replicated(packed_length(shape)), shape.sampled_rows, self.spec.config
        vocab, whole = padded_vocab(config, self._whole_mesh.size), self._whole_mesh
        sharding = NamedSharding(whole, END_SPECS.logits)
        logits = self._local(jax.ShapeDtypeStruct((count, vocab), jnp.float32, sharding=sharding))
        if isinstance(extra, Sample):
            bits = jax.ShapeDtypeStruct(
                (extra.masks, vocab // 8), jnp.uint8, sharding=NamedSharding(whole, MASK_SPECS.bits)
            )
            masks = (Masks(self._local(bits), self._replicated(count)),) if extra.masks else ()
            return program.trace(self.state.slots, packed, logits, *masks)
        if isinstance(extra, Logprobs):
            return program.trace(packed, logits, self._replicated(count))
        hidden = self._replicated(shape.prefill_rows, config.hidden_size, dtype=self.infos.embedding.dtype)
        scores = jax.eval_shape(lambda: no_scores(shape.prefill_rows))
        scores = jax.tree.map(lambda x: self._replicated(*x.shape, dtype=x.dtype), scores)
        return program.trace(self._leaves, packed, hidden, scores)


def extras_of(shape: StepShape) -> tuple[Extra, ...]:
    """What rows of such a step may want, the largest programs."""
    return LARGEST if shape.prefill_rows else LARGEST[:2]


def step_bytes(compiled: Any) -> int:
    """Bytes on one device that a compiled program takes beside its arguments: temporaries, and results that take no
    argument's place."""
    found = compiled.memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def compile_step(
    lowered: jax.stages.Lowered,
    platform: str,
    plan: SchedulePlan | None,
    *,
    pin_starts: bool = False,
    options: Mapping[str, Option] | None = None,
) -> Any:
    """Compiles a lowered step, or an extra (plan None). `options` are added to, or replace, the project's own.

    The order that `IssueOrder` names binds kernels, while a collective's start may still slide by an op or two: XLA
    starts it when its own estimate says it must. `pin_starts` compiles a second time with a profile in which
    collectives are dear and kernels cheap, so that each starts exactly where the plan issues it.
    """
    chosen = {**compiler_options(platform, plan), **(options or {})}
    compiled = lowered.compile(compiler_options=chosen)
    if not pin_starts or PROFILE_OPTION in chosen:
        return compiled
    profile = _start_early_profile(compiled.as_text() or "")
    if not profile:
        return compiled
    with tempfile.TemporaryDirectory(prefix="nanoflow-profile-") as temporary:
        # In the compile cache, named by content: the path is part of the cache's key.
        folder = Path(jax.config.jax_compilation_cache_dir or temporary)  # pyright: ignore[reportAttributeAccessIssue]
        path = folder / f"profile-{hashlib.sha256(profile.encode()).hexdigest()[:16]}.pbtxt"
        path.write_text(profile)
        return lowered.compile(compiler_options={**chosen, PROFILE_OPTION: str(path)})


def _start_early_profile(hlo: str) -> str:
    """XLA's text profile (instruction name, microseconds): collectives 10 ms, kernels 1 us.

    Beside kernels on another stream, those count 120 us and the heavy kernels 60: less, and XLA starts them too late;
    as much as a collective, and it would rather make some collectives synchronous.
    """
    lines = []
    entry = hlo.rpartition("\nENTRY")[2].splitlines()
    heavy_us = 60 if any(" call-start(" in line for line in entry) else 1
    for line in entry:
        match = re.match(r"\s+(?:ROOT )?%(\S+) = (.*?)(?:metadata=|$)", line)
        if match is None:
            continue
        name, text = match.groups()
        if re.search(r"(all-gather|all-reduce|reduce-scatter|async)-start\(", text):
            lines.append(f'costs {{ name: "{name}" cost_us: 10000 }}')
        elif " get-tuple-element(" in text and LATENCY in text:  # a copy of what the kernel itself is said to take
            lines.append(f'costs {{ name: "{name}" cost_us: 0 }}')
        elif re.search(r" (fusion|custom-call|call-start)\(", text):
            heavy = heavy_us if re.search(r"cublas|mosaic|dynamic_slice_fusion", text) else 1
            us = 2 * heavy_us if " call-start(" in text else heavy
            lines.append(f'costs {{ name: "{name}" cost_us: {us} }}')
    return "\n".join(lines) + "\n" if any("10000" in line for line in lines) else ""
