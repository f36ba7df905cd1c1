"""From a plan to one compiled step: embedding, layers of op pieces in the plan's order, head and sampling, under
`shard_map`.

Inside, shapes are local: n rows, H hidden, p devices, g KV groups and h query heads of this device, d head size, V/p
vocabulary rows. Layers are unrolled: a scan would copy each layer's weights and could not overlap collectives across
layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.experimental.compute_on import compute_on
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas import add_rms_norm, append_kv, decode_attention, prefill_attention
from kernels_pallas.tuning import DEFAULT_GPU, tuned_gpu
from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.engine.logprobs import score_rows
from nanoflow_jax.engine.sampler import StepOutput, sample
from nanoflow_jax.models import llama
from nanoflow_jax.models.llama import LayerParams, LlamaParams
from nanoflow_jax.models.params import is_info, param_specs
from nanoflow_jax.parallel import collectives
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.schedule.attention import KernelBackends, page_dtype
from nanoflow_jax.schedule.batch import StepBatch, StepShape
from nanoflow_jax.schedule.order import IssueOrder
from nanoflow_jax.schedule.plan import OpPiece, SchedulePlan, deferred_gathers, row_quantum
from nanoflow_jax.schedule.rows import Rows
from nanoflow_jax.schedule.slots import SLOT_SPECS, SlotState, resolve, unpack


@struct.dataclass
class KVCache:
    """Pages of all layers, `[num_layers * num_pages, KV groups, page_size, d]`, split over the groups; layer l's begin
    at l * num_pages. Donated to each step. Pages of fp8 hold K and V over `LlamaParams.kv_scales`.

    One array, not one per layer: the host's work at a step's start grows with its arguments, times the devices.
    """

    k: Any
    v: Any


CACHE_SPEC = P(None, AXIS)
CACHE_SPECS = KVCache(CACHE_SPEC, CACHE_SPEC)

# Traced once per shape and lowered once per module, instead of once per call: lowering a Mosaic kernel takes half a
# second, and 80 layers have hundreds of calls. Inlined, so that each call keeps its own op_name.
_STATIC = ("backend", "tuning", "expected_context")
_decode_attention = jax.jit(decode_attention, static_argnames=(*_STATIC, "sm_budget"), inline=True)
_prefill_attention = jax.jit(prefill_attention, static_argnames=_STATIC, inline=True)
_append_kv = jax.jit(append_kv, static_argnames=_STATIC[:2], inline=True)
_add_rms_norm = jax.jit(add_rms_norm, static_argnames=(*_STATIC[:2], "eps"), inline=True)
ATTENTION, MLP = 0, 1  # the norms of a layer
NO_PAGE = 2**30  # beyond every pool, and so is the sum with a layer's first page


def cache_shape(config: ModelConfig, devices: int, num_pages: int, page_size: int) -> tuple[int, int, int, int]:
    """Global shape of the K (or V) pages."""
    return config.num_layers * num_pages, llama.kv_groups(config, devices), page_size, config.head_dim


@dataclass(frozen=True)
class StepSpec:
    """Everything that a compiled step depends on, besides the arrays."""

    config: ModelConfig
    plan: SchedulePlan
    shape: StepShape
    attention_backend: str = "xla"  # of decode and prefill attention, and KV append, where they have it
    kv_cache_dtype: str = "auto"  # of the pages: `schedule.attention.KV_CACHE_DTYPES`
    enforce_order: bool = field(default=False)
    deterministic: bool = False  # sums over devices in a fixed order, wherever a row stands in the step
    rank_of: int | None = None  # the first rank's program of so many devices, on a mesh of one (collectives.rank_slice)
    gpu: str = DEFAULT_GPU  # whose tuning the kernels take; `build_step` puts the mesh's
    expected_context: int | None = None  # tokens of a row, for the kernels' expected times; None: the pool's share

    @property
    def page_dtype(self) -> Any:
        return page_dtype(self.config, self.kv_cache_dtype)


@struct.dataclass
class StepState:
    """All that a step takes over from the one before; donated to each step."""

    cache: KVCache
    slots: SlotState


def build_step(spec: StepSpec, mesh: Mesh, infos: LlamaParams, page_size: int) -> jax.stages.Wrapped:
    """The engine's step as a jitted function `(leaves, state, packed) -> (state, output)`, state donated.

    leaves  those of LlamaParams, as a tuple: a call takes hundreds of arrays, and walks a tree at ten times the cost
    packed  int32 vector, a packed `StepInputs` of `spec.shape`
    output  a `StepOutput`, the same on every device
    """
    state_specs = StepState(CACHE_SPECS, SLOT_SPECS)
    spec = replace(spec, gpu=tuned_gpu(mesh.devices.flat[0].device_kind))
    declared, tree = jax.tree.flatten(infos, is_leaf=is_info)

    def step(leaves: tuple[jax.Array, ...], state: StepState, packed: jax.Array) -> tuple[StepState, StepOutput]:
        with collectives.rank_slice(spec.rank_of):
            return _step(spec, page_size, jax.tree.unflatten(tree, leaves), state, packed)

    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(tuple(info.spec for info in declared), state_specs, P()),
        out_specs=(state_specs, P()),
        check_vma=False,
    )
    return jax.jit(sharded, donate_argnums=(1,))


def build_logits_step(spec: StepSpec, mesh: Mesh, infos: LlamaParams) -> jax.stages.Wrapped:
    """The layers alone: a jitted `(params, cache, batch) -> (cache, logits [T, vocabulary] float32)`, cache
    donated."""
    sharded = jax.shard_map(
        partial(_logits_step, spec),
        mesh=mesh,
        in_specs=(param_specs(infos), CACHE_SPECS, P()),
        out_specs=(CACHE_SPECS, P()),
        check_vma=False,
    )
    return jax.jit(sharded, donate_argnums=(1,))


def _step(
    spec: StepSpec, page_size: int, params: LlamaParams, state: StepState, packed: jax.Array
) -> tuple[StepState, StepOutput]:
    shape = spec.shape
    inputs = unpack(packed, shape)
    batch, slots = resolve(inputs, state.slots, shape, page_size)
    cache, hidden = _layers(spec, params, state.cache, batch)
    with jax.named_scope("HEAD.1"):
        local, first = _head(spec.config, params, hidden[batch.sampled])
    with jax.named_scope("SAMPLE.1"):
        sampled, slots = sample(local, first, inputs.sampling, slots)
        slots = replace(slots, tokens=slots.tokens.at[inputs.slots].set(sampled.tokens, mode="drop"))
    with jax.named_scope("SCORE.1"):
        scores = score_rows(
            partial(_head, spec.config, params), hidden[shape.decode_rows :], inputs.targets, inputs.target_logprobs[0]
        )
    return StepState(cache, slots), StepOutput(sampled, scores)


def _logits_step(spec: StepSpec, params: LlamaParams, cache: KVCache, batch: StepBatch) -> tuple[KVCache, jax.Array]:
    cache, hidden = _layers(spec, params, cache, batch)
    local, _ = _head(spec.config, params, hidden)
    gathered = collectives.all_gather(local)  # [p, T, V/p]
    return cache, gathered.transpose(1, 0, 2).reshape(hidden.shape[0], -1)[:, : spec.config.vocab_size]


def _layers(spec: StepSpec, params: LlamaParams, cache: KVCache, batch: StepBatch) -> tuple[KVCache, jax.Array]:
    """The cache with this step's keys and values, and the residual [T, H] after the last layer."""
    run = _StepRun(spec, params, cache, batch)
    for layer in range(spec.config.num_layers):
        run.layer(layer)
    hidden = run.hidden()
    return KVCache(run.k_pages, run.v_pages), hidden


def _head(config: ModelConfig, params: LlamaParams, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """hidden [n, H] -> this device's logits [n, V/p] float32 (padding -inf), and the vocabulary index of its first."""
    head = params.embedding if params.head is None else params.head
    normed = llama.rms_norm(hidden, params.final_norm, config.rms_norm_eps)
    local = llama.contract(normed, head, 1, out_dtype=jnp.float32)
    first = collectives.device_index() * head.shape[0]
    return jnp.where((first + jnp.arange(head.shape[0])) < config.vocab_size, local, -jnp.inf), first


class _StepRun:
    """The state of a step while it is traced: residual, normed input of the next GEMM, and pages.

    A collective's result is added to the residual by the op that reads it first (`_settle`), together with the norm.
    """

    def __init__(self, spec: StepSpec, params: LlamaParams, cache: KVCache, batch: StepBatch):
        self.config, self.shape = spec.config, spec.shape
        self.params, self.batch, self.lanes = params, batch, spec.plan.lanes
        self.k_pages, self.v_pages = cache.k, cache.v
        self.num_pages = cache.k.shape[0] // spec.config.num_layers  # of one layer
        self.devices = collectives.device_count()
        backends = KernelBackends.of(spec.attention_backend, cache.k.dtype, spec.config, self.devices)
        self.options = backends.options(
            spec.gpu, spec.expected_context or _expected_context(spec.shape, self.num_pages, cache.k.shape[2])
        )
        self.pieces = spec.plan.pieces(
            spec.shape.decode_rows, spec.shape.prefill_rows, quantum=row_quantum(self.devices)
        )
        self.nano_batches = {p.piece: p for p in self.pieces if p.op == "O"}
        self.writes, self.contexts = _kernel_inputs(self.pieces, batch, self.num_pages)
        self.scattered = {p.piece for p in self.pieces if p.op == "O.RS"}
        for number in self.scattered:
            if (rows := self.nano_batches[number].rows) % self.devices:
                raise ConfigError(
                    f"nano_batches[{number}]: {rows} rows cannot scatter over {self.devices} devices; "
                    "accepted: a multiple of them"
                )
        self.deferred = deferred_gathers(self.pieces)
        self.order = IssueOrder(spec.enforce_order)
        self.all_reduce = collectives.all_reduce_in_order if spec.deterministic else collectives.all_reduce
        self.cos, self.sin = llama.rope_tables(self.config.rope, self.config.head_dim, batch.positions)
        self.residual: dict[int, jax.Array] = {}  # nano-batch -> [n, H], or this device's rows [n/p, H] when scattered
        self.pending: dict[int, tuple[jax.Array, jax.Array | None]] = {}  # nano-batch -> collective's result, bias
        self.normed = Rows()  # [n, H]: the input of the next KQV or UG
        self._embed()

    def _embed(self) -> None:
        """Each device looks up the tokens of its vocabulary rows; the sum over devices, per nano-batch, is the
        embedding."""
        table = self.params.embedding
        for number, piece in self.nano_batches.items():
            with jax.named_scope(f"EMBED.{number}"):
                local = self.batch.token_ids[piece.start : piece.stop] - collectives.device_index() * table.shape[0]
                mine = (local >= 0) & (local < table.shape[0])
                x = jnp.where(mine[:, None], table[jnp.where(mine, local, 0)], jnp.zeros((), table.dtype))
            with jax.named_scope(f"EMBED.AR.{number}"):
                x = self.order.start(self.all_reduce, x)
            self.residual[number] = x
            if number in self.scattered:
                share = piece.rows // self.devices
                with jax.named_scope(f"EMBED.{number}"):
                    self.residual[number] = lax.dynamic_slice_in_dim(x, collectives.device_index() * share, share)
                    normed = self._norm(x, self._norm_weight(0, ATTENTION))
                self.normed.put(piece.start, piece.stop, normed)

    def _norm_weight(self, layer: int, which: int) -> jax.Array:
        """[H], of the norm ahead of attention or of the MLP. A static slice, which the norm's kernel reads in place."""
        norms = self.params.norms
        return lax.slice(norms, (layer, which, 0), (layer + 1, which + 1, norms.shape[2])).reshape(-1)

    def _norm(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        return llama.rms_norm(x, weight, self.config.rms_norm_eps)

    def _settle(self, number: int, norm_weight: jax.Array) -> jax.Array:
        """Adds what is pending to the residual of a nano-batch and returns the norm of the sum, in one ordered op."""
        x = self.residual[number]
        if number not in self.pending:
            return self.order.run(lambda x: self._norm(x, norm_weight), x)

        def add_and_norm(x: jax.Array, update: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            eps = self.config.rms_norm_eps
            return _add_rms_norm(x, update, norm_weight, bias=bias, eps=eps, **self.options.norm)

        self.residual[number], normed = self.order.run(add_and_norm, x, *self.pending.pop(number))
        return normed

    def layer(self, index: int) -> None:
        """Issues the pieces of one layer in the plan's order."""
        state = _LayerState(
            index, self.params.layers[index], jnp.int32(index * self.num_pages), _layer_scales(self.params, index)
        )
        for piece in self.pieces:
            with jax.named_scope(f"L{index}/{piece.name}"):
                getattr(self, _METHODS[piece.op])(piece, state)

    def hidden(self) -> jax.Array:
        """The residual of all rows after the last layer, [T, H]."""
        for number in sorted(self.pending):
            with jax.named_scope(f"HEAD.{number}"):
                x = self.order.run(_add, self.residual[number], *self.pending[number])
            with jax.named_scope(f"HEAD.AG.{number}"):
                self.residual[number] = collectives.all_gather_rows(x) if number in self.scattered else x
        parts = [self.residual[number] for number in sorted(self.nano_batches)]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    # -- attention

    def _kqv(self, piece: OpPiece, s: _LayerState) -> None:
        number = piece.nano_batch
        if number not in s.attention_normed and number not in self.scattered:
            rows = self.nano_batches[number]
            self.normed.put(rows.start, rows.stop, self._settle(number, self._norm_weight(s.index, ATTENTION)))
            s.attention_normed.add(number)
        rows = slice(piece.start, piece.stop)
        span, inputs = self.normed.get(piece.start, piece.stop)

        def project(*inputs: jax.Array) -> jax.Array:
            q, k, v = llama.kqv_projection(span(*inputs), s.params)
            cos, sin = self.cos[rows], self.sin[rows]
            q = llama.apply_rope(q, cos, sin).reshape(piece.rows, -1, self.config.head_dim)
            return pack_kqv(q, llama.apply_rope(k, cos, sin), v)

        kqv = self.order.run(project, *inputs)
        groups, rows_of_group, d, _ = s.params.kqv.shape
        view = partial(unpack_kqv, groups=groups, heads=groups * (rows_of_group - 2), d=d)
        s.q.put(piece.start, piece.stop, kqv, lambda kqv: view(kqv)[0])
        s.unwritten.append((piece, kqv, view))

    def _append(self, s: _LayerState) -> None:
        """Writes the keys and values that are not in the pages yet: ahead of the first op that reads any.

        Attention on a stream of its own reads the pages that are written in place here, so it is waited for first.
        """
        if not s.unwritten:
            return
        for piece, out in s.in_flight:
            s.attention.put(piece.start, piece.stop, self.order.wait(out))
        s.in_flight.clear()
        for piece, kqv, view in s.unwritten:

            def append(
                k_pages: jax.Array, v_pages: jax.Array, kqv: jax.Array, piece: OpPiece = piece, view: Any = view
            ) -> tuple[jax.Array, jax.Array]:
                return _append_kv(
                    k_pages, v_pages, *view(kqv)[1:], *self.writes[piece.piece],
                    first_page=s.first_page, **s.scales, **self.options.append,
                )  # fmt: skip

            with jax.named_scope(f"KV.APPEND.{piece.piece}"):
                self.k_pages, self.v_pages = self.order.run(append, self.k_pages, self.v_pages, kqv)
        s.unwritten.clear()

    def _gemv(self, piece: OpPiece, s: _LayerState) -> None:
        self._append(s)
        span, q = s.q.get(piece.start, piece.stop)

        # Only the Mosaic kernel has a lane: XLA's loop cannot leave SMs free, and a CPU has no streams.
        lane = self.lanes.get("GEMV") if self.options.decode["backend"] == "mosaic" else None
        sms = lane.sms if lane else None

        def attend(more: dict[str, jax.Array], k_pages: jax.Array, v_pages: jax.Array, *q: jax.Array) -> jax.Array:
            out, _ = _decode_attention(
                span(*q), k_pages, v_pages, **more, sm_budget=sms, **self.options.decode,
            )  # fmt: skip
            return out.reshape(piece.rows, -1)

        table, lengths = self.contexts[piece.piece]
        more = {"page_table": table, "lengths": lengths, "first_page": s.first_page, **s.scales}
        inputs = (self.k_pages, self.v_pages, *q)
        if lane:  # issued like a collective: what reads the result joins the streams
            beside = compute_on(
                attend, compute_type=f"gpu_stream:{lane.stream}", out_memory_spaces=jax.memory.Space.Device
            )
            # All that it reads is an input: a constant that is not could be as late as what needs the result, and with
            # it a start on another stream.
            out = self.order.beside(beside, more, *inputs)
            s.in_flight.append((piece, out))
        else:  # what no layer changes is not: XLA's attention computes with it, once for all layers
            out = self.order.run(partial(attend, more), *inputs)
        s.attention.put(piece.start, piece.stop, out)

    def _pf(self, piece: OpPiece, s: _LayerState) -> None:
        self._append(s)
        first = self.shape.decode_rows
        span, q = s.q.get(piece.start, piece.stop)

        def attend(k_pages: jax.Array, v_pages: jax.Array, *q: jax.Array) -> jax.Array:
            batch = self.batch
            starts, lengths = clip_segments(
                batch.prefill_starts, batch.prefill_lengths, piece.start - first, piece.stop - first
            )
            table = batch.prefill_table
            out = _prefill_attention(
                span(*q), k_pages, v_pages, table, starts, lengths,
                first_page=s.first_page, **s.scales, **self.options.prefill,
            )  # fmt: skip
            return out.reshape(piece.rows, -1)

        out = self.order.run(attend, self.k_pages, self.v_pages, *q)
        s.attention.put(piece.start, piece.stop, out)

    # -- attention output to residual

    def _gemv_ag(self, piece: OpPiece, s: _LayerState) -> None:
        # Transposed on the shard, the cheapest place: gathered along its leading axis it is [w, n], which O
        # contracts as it is.
        span, parts = s.attention.get(piece.start, piece.stop)
        local = self.order.run(lambda *parts: span(*parts).T, *parts)
        s.gathered[piece.piece] = self.order.start(collectives.all_gather_rows, local)

    def _o(self, piece: OpPiece, s: _LayerState) -> None:
        if piece.piece in s.gathered:

            def over_n(gathered: jax.Array) -> jax.Array:  # [w, n] x [H/p, w] -> [n, H/p]
                return llama.contract(gathered, s.params.o_rows, 0)

            s.projected[piece.piece] = self.order.run(over_n, s.gathered.pop(piece.piece))
        else:
            span, parts = s.attention.get(piece.start, piece.stop)

            def over_k(*parts: jax.Array) -> jax.Array:  # [n, w/p] x [H, w/p] -> partial sums [n, H]
                return llama.contract(span(*parts), s.params.o_columns, 1)

            s.projected[piece.piece] = self.order.run(over_k, *parts)

    def _o_ag(self, piece: OpPiece, s: _LayerState) -> None:
        if piece.piece in self.scattered:
            normed = self._settle(piece.piece, self._norm_weight(s.index, MLP))
            self.normed.put(piece.start, piece.stop, self.order.start(collectives.all_gather_rows, normed))
        else:  # [n, H/p] -> [p, n, H/p]
            gathered = self.order.start(collectives.all_gather, s.projected.pop(piece.piece))
            self.pending[piece.piece] = gathered, s.params.o_bias

    def _o_ar(self, piece: OpPiece, s: _LayerState) -> None:
        self._finish(self.all_reduce, piece, s, s.params.o_bias)

    def _o_rs(self, piece: OpPiece, s: _LayerState) -> None:
        self._finish(collectives.reduce_scatter_rows, piece, s, s.params.o_bias)

    def _finish(
        self, collective: Callable[[jax.Array], jax.Array], piece: OpPiece, s: _LayerState, bias: jax.Array | None
    ) -> None:
        """Starts the collective of O or D; its result is added when it is read."""
        self.pending[piece.piece] = self.order.start(collective, s.projected.pop(piece.piece)), bias

    # -- MLP

    def _ug(self, piece: OpPiece, s: _LayerState) -> None:
        if piece.piece not in self.scattered:
            self.normed.put(piece.start, piece.stop, self._settle(piece.piece, self._norm_weight(s.index, MLP)))
        span, inputs = self.normed.get(piece.start, piece.stop)
        s.activated[piece.piece] = self.order.run(lambda *x: llama.gated_mlp_up(span(*x), s.params), *inputs)

    def _d(self, piece: OpPiece, s: _LayerState) -> None:
        x = s.activated.pop(piece.piece)
        s.projected[piece.piece] = self.order.run(lambda x: llama.contract(x, s.params.down, 1), x)

    def _d_ar(self, piece: OpPiece, s: _LayerState) -> None:
        self._finish(self.all_reduce, piece, s, s.params.down_bias)

    def _d_rs(self, piece: OpPiece, s: _LayerState) -> None:
        self._finish(collectives.reduce_scatter_rows, piece, s, s.params.down_bias)

    def _d_ag(self, piece: OpPiece, s: _LayerState) -> None:
        """Gathers the normed input of the next KQV: the next layer's, or this one's when the plan puts it before
        KQV."""
        number = piece.piece
        layer = s.index + (number not in self.deferred)
        # The first layer's input comes whole from the embedding; what the last layer leaves is gathered in `hidden`.
        if number in self.pending and layer < self.config.num_layers:
            normed = self._settle(number, self._norm_weight(layer, ATTENTION))
            self.normed.put(piece.start, piece.stop, self.order.start(collectives.all_gather_rows, normed))


def _kernel_inputs(
    pieces: tuple[OpPiece, ...], batch: StepBatch, num_pages: int
) -> tuple[dict[int, tuple[jax.Array, jax.Array]], dict[int, tuple[jax.Array, jax.Array]]]:
    """Of each KQV piece where its K and V go, pages and slots [n]; of each GEMV piece its page table [n, M] and
    lengths [n]. No layer changes them.

    Computed, be it by a maximum that changes nothing: each is then an array of its own. A slice would be handed to the
    kernels as an address inside the whole, and rows begin at multiples of 32 bytes where the kernels need 256.
    """
    writes, contexts = {}, {}
    for piece in pieces:
        rows = slice(piece.start, piece.stop)
        if piece.op == "KQV":
            pages = batch.write_pages[rows]
            writes[piece.piece] = (
                jnp.where(pages < num_pages, pages, NO_PAGE),
                jnp.maximum(batch.write_slots[rows], 0),
            )
        elif piece.op == "GEMV":
            contexts[piece.piece] = (
                jnp.maximum(batch.decode_table[rows], 0),
                jnp.maximum(batch.decode_lengths[rows], 0),
            )
    return writes, contexts


def _expected_context(shape: StepShape, num_pages: int, page_size: int) -> int:
    """Tokens of context to expect of a row: what the pool gives each decode row, at most a whole page table."""
    shared = num_pages * page_size // max(shape.decode_rows, 1)
    return max(1, min(shared, shape.pages_per_request * page_size))


def pack_kqv(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """One after another in one vector, so that one kernel makes all three, and those that read them take their part in
    place."""
    return jnp.concatenate([x.reshape(-1) for x in (q, k, v)])


def unpack_kqv(packed: jax.Array, groups: int, heads: int, d: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [n, h, d], k and v [n, g, d]."""
    rows = packed.size // ((heads + 2 * groups) * d)
    first, second = rows * heads * d, rows * (heads + groups) * d
    q, k, v = packed[:first], packed[first:second], packed[second:]
    return q.reshape(rows, heads, d), k.reshape(rows, groups, d), v.reshape(rows, groups, d)


def _layer_scales(params: LlamaParams, index: int) -> dict[str, jax.Array]:
    scales = params.kv_scales
    return {} if scales is None else {"k_scale": scales[0, index], "v_scale": scales[1, index]}


def _add(x: jax.Array, update: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Residual [n, H] + update [n, H], or gathered columns [p, n, H/p], + bias [H]."""
    if update.ndim == 3:
        update = update.transpose(1, 0, 2).reshape(x.shape)
    return x + update if bias is None else x + update + bias[None, :]


@dataclass
class _LayerState:
    """Values of one layer on their way from op to op, by rows or by nano-batch."""

    index: int
    params: LayerParams
    first_page: jax.Array  # [] int32: where its pages begin
    scales: dict[str, jax.Array]  # k_scale and v_scale [g] float32 of fp8 pages; of others none
    attention_normed: set[int] = field(default_factory=set)  # nano-batches whose KQV input is normed
    unwritten: list[tuple[OpPiece, jax.Array, Any]] = field(default_factory=list)  # packed, with K and V not in pages
    in_flight: list[tuple[OpPiece, jax.Array]] = field(default_factory=list)  # attention on another stream
    q: Rows = field(default_factory=Rows)  # [n, h, d], views of what `pack_kqv` packed
    attention: Rows = field(default_factory=Rows)  # [n, h * d]
    gathered: dict[int, jax.Array] = field(default_factory=dict)  # [w, n]
    projected: dict[int, jax.Array] = field(default_factory=dict)  # O or D before its collective
    activated: dict[int, jax.Array] = field(default_factory=dict)  # [n, F/p]


_METHODS = {
    "KQV": "_kqv",
    "GEMV": "_gemv",
    "PF": "_pf",
    "GEMV.AG": "_gemv_ag",
    "O": "_o",
    "O.AG": "_o_ag",
    "O.AR": "_o_ar",
    "O.RS": "_o_rs",
    "UG": "_ug",
    "D": "_d",
    "D.AR": "_d_ar",
    "D.RS": "_d_rs",
    "D.AG": "_d_ag",
}


def clip_segments(starts: jax.Array, lengths: jax.Array, first: int, last: int) -> tuple[jax.Array, jax.Array]:
    """Segments restricted to prefill rows [first, last): their row starts there, and each one's context after its
    last row there."""
    clipped = jnp.clip(starts, first, last)
    cut_off = starts[1:] - clipped[1:]  # rows of the segment past `last`
    return clipped - first, jnp.maximum(lengths - jnp.maximum(cut_off, 0), 0)
