"""The runner: weights, pages and compiled steps on the devices."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanoflow_jax.config import ModelConfig
from nanoflow_jax.models.llama import LlamaParams
from nanoflow_jax.parallel.mesh import replicated
from nanoflow_jax.progress import Progress
from nanoflow_jax.schedule.batch import StepBatch, StepShape
from nanoflow_jax.schedule.compile import abstract_cache, compile_step, lower_step
from nanoflow_jax.schedule.plan import SchedulePlan
from nanoflow_jax.schedule.step import StepSpec

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
        ordered = platform == "gpu" and mesh.size > 1

        def compile_for(shape: StepShape) -> Any:
            spec = StepSpec(config, plan, shape, attention_backend, enforce_order=ordered)
            lowered = lower_step(spec, mesh, infos, num_pages=num_pages, page_size=page_size)
            return compile_step(lowered, platform, plan, pin_starts=ordered)

        self._steps: dict[StepShape, Any] = {}
        with (
            Progress(len(shapes), "compiling steps", "shapes", progress) as bar,
            ThreadPoolExecutor(COMPILE_THREADS) as pool,
        ):
            for shape, compiled in zip(shapes, pool.map(compile_for, shapes), strict=True):
                self._steps[shape] = compiled
                bar.advance(note=f"{shape.decode_rows} decode + {shape.prefill_rows} prefill rows")
        dtype = jax.tree.leaves(params)[0].dtype
        abstract = abstract_cache(config, mesh, dtype, num_pages, page_size)
        self._zeros = jax.jit(
            lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract),
            out_shardings=jax.tree.map(lambda a: a.sharding, abstract),
        )
        self.cache = self._zeros()

    def run(self, shape: StepShape, batch: StepBatch) -> np.ndarray:
        """Runs one step and waits for it. Returns the sampled tokens, int32 [shape.sampled_rows]."""
        if jax.tree.leaves(self.cache)[0].is_deleted():  # a step that was interrupted took the pages with it
            self.cache = self._zeros()
        self.cache, tokens = self._steps[shape](self.params, self.cache, jax.device_put(batch, self._replicated))
        return np.asarray(tokens)
