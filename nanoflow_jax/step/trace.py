"""From a plan to one compiled step: embedding, layers of op pieces in the plan's order, head and sampling, under
`shard_map`.

Inside, shapes are local: n rows, H hidden, p devices, g KV groups and h query heads of this device, d head size, V/p
vocabulary rows. Layers are unrolled: a scan would copy each layer's weights and could not overlap collectives across
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.experimental.compute_on import compute_on
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas import add_rms_norm, append_kv, decode_attention, prefill_attention
from kernels_pallas.tuning import DEFAULT_GPU, tuned_gpu
from nanoflow_jax.config import ModelConfig
from nanoflow_jax.models import parts
from nanoflow_jax.models.layout import ModelParams, kv_groups, padded_vocab, page_tables
from nanoflow_jax.models.params import is_info
from nanoflow_jax.models.quantised import Input, Quantised, QuantisedRows, ScaledProduct, quantised_for
from nanoflow_jax.parallel import collectives
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.plan.ops import HIDDEN
from nanoflow_jax.plan.plan import OpPiece, SchedulePlan, row_quantum
from nanoflow_jax.step.attention import KernelBackends, page_dtype
from nanoflow_jax.step.batch import StepBatch, StepShape
from nanoflow_jax.step.expert_ops import ExpertOps
from nanoflow_jax.step.gemm_ops import GemmOps
from nanoflow_jax.step.head import first_token, head_logits
from nanoflow_jax.step.kernel_inputs import clip_segments, expected_context, kernel_inputs, pack_kqv, unpack_kqv
from nanoflow_jax.step.layer import (
    ATTENTION,
    GATHER,
    GATHER_HEADS,
    GATHER_NORMED,
    GATHER_ROWS,
    MLP,
    REDUCE,
    SCATTER,
    StepProgram,
    Update,
)
from nanoflow_jax.step.norms import add_normed, norm_queries_and_keys, whole_rows
from nanoflow_jax.step.order import IssueOrder
from nanoflow_jax.step.rows import RowSpan
from nanoflow_jax.step.sampler import likeliest
from nanoflow_jax.step.slots import CACHE_SPECS, SLOT_SPECS, KVCache, StepState, resolve, unpack

# Traced once per shape and lowered once per module, instead of once per call: lowering a Mosaic kernel takes half a
# second, and 80 layers have hundreds of calls. Inlined, so that each call keeps its own op_name.
_STATIC = ("backend", "tuning", "expected_context", "window")
_decode_attention = jax.jit(decode_attention, static_argnames=(*_STATIC, "scale", "sm_budget"), inline=True)
_prefill_attention = jax.jit(prefill_attention, static_argnames=(*_STATIC, "scale"), inline=True)
_append_kv = jax.jit(append_kv, static_argnames=_STATIC[:2], inline=True)
_add_rms_norm = jax.jit(add_rms_norm, static_argnames=(*_STATIC[:2], "eps", "quantise", "bound"), inline=True)


@dataclass(frozen=True)
class StepSpec:
    """Everything that a compiled step depends on, besides the arrays."""

    config: ModelConfig
    plan: SchedulePlan
    shape: StepShape
    attention_backend: str = "xla"  # of decode and prefill attention, and KV append, where they have it
    kv_cache_dtype: str = "auto"  # of the pages: `step.attention.KV_CACHE_DTYPES`
    enforce_order: bool = False
    deterministic: bool = False  # sums over devices in a fixed order, wherever a row stands in the step
    rank_of: int | None = None  # the first rank's program of so many devices, on a mesh of one (collectives.rank_slice)
    gpu: str = DEFAULT_GPU  # whose tuning the kernels take; `build_step` puts the mesh's
    expected_context: int | None = None  # tokens of a row, for the kernels' expected times; None: the pool's share

    def __post_init__(self) -> None:
        self.plan.check_gathers(self.config.quantization)

    @property
    def page_dtype(self) -> Any:
        return page_dtype(self.config, self.kv_cache_dtype)


@struct.dataclass
class StepEnd:
    """What a step gives: its tokens, and what the programs of `step.extras` go on from. B sampled rows, P prefill rows,
    V vocabulary padded to the mesh."""

    tokens: Any  # [B] int32: the likeliest; -1: none can be chosen
    logits: Any  # [B, V] float32, split over V
    hidden: Any  # [P, H]: of the prefill rows, after the last layer


END_SPECS = StepEnd(tokens=P(), logits=P(None, AXIS), hidden=P())


def build_step(spec: StepSpec, mesh: Mesh, infos: ModelParams, page_size: int) -> jax.stages.Wrapped:
    """The engine's step as a jitted function `(leaves, state, packed) -> (state, end)`, state donated.

    leaves  those of ModelParams, as a tuple: a call takes hundreds of arrays, and walks a tree at ten times the cost
    packed  int32 vector, a packed `StepInputs` of `spec.shape`
    end     a `StepEnd`

    It has no conditional: where one stands outside of a command buffer, the host waits for its predicate.
    """
    state_specs = StepState(CACHE_SPECS, SLOT_SPECS)
    spec = replace(spec, gpu=tuned_gpu(mesh.devices.flat[0].device_kind))
    declared, tree = jax.tree.flatten(infos, is_leaf=is_info)

    def step(leaves: tuple[jax.Array, ...], state: StepState, packed: jax.Array) -> tuple[StepState, StepEnd]:
        with collectives.rank_slice(spec.rank_of):
            return _step(spec, page_size, jax.tree.unflatten(tree, leaves), state, packed)

    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(tuple(info.spec for info in declared), state_specs, P()),
        out_specs=(state_specs, END_SPECS),
        check_vma=False,
    )
    return jax.jit(sharded, donate_argnums=(1,))


def _step(
    spec: StepSpec, page_size: int, params: ModelParams, state: StepState, packed: jax.Array
) -> tuple[StepState, StepEnd]:
    shape = spec.shape
    _check_local(spec.config, params, state.cache, page_size)
    inputs = unpack(packed, shape)
    batch, slots = resolve(inputs, state.slots, shape, page_size)
    cache, hidden = run_layers(spec, params, state.cache, batch)
    with jax.named_scope("HEAD.1"):
        logits = head_logits(spec.config, params, hidden[batch.sampled])
    with jax.named_scope("SAMPLE.1"):
        tokens = likeliest(logits, first_token(logits))
        slots = replace(slots, tokens=slots.tokens.at[inputs.slots].set(tokens, mode="drop"))
    with jax.named_scope("SCORE.1"):
        end = StepEnd(tokens, logits, hidden[shape.decode_rows :])
    return StepState(cache, slots), end


def _check_local(config: ModelConfig, params: ModelParams, cache: KVCache, page_size: int) -> None:
    """Raises AssertionError where the arrays inside `shard_map` are not a device's shards."""
    devices, hidden = collectives.device_count(), config.hidden_size
    vocab, groups = padded_vocab(config, devices) // devices, kv_groups(config, devices) // devices
    chex.assert_shape([params.embedding, *([params.head] if params.head is not None else [])], (vocab, hidden))
    chex.assert_shape(params.final_norm, (hidden,))
    chex.assert_shape([cache.k, cache.v], (None, groups, page_size, config.head_dim))
    chex.assert_is_divisible(cache.k.shape[0], page_tables(config).depth)
    chex.assert_equal(len(params.layers), config.num_layers)


def run_layers(spec: StepSpec, params: ModelParams, cache: KVCache, batch: StepBatch) -> tuple[KVCache, jax.Array]:
    """The cache with this step's keys and values, and the residual [T, H] after the last layer."""
    machine = Tracer(spec, params, cache, batch)
    parts = StepProgram(machine, machine.pieces, spec.config.num_layers, machine.devices).run()
    return KVCache(machine.k_pages, machine.v_pages), parts[0] if len(parts) == 1 else jnp.concatenate(parts)


class Tracer(GemmOps, ExpertOps):
    """Runs the layer program on arrays, under `shard_map`: a `step.layer.Machine`."""

    appends_at_once = False

    def __init__(self, spec: StepSpec, params: ModelParams, cache: KVCache, batch: StepBatch):
        self.config, self.shape, self.fp8_gathers = spec.config, spec.shape, spec.plan.gathers == "fp8"
        self.params, self.batch = params, batch
        self.k_pages, self.v_pages = cache.k, cache.v
        self.tables = page_tables(spec.config)
        self.num_pages = cache.k.shape[0] // self.tables.depth  # of one layer
        self.devices = collectives.device_count()
        self.expert_parallel = spec.plan.layouts(spec.config, self.devices).expert_parallel
        backends = KernelBackends.of(
            spec.attention_backend, cache.k.dtype, spec.config, self.devices, self.expert_parallel
        )
        self.options = backends.options(
            spec.gpu, spec.expected_context or expected_context(spec.shape, self.num_pages, cache.k.shape[2])
        )
        # Only the Mosaic kernel has a lane: XLA's loop cannot leave SMs free, and a CPU has no streams.
        self.decode_lane = spec.plan.lanes.get("GEMV") if self.options.decode["backend"] == "mosaic" else None
        self.lane = self.decode_lane is not None
        self.pieces = spec.plan.pieces(
            spec.shape.decode_rows, spec.shape.prefill_rows, row_quantum(self.devices),
            experts=spec.config.experts is not None,
        )  # fmt: skip
        self.inputs = [
            kernel_inputs(self.pieces, batch, spec.shape, table, self.num_pages) for table in range(self.tables.count)
        ]
        self.order = IssueOrder(spec.enforce_order)
        self.collectives: dict[str, Callable[[Any], Any]] = {
            GATHER: collectives.all_gather,  # [n, H/p] -> [p, n, H/p]
            GATHER_HEADS: _gather_heads,
            GATHER_NORMED: partial(jax.tree.map, collectives.all_gather_rows),
            GATHER_ROWS: collectives.all_gather_rows,
            REDUCE: collectives.all_reduce_in_order if spec.deterministic else collectives.all_reduce,
            SCATTER: collectives.reduce_scatter_rows,
        }
        ropes = dict.fromkeys(layer.attention.rope for layer in self.config.pattern)
        self.rope_tables = {rope: parts.rope_tables(rope, self.config.head_dim, batch.positions) for rope in ropes}
        kinds = dict.fromkeys(layer.attention for layer in self.config.pattern)
        self.query_tables = {
            kind: parts.query_tables(kind, *self.rope_tables[kind.rope], batch.positions) for kind in kinds
        }

    def scope(self, layer: int | None, op: str, number: int) -> AbstractContextManager[Any]:
        return jax.named_scope(f"{op}.{number}" if layer is None else f"L{layer}/{op}.{number}")

    def begin(self, layer: int) -> None:
        self.index, self.layer = layer, self.params.layers[layer]
        self.attention, self.mlp = self.config.layers[layer].attention, self.config.layers[layer].mlp
        self.first_page = jnp.int32(self.tables.place[layer] * self.num_pages)  # where the layer's pages begin
        self.kernel_inputs = self.inputs[self.tables.table[layer]]
        scales = self.params.kv_scales  # of fp8 pages, [g] float32
        self.scales = {} if scales is None else {"k_scale": scales[0, layer], "v_scale": scales[1, layer]}

    # -- ends of a step

    def embed(self, piece: OpPiece) -> jax.Array:
        """Each device looks up the tokens of its vocabulary rows; the sum over devices is the embedding."""
        table = self.params.embedding
        local = self.batch.token_ids[piece.start : piece.stop] - collectives.device_index() * table.shape[0]
        mine = (local >= 0) & (local < table.shape[0])
        x = jnp.where(mine[:, None], table[jnp.where(mine, local, 0)], jnp.zeros((), table.dtype))
        return parts.scaled(x, self.config.embedding_factor)

    def shard(self, piece: OpPiece, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        share = piece.rows // self.devices
        mine = lax.dynamic_slice_in_dim(x, collectives.device_index() * share, share)
        if self.config.norms == "after":
            return mine, x
        return mine, parts.rms_norm(x, self._norm_weight(0, ATTENTION), self.config.rms_norm_eps)

    def gather_last(self, rows: int, x: jax.Array) -> jax.Array:
        return self.start(GATHER_ROWS, rows, HIDDEN, x)

    # -- residual and norm

    def _norm_weight(self, layer: int, which: int, after: bool = False) -> jax.Array:
        """[H], of the norm of attention or of the MLP. A static slice, which the norm's kernel reads in place."""
        norms, at = self.params.norms, which
        if self.config.norms == "both":
            at = 2 * which + after
        return lax.slice(norms, (layer, at, 0), (layer + 1, at + 1, norms.shape[2])).reshape(-1)

    def add_and_norm(
        self, layer: int, which: int, rows: int, x: jax.Array, update: Update[jax.Array] | None, gathered: bool
    ) -> tuple[jax.Array, Any]:
        """In one ordered op."""
        params, weight, eps = self.params.layers[layer], self._norm_weight(layer, which), self.config.rms_norm_eps
        reader = params.kqv if which == ATTENTION else params.ug
        quantise = isinstance(reader, Quantised) and (self.fp8_gathers or not gathered)  # else who reads it does
        block = (layer, ATTENTION) if which == MLP else (layer - 1, MLP)  # which the update is of

        def both(x: jax.Array, *update: Any) -> tuple[jax.Array, Input]:
            if update and self.config.norms == "before":
                more: dict[str, Any] = {"quantise": True, "bound": reader.bound} if quantise else {}
                added, bias = update
                if isinstance(added, ScaledProduct):
                    more["scales"], added = (added.token, added.channel), added.values
                x, normed = _add_rms_norm(x, added, weight, bias=bias, eps=eps, **more, **self.options.norm)
                return x, QuantisedRows(normed[0], normed[1], x.dtype) if quantise else normed
            x = self._add_normed(block)(x, *update) if update else x
            normed = x if self.config.norms == "after" else parts.rms_norm(x, weight, eps)
            return x, quantised_for(normed, reader) if quantise else normed

        return self.order.run(both, x, *(update or ()))

    def add(self, rows: int, x: jax.Array, update: Update[jax.Array]) -> jax.Array:
        last = (self.config.num_layers - 1, MLP)
        return self.order.run(_add if self.config.norms == "before" else self._add_normed(last), x, *update)

    def _add_normed(self, block: tuple[int, int]) -> Callable[..., jax.Array]:
        """Of a block whose results are normed, what adds one to the residual."""
        return partial(add_normed, weight=self._norm_weight(*block, after=True), eps=self.config.rms_norm_eps)

    def bias(self, op: str) -> jax.Array | None:
        bias = {"O": self.layer.o_bias, "D": self.layer.down_bias}[op]
        return None if bias is None else self._scaled(bias)

    # -- attention

    def kqv(self, piece: OpPiece, span: RowSpan, normed: Sequence[jax.Array]) -> jax.Array:
        rows, layer = slice(piece.start, piece.stop), self.layer

        def project(*inputs: jax.Array) -> jax.Array:
            fused = parts.fused_kqv(self.ready(span, layer.kqv, *inputs), layer)
            if self.attention.qk_norm:
                weights = lax.index_in_dim(self.params.qk_norms, self.index, keepdims=False)
                q, k, v = norm_queries_and_keys(fused, weights, self.config, self.devices, self.collectives[REDUCE])
            else:
                q, k, v = parts.split_kqv(fused)
            q = parts.apply_rope(q, *(table[rows] for table in self.query_tables[self.attention]))
            k = parts.apply_rope(k, *(table[rows] for table in self.rope_tables[self.attention.rope]))
            return pack_kqv(q.reshape(piece.rows, -1, self.config.head_dim), k, v)

        return self.order.run(project, *normed)

    def queries(self, kqv: jax.Array) -> jax.Array:
        return self._unpacked(kqv)[0]

    def _unpacked(self, kqv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        groups, rows_of_group, d, _ = self.layer.kqv.shape
        return unpack_kqv(kqv, groups=groups, heads=groups * (rows_of_group - 2), d=d)

    def append(self, piece: OpPiece, kqv: jax.Array) -> None:
        def append(k_pages: jax.Array, v_pages: jax.Array, kqv: jax.Array) -> tuple[jax.Array, jax.Array]:
            return _append_kv(
                k_pages, v_pages, *self._unpacked(kqv)[1:], *self.kernel_inputs.writes[piece.piece],
                first_page=self.first_page, **self.scales, **self.options.append,
            )  # fmt: skip

        self.k_pages, self.v_pages = self.order.run(append, self.k_pages, self.v_pages, kqv)

    def _sinks(self) -> dict[str, jax.Array]:
        return {} if self.layer.sinks is None else {"sinks": self.layer.sinks.reshape(-1)}

    def decode_attention(self, piece: OpPiece, span: RowSpan, q: Sequence[jax.Array]) -> jax.Array:
        lane = self.decode_lane
        sms = lane.sms if lane else None

        def attend(more: dict[str, jax.Array], k_pages: jax.Array, v_pages: jax.Array, *q: jax.Array) -> jax.Array:
            out, _ = _decode_attention(
                span(*q), k_pages, v_pages, **more, scale=self.attention.scale, window=self.attention.window,
                sm_budget=sms, **self.options.decode,
            )  # fmt: skip
            return out.reshape(piece.rows, -1)

        table, lengths = self.kernel_inputs.contexts[piece.piece]
        more = {"page_table": table, "lengths": lengths, "first_page": self.first_page, **self.scales}
        more |= self._sinks()
        if lane is None:  # what no layer changes is no input: XLA's attention computes with it, once for all layers
            return self.order.run(partial(attend, more), self.k_pages, self.v_pages, *q)
        # Issued like a collective: what reads the result joins the streams. All that it reads is an input: a constant
        # that is not could be as late as what needs the result, and with it a start on another stream.
        beside = compute_on(attend, compute_type=f"gpu_stream:{lane.stream}", out_memory_spaces=jax.memory.Space.Device)
        return self.order.beside(beside, more, self.k_pages, self.v_pages, *q)

    def prefill_attention(self, piece: OpPiece, span: RowSpan, q: Sequence[jax.Array]) -> jax.Array:
        first = self.shape.decode_rows

        def attend(k_pages: jax.Array, v_pages: jax.Array, *q: jax.Array) -> jax.Array:
            batch = self.batch
            starts, lengths = clip_segments(
                batch.prefill_starts, batch.prefill_lengths, piece.start - first, piece.stop - first
            )
            out = _prefill_attention(
                span(*q), k_pages, v_pages, self.kernel_inputs.prefill_table, starts, lengths,
                first_page=self.first_page, scale=self.attention.scale, window=self.attention.window, **self.scales,
                **self._sinks(), **self.options.prefill,
            )  # fmt: skip
            return out.reshape(piece.rows, -1)

        return self.order.run(attend, self.k_pages, self.v_pages, *q)

    # -- collectives and streams

    def start(self, collective: str, rows: int, columns: str, x: Any) -> Any:
        if isinstance(x, ScaledProduct):  # of one device
            return x
        return self.order.start(self.collectives[collective], x)

    def wait(self, x: jax.Array) -> jax.Array:
        return self.order.wait(x)


def _gather_heads(x: Any) -> Any:
    """[w/p, n] -> [w, n]; of fp8 [n, w/p] -> [p, n, w/p], and the scales [n] -> [p, n]."""
    if isinstance(x, QuantisedRows):
        return jax.tree.map(collectives.all_gather, x)
    return collectives.all_gather_rows(x)


def _add(x: jax.Array, update: Any, bias: jax.Array | None) -> jax.Array:
    """Residual [n, H] + update [n, H], or gathered columns [p, n, H/p], + bias [H]."""
    update = update.array() if isinstance(update, ScaledProduct) else whole_rows(update)
    return x + update if bias is None else x + update + bias[None, :]
