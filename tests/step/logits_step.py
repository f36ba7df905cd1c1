"""The layers of a step alone, with the logits of every row, and batches for it that are filled by hand."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nanoflow_jax.models.layout import ModelParams
from nanoflow_jax.models.params import is_info
from nanoflow_jax.parallel import collectives
from nanoflow_jax.step.batch import StepBatch, StepShape
from nanoflow_jax.step.head import head_logits
from nanoflow_jax.step.slots import CACHE_SPECS, KVCache
from nanoflow_jax.step.trace import StepSpec, run_layers


def build_logits_step(spec: StepSpec, mesh: Mesh, infos: ModelParams) -> jax.stages.Wrapped:
    """A jitted `(params, cache, batch) -> (cache, logits [T, vocabulary] float32)`, cache donated."""

    def step(params: ModelParams, cache: KVCache, batch: StepBatch) -> tuple[KVCache, jax.Array]:
        cache, hidden = run_layers(spec, params, cache, batch)
        gathered = collectives.all_gather(head_logits(spec.config, params, hidden))  # [p, T, V/p]
        return cache, gathered.transpose(1, 0, 2).reshape(hidden.shape[0], -1)[:, : spec.config.vocab_size]

    specs = jax.tree.map(lambda info: info.spec, infos, is_leaf=is_info), CACHE_SPECS, P()
    sharded = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(CACHE_SPECS, P()), check_vma=False)
    return jax.jit(sharded, donate_argnums=(1,))


def empty_batch(shape: StepShape, num_pages: int) -> StepBatch:
    """A batch of padding only, as NumPy arrays to fill."""

    def zeros(*dims: int) -> np.ndarray:
        return np.zeros(dims, np.int32)

    rows, width = shape.rows, shape.table_width
    return StepBatch(
        token_ids=zeros(rows),
        positions=zeros(rows),
        write_pages=np.full(shape.tables * rows, num_pages, np.int32),
        write_slots=zeros(rows),
        decode_table=zeros(shape.decode_rows, width),
        decode_lengths=zeros(shape.decode_rows),
        prefill_table=zeros(shape.prefill_segments, width),
        prefill_starts=zeros(shape.prefill_segments + 1),
        prefill_lengths=zeros(shape.prefill_segments),
        sampled=np.concatenate([np.arange(shape.decode_rows, dtype=np.int32), zeros(shape.prefill_segments)]),
    )


def abstract_batch(shape: StepShape, num_pages: int, sharding: Any) -> StepBatch:
    """The same as abstract arrays, for compiling ahead of time."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), empty_batch(shape, num_pages)
    )
