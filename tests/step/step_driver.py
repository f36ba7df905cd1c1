"""Compiled steps in logits mode, and the packing of sequences into their batches, with random page tables.

Pages start as NaN, table entries past a sequence's end name any page, and those below a window one that is never
written, so reading what was not written shows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from nanoflow_jax.config import ModelConfig
from nanoflow_jax.models.fp8_formats import find_weight_scales
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.kv_scales import find_kv_scales
from nanoflow_jax.models.layout import ModelParams, page_tables
from nanoflow_jax.models.params import abstract_params
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.parallel.mesh import make_mesh, replicated
from nanoflow_jax.plan.plan import SchedulePlan
from nanoflow_jax.step.batch import StepBatch, StepShape
from nanoflow_jax.step.slots import CACHE_SPEC, KVCache, cache_shape
from nanoflow_jax.step.trace import StepSpec
from nanoflow_jax.weights.load import load_params, open_weights
from tests.reference.checkpoints import Reference
from tests.step.logits_step import abstract_batch, build_logits_step, empty_batch

PAGE_SIZE = 8
# LLVM's optimisations take half of a compilation and change no result beyond rounding.
FAST_COMPILE: dict[str, str | int | bool] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
# The same for XLA_FLAGS of other processes, beside those of all tests. Not for those that compile for a GPU: its code
# would be another.
FAST_FLAGS = " ".join(
    [os.environ["XLA_FLAGS"], *(f"--{name}={str(value).lower()}" for name, value in FAST_COMPILE.items())]
)

Chunk = tuple[int, int, int]  # sequence, first position, one past the last
RowOf = tuple[int, int, int]  # row of the step, sequence, position


@dataclass(frozen=True)
class Driver:
    """One compiled step of a checkpoint in `folder`, its weights on a mesh of `devices`."""

    folder: Path
    plan: SchedulePlan
    shape: StepShape
    devices: int = 1
    dtype: str = "float32"
    num_pages: int = 96
    enforce_order: bool = False
    kv_cache_dtype: str = "auto"
    quantization: str | None = None
    max_length: int | None = None  # tokens of a sequence; what its page table holds
    config_changes: tuple[tuple[str, Any], ...] = ()  # fields of the config replaced, to make broken twins

    def __post_init__(self) -> None:
        count = page_tables(self.config).count
        if self.shape.tables != count:
            object.__setattr__(self, "shape", replace(self.shape, tables=count))
            object.__setattr__(self, "num_pages", self.num_pages * count)

    def packer(self, sequences: Sequence[Sequence[int]], **more: Any) -> Packer:
        return Packer(sequences, self.shape, self.num_pages, windows=page_tables(self.config).windows, **more)

    @cached_property
    def config(self) -> ModelConfig:
        config = read_config(self.folder / "config.json").for_length(self.length)
        quantization = self.quantization or config.quantization
        return replace(config, dtype=self.dtype, quantization=quantization, **dict(self.config_changes))

    @property
    def length(self) -> int:
        """Tokens of a sequence, as the engine's `max_model_len`."""
        return self.max_length or self.shape.pages_per_request * PAGE_SIZE

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return make_mesh(self.config, self.devices)

    @cached_property
    def infos(self) -> ModelParams:
        plan, scales, table = self.plan, None, open_weights(self.folder).table
        if self.kv_cache_dtype != "auto":
            scales = find_kv_scales({name: tensor.shape for name, tensor in table.items()}, self.config)
        return param_infos(
            self.config, self.devices, plan.layouts(self.config, self.devices),
            dtype=self.dtype, kv_scales=scales, weight_scales=find_weight_scales(table, self.config),
        )  # fmt: skip

    @cached_property
    def params(self) -> ModelParams:
        return load_params(self.folder, self.config, self.mesh, self.infos)

    @cached_property
    def _abstract_cache(self) -> KVCache:
        shape = cache_shape(self.config, self.devices, self.num_pages, PAGE_SIZE)
        dtype = self.dtype if self.kv_cache_dtype == "auto" else "float8_e4m3fn"
        pages = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(self.mesh, CACHE_SPEC))
        return KVCache(pages, pages)

    @cached_property
    def step(self) -> Any:
        spec = StepSpec(
            self.config, self.plan, self.shape, kv_cache_dtype=self.kv_cache_dtype, enforce_order=self.enforce_order
        )
        batch = abstract_batch(self.shape, self.num_pages, replicated(self.mesh))
        step: Any = build_logits_step(spec, self.mesh, self.infos)  # jitted
        lowered = step.lower(abstract_params(self.infos, self.mesh), self._abstract_cache, batch)
        return lowered.compile(compiler_options=FAST_COMPILE)

    def new_cache(self, fill: float = float("nan")) -> KVCache:
        def pages(like: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.device_put(np.full(like.shape, fill, like.dtype), like.sharding)

        return jax.tree.map(pages, self._abstract_cache)

    def run(self, cache: KVCache, batch: StepBatch, params: ModelParams | None = None) -> tuple[KVCache, np.ndarray]:
        """The next cache, and logits [T, vocabulary]."""
        batch = jax.device_put(batch, replicated(self.mesh))
        cache, out = self.step(self.params if params is None else params, cache, batch)
        return cache, np.asarray(out)


class Packer:
    """Sequences of tokens with pages in random order, packed into the batches of a step."""

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        shape: StepShape,
        num_pages: int,
        *,
        room: int = 0,
        seed: int = 0,
        windows: Sequence[int | None] = (None,),
    ):
        """windows: of each page table."""
        self.tokens, self.shape, self.num_pages, self.windows = [list(s) for s in sequences], shape, num_pages, windows
        rng = np.random.default_rng(seed)
        order = rng.permutation(num_pages)
        self.never, order = order[0], order[1:]
        self.tables = rng.integers(0, num_pages, (len(self.tokens), shape.table_width)).astype(np.int32)
        for row, tokens in zip(self.tables, self.tokens, strict=True):
            count = -(-(len(tokens) + room) // PAGE_SIZE)
            for table in row.reshape(shape.tables, -1):
                assert count <= min(shape.pages_per_request, len(order)), "too few pages for these sequences"
                table[:count], order = order[:count], order[count:]

    def _table(self, sequence: int, position: int) -> np.ndarray:
        """As an engine may leave it to a row at `position` and later ones: what lies below the windows is gone."""
        row = self.tables[sequence].copy()
        for table, window in zip(row.reshape(self.shape.tables, -1), self.windows, strict=True):
            if window is not None:
                table[: max(position - window + 1, 0) // PAGE_SIZE] = self.never
        return row

    def pack(
        self, decode: Sequence[tuple[int, int] | None] = (), prefill: Sequence[Chunk] = ()
    ) -> tuple[StepBatch, list[RowOf]]:
        """Decode row i takes one token, (sequence, position), None leaves it empty; chunks follow each other.

        Returns the batch and the (row, sequence, position) of every row in use.
        """
        shape, batch = self.shape, empty_batch(self.shape, self.num_pages)
        assert len(decode) <= shape.decode_rows
        assert len(prefill) <= shape.prefill_segments
        rows: list[RowOf] = []
        for row, place in enumerate(decode):
            if place is not None:
                batch.decode_table[row] = self._table(*place)
                batch.decode_lengths[row] = place[1] + 1
                rows.append((row, *place))
        row = shape.decode_rows
        for segment, (sequence, start, stop) in enumerate(prefill):
            batch.prefill_table[segment] = self._table(sequence, start)
            batch.prefill_lengths[segment] = stop
            rows += [(row + i, sequence, start + i) for i in range(stop - start)]
            row += stop - start
            batch.prefill_starts[segment + 1 :] = row - shape.decode_rows
            batch.sampled[shape.decode_rows + segment] = row - 1
        assert row <= shape.rows
        for row, sequence, position in rows:
            batch.token_ids[row] = self.tokens[sequence][position]
            batch.positions[row] = position
            of_tables = self.tables[sequence].reshape(shape.tables, -1)[:, position // PAGE_SIZE]
            batch.write_pages.reshape(shape.tables, -1)[:, row] = of_tables
            batch.write_slots[row] = position % PAGE_SIZE
        return batch, rows


Steps = list[tuple[StepBatch, list[RowOf]]]


def logits_of(driver: Driver, steps: Steps, params: ModelParams | None = None) -> dict[tuple[int, int], np.ndarray]:
    """Runs the steps on empty pages: (sequence, position) -> logits."""
    cache, found = driver.new_cache(), {}
    for batch, rows in steps:
        cache, logits = driver.run(cache, batch, params)
        found |= {(sequence, position): logits[row] for row, sequence, position in rows}
    return found


def against_reference(
    found: dict[tuple[int, int], np.ndarray], reference: Reference, dtype: str, of: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(got, want), rows in order; sequence s is the prompt of[s] (s by default)."""
    places = sorted(found)
    prompt = range(len(reference.prompts)) if of is None else of
    want = np.stack([reference.logits[dtype][prompt[s]][position] for s, position in places])
    return np.stack([found[place] for place in places]), want
