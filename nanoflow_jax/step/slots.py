"""What stays on the device between steps, pages and slots, and what the host sends for each step.

A running request owns a slot. Its latest token and its page table live there, so that the next step can be built and
dispatched before the host has seen this one's tokens, and so that tables do not travel every step. All that a step
needs from the host is packed into one int32 vector: one transfer. In it each array that the layers read starts at a
multiple of ALIGNMENT: XLA hands a slice to a Mosaic kernel as an address inside the vector, and the kernel refuses one
that is no multiple of 256 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanoflow_jax.config import ModelConfig
from nanoflow_jax.models.layout import kv_groups, padded_vocab, page_tables
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.step.batch import SamplingArrays, StepBatch, StepShape

SETTINGS = len(fields(SamplingArrays))
ALIGNMENT = 64  # int32 elements, 256 bytes
BIAS_ROWS = 64  # different bias vectors (logit_bias, allowed_token_ids, min_tokens) in use at once


@struct.dataclass
class KVCache:
    """Pages of all layers, `[depth * num_pages, KV groups, page_size, d]`, split over the groups; a layer's begin at
    its place times num_pages (`models.layout.PageTables`: with layers of one kind, `depth` is their number and the
    place theirs). Donated to each step. Pages of fp8 hold K and V over `ModelParams.kv_scales`.

    One array, not one per layer: the host's work at a step's start grows with its arguments, times the devices.
    """

    k: Any
    v: Any


CACHE_SPEC = P(None, AXIS)
CACHE_SPECS = KVCache(CACHE_SPEC, CACHE_SPEC)


def cache_shape(config: ModelConfig, devices: int, num_pages: int, page_size: int) -> tuple[int, int, int, int]:
    """Global shape of the K (or V) pages."""
    return page_tables(config).depth * num_pages, kv_groups(config, devices), page_size, config.head_dim


@dataclass(frozen=True)
class SlotSizes:
    """slots: requests that may run at once; bias_rows: different bias vectors in use at once; table_width: entries of
    a request's page tables."""

    slots: int
    bias_rows: int
    table_width: int


@struct.dataclass
class SlotState:
    """S slots, M entries of a request's page tables, V vocabulary padded to the mesh, K bias rows. Donated to each
    step."""

    tokens: Any  # [S] int32: the latest token of the slot's request
    tables: Any  # [S, M] int32: its pages
    counts: Any  # [S, V] uint16, split over V: times a token was generated, at most 2**15 - 1; + 2**15 if in the prompt
    biases: Any  # [K, V] float32, split over V: added to the logits


SLOT_SPECS = SlotState(tokens=P(), tables=P(), counts=P(None, AXIS), biases=P(None, AXIS))


@struct.dataclass
class StepState:
    """All that a step takes over from the one before; donated to each step."""

    cache: KVCache
    slots: SlotState


def abstract_slots(config: ModelConfig, mesh: Mesh | AbstractMesh, sizes: SlotSizes) -> SlotState:
    """The slots' state as abstract arrays on `mesh`."""
    vocab = padded_vocab(config, mesh.size)
    shapes = SlotState(
        tokens=((sizes.slots,), jnp.int32),
        tables=((sizes.slots, sizes.table_width), jnp.int32),
        counts=((sizes.slots, vocab), jnp.uint16),
        biases=((sizes.bias_rows, vocab), jnp.float32),
    )
    return jax.tree.map(
        lambda shape, spec: jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, spec)),
        shapes,
        SLOT_SPECS,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@struct.dataclass
class StepInputs:
    """What the host sends for one step. T rows, D decode rows, P prefill rows, S segments, B = D + S sampled rows, K
    page tables, M entries of all of a request's."""

    token_ids: Any  # [T] int32; negative in a decode row: the slot's latest token
    positions: Any  # [T] int32
    write_pages: Any  # [K * T] int32, table by table; the number of pages marks a padding row
    slots: Any  # [B] int32: of each decode row, then of each segment; the number of slots marks an empty one
    prefill_table: Any  # [S, M] int32: becomes the slot's table
    prefill_starts: Any  # [S + 1] int32, counted from the first prefill row
    targets: Any  # [P] int32: the token whose logprob, after this prefill row, is wanted; -1: none
    target_logprobs: Any  # [1] int32: how many likeliest tokens to report beside the targets
    sampling: SamplingArrays


def empty_inputs(shape: StepShape, num_pages: int, num_slots: int, num_biases: int) -> StepInputs:
    """Inputs of padding only for the host to fill: NumPy arrays, all views of the one vector that `pack` returns."""
    vector = _padding(shape, num_pages, num_slots, num_biases).copy()
    typed = {"i": vector, "f": vector.view(np.float32), "u": vector.view(np.uint32)}  # once, not for each leaf
    layout = _layout(shape)
    views = [typed[p.dtype.kind][p.start : p.start + p.size].reshape(p.dims) for p in layout.places]
    return jax.tree.unflatten(layout.tree, views)


def neutral_settings(count: int, num_slots: int, num_biases: int) -> np.ndarray:
    """[SETTINGS, count] int32: the settings of rows that sample nothing, as those of padding."""
    column = [
        x.view(np.int32)
        for x in jax.tree.leaves(_padding_inputs(StepShape(1, 0, 0, 1), 0, num_slots, num_biases).sampling)
    ]
    return np.tile(np.array(column), (1, count))


def sampling_views(settings: np.ndarray) -> SamplingArrays:
    """settings [SETTINGS, n] int32, bit for bit, as arrays [n] of their own types: views."""
    leaves, tree = jax.tree.flatten(_padding_inputs(StepShape(1, 0, 0, 1), 0, 0, 0).sampling)
    return jax.tree.unflatten(tree, [row.view(leaf.dtype) for row, leaf in zip(settings, leaves, strict=True)])


def sampling_settings(inputs: StepInputs) -> np.ndarray:
    """The inverse for inputs that `empty_inputs` made: [SETTINGS, B] int32, a view. They are the vector's last part."""
    rows = inputs.slots.size
    return inputs.token_ids.base[-SETTINGS * rows :].reshape(SETTINGS, rows)


def pack(inputs: StepInputs) -> np.ndarray:
    """One int32 vector of all leaves, bit for bit."""
    leaves = jax.tree.leaves(inputs)
    vector = leaves[0].base
    if vector is not None and all(x.base is vector for x in leaves):
        return vector
    rows = inputs.slots.size
    segments, width = inputs.prefill_table.shape
    tables = inputs.write_pages.size // inputs.token_ids.size
    return _packed(inputs, StepShape(rows - segments, inputs.targets.size, segments, width // tables, tables))


def _packed(inputs: StepInputs, shape: StepShape) -> np.ndarray:
    layout = _layout(shape)
    vector = np.zeros(layout.length, np.int32)
    for place, x in zip(layout.places, jax.tree.leaves(inputs), strict=True):
        vector[place.start : place.start + place.size] = x.reshape(-1).view(np.int32)
    return vector


@lru_cache(maxsize=64)
def _padding(shape: StepShape, num_pages: int, num_slots: int, num_biases: int) -> np.ndarray:
    return _packed(_padding_inputs(shape, num_pages, num_slots, num_biases), shape)


class _Place(NamedTuple):
    """Of one leaf in the packed vector; start and size in elements."""

    start: int
    size: int
    dims: tuple[int, ...]
    dtype: np.dtype


class _Layout(NamedTuple):
    places: list[_Place]  # of the leaves of StepInputs, in order
    tree: Any
    length: int


@lru_cache(maxsize=64)
def _layout(shape: StepShape) -> _Layout:
    """The settings of sampling, which no kernel reads, follow each other without a gap: the host fills them as one."""
    padding = _padding_inputs(shape, 0, 0, 0)
    leaves, tree = jax.tree.flatten(padding)
    places, at = [], 0
    for number, x in enumerate(leaves):
        if number <= len(leaves) - SETTINGS:
            at = -(-at // ALIGNMENT) * ALIGNMENT
        places.append(_Place(at, x.size, x.shape, x.dtype))
        at += x.size
    return _Layout(places, tree, at)


def packed_length(shape: StepShape) -> int:
    return _layout(shape).length


def _padding_inputs(shape: StepShape, num_pages: int, num_slots: int, num_biases: int) -> StepInputs:
    rows, count = shape.rows, shape.sampled_rows

    def full(*dims: int, fill: Any = 0, dtype: Any = np.int32) -> np.ndarray:
        return np.full(dims, fill, dtype)

    return StepInputs(
        token_ids=full(rows),
        positions=full(rows),
        write_pages=full(shape.tables * rows, fill=num_pages),
        slots=full(count, fill=num_slots),
        prefill_table=full(shape.prefill_segments, shape.table_width),
        prefill_starts=full(shape.prefill_segments + 1),
        targets=full(shape.prefill_rows, fill=-1),
        target_logprobs=full(1),
        sampling=SamplingArrays(
            temperature=full(count, dtype=np.float32),
            top_p=full(count, fill=1, dtype=np.float32),
            top_k=full(count),
            min_p=full(count, dtype=np.float32),
            seed=full(count, dtype=np.uint32),
            position=full(count),
            presence_penalty=full(count, dtype=np.float32),
            frequency_penalty=full(count, dtype=np.float32),
            repetition_penalty=full(count, fill=1, dtype=np.float32),
            history=full(count, fill=num_slots),
            bias=full(count, fill=num_biases),
            top_logprobs=full(count, fill=-1),
        ),
    )


def unpack(packed: jax.Array, shape: StepShape) -> StepInputs:
    """The inverse of `pack`, on the device."""
    layout = _layout(shape)
    parts = []
    for at, size, dims, dtype in layout.places:
        part = packed[at : at + size].reshape(dims) if size else jnp.zeros(dims, jnp.int32)
        parts.append(part if dtype == np.int32 else lax.bitcast_convert_type(part, dtype))
    return jax.tree.unflatten(layout.tree, parts)


def resolve(inputs: StepInputs, state: SlotState, shape: StepShape, page_size: int) -> tuple[StepBatch, SlotState]:
    """What the layers read, and the slots with this step's pages in their tables.

    A decode row that starts a page names it in `write_pages`; the table learns it here. (Written again by the rows
    that follow, which changes nothing.)
    """
    decode, segments = shape.decode_rows, shape.prefill_segments
    slots, positions = inputs.slots, inputs.positions
    count = state.tokens.shape[0]
    tables = state.tables
    tokens = inputs.token_ids
    for table in range(shape.tables):
        place = positions[:decode] // page_size + table * shape.pages_per_request
        first = table * shape.rows
        starts = inputs.write_pages[first : first + decode]
        tables = tables.at[slots[:decode], place].set(starts, mode="drop")
    if segments:
        tables = tables.at[slots[decode:]].set(inputs.prefill_table, mode="drop")
    if decode:
        latest = state.tokens.at[slots[:decode]].get(mode="fill", fill_value=0)
        # Not an update of a slice: of the whole vector, it makes XLA die (0.11.2, CPU, several devices).
        tokens = jnp.concatenate([jnp.where(tokens[:decode] < 0, latest, tokens[:decode]), tokens[decode:]])
    sampled, lengths = jnp.arange(decode, dtype=jnp.int32), jnp.zeros(0, jnp.int32)
    if segments:
        starts = inputs.prefill_starts
        last = jnp.maximum(decode + starts[1:] - 1, 0)  # row of each segment; any, for an empty one
        lengths = jnp.where(starts[1:] > starts[:-1], positions[last] + 1, 0)
        sampled = jnp.concatenate([sampled, last])
    batch = StepBatch(
        token_ids=tokens,
        positions=positions,
        write_pages=inputs.write_pages,
        write_slots=positions % page_size,
        decode_table=tables.at[slots[:decode]].get(mode="fill", fill_value=0),
        decode_lengths=jnp.where(slots[:decode] < count, positions[:decode] + 1, 0),
        prefill_table=inputs.prefill_table,
        prefill_starts=inputs.prefill_starts,
        prefill_lengths=lengths,
        sampled=sampled,
    )
    return batch, replace(state, tables=tables)
