"""The runner: weights, pages and compiled steps on the devices."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from nanoflow_jax.config import ModelConfig
from nanoflow_jax.models.llama import LlamaParams
from nanoflow_jax.models.params import abstract_params
from nanoflow_jax.parallel.mesh import replicated
from nanoflow_jax.progress import Progress
from nanoflow_jax.schedule.batch import StepBatch, StepShape, abstract_batch
from nanoflow_jax.schedule.compile import compiler_options
from nanoflow_jax.schedule.plan import SchedulePlan
from nanoflow_jax.schedule.step import CACHE_SPEC, KVCache, StepSpec, build_step, cache_shape

COMPILE_THREADS = 4  # XLA compiles without the interpreter's lock


class Runner:
    """Runs steps of a few shapes, all compiled before the first one runs."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        infos: LlamaParams,
        params: LlamaParams,
        plan: SchedulePlan,
        shapes: Sequence[StepShape],
        *,
        num_pages: int,
        page_size: int,
        attention_backend: str,
        progress: bool,
    ):
        self.mesh, self.params, self.num_pages = mesh, params, num_pages
        self._replicated = replicated(mesh)
        platform = mesh.devices.flat[0].platform
        options = compiler_options(platform)
        sharding = NamedSharding(mesh, CACHE_SPEC)
        dtype = jax.tree.leaves(params)[0].dtype
        pages = jax.ShapeDtypeStruct(cache_shape(config, mesh.size, num_pages, page_size), dtype, sharding=sharding)
        abstract_cache = KVCache((pages,) * config.num_layers, (pages,) * config.num_layers)
        abstract = abstract_params(infos, mesh)

        def compile_step(shape: StepShape) -> Any:
            spec = StepSpec(config, plan, shape, attention_backend, enforce_order=platform == "gpu" and mesh.size > 1)
            step = build_step(spec, mesh, infos)
            lowered = step.lower(abstract, abstract_cache, abstract_batch(shape, num_pages, self._replicated))
            return lowered.compile(compiler_options=options)

        self._steps: dict[StepShape, Any] = {}
        with Progress(len(shapes), "compiling steps", "shapes", progress) as bar, ThreadPoolExecutor(COMPILE_THREADS) as pool:
            for shape, compiled in zip(shapes, pool.map(compile_step, shapes), strict=True):
                self._steps[shape] = compiled
                bar.advance(note=f"{shape.decode_rows} decode + {shape.prefill_rows} prefill rows")
        zeros = jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract_cache), out_shardings=sharding)
        self.cache = zeros()

    def run(self, shape: StepShape, batch: StepBatch) -> np.ndarray:
        """Runs one step and waits for it. Returns the sampled tokens, int32 [shape.sampled_rows]."""
        self.cache, tokens = self._steps[shape](self.params, self.cache, jax.device_put(batch, self._replicated))
        return np.asarray(tokens)
