"""LLaMA 2 / 3 / 3.1 / 3.2 / 3.3: its weights as `ParamInfo`, and the maths of a layer on local shards.

Weights keep Hugging Face's [out, in] order, so that every GEMM contracts the last dimension of both operands and
loading never transposes. Fused weights are laid out so that a contiguous shard is what one device needs, whatever
the mesh size: KQV groups each KV head with the query heads it serves; UG keeps gate and up on a leading axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec as P

from nanoflow_jax.config import ModelConfig, RopeConfig
from nanoflow_jax.models.kv_scales import kv_scales_info
from nanoflow_jax.models.params import Index, ParamInfo, ReadSlice, Source
from nanoflow_jax.parallel.mesh import AXIS

VOCAB_MULTIPLE = 8  # a device's share of the vocabulary is a multiple of this, for aligned GEMMs


@struct.dataclass
class LayerParams:
    """One decoder layer. G: KV groups (KV heads, replicated up to the mesh size); r: query heads per group; d: head
    size.

    `o_rows` and `o_columns` are the same matrix split over its outputs (N) and over its inputs (K); a plan that
    needs one layout only has None for the other.
    """

    kqv: Any  # [G, r + 2, d, H]: per group the query heads, then K, then V
    kqv_bias: Any  # [G, r + 2, d] or None
    o_rows: Any  # [H, heads * d] split over H, for O split over N
    o_columns: Any  # [H, heads * d] split over heads, for O split over K
    o_bias: Any  # [H] or None
    ug: Any  # [2, F, H]: gate, up
    ug_bias: Any  # [2, F] or None
    down: Any  # [H, F]
    down_bias: Any  # [H] or None


@struct.dataclass
class LlamaParams:
    """All weights. L: layers; V: vocabulary padded to the mesh.

    The layers' norms are one array: a step's start costs the host time for every argument.
    """

    embedding: Any  # [V, H] split over V
    norms: Any  # [L, 2, H]: ahead of attention, ahead of the MLP
    layers: tuple[LayerParams, ...]
    final_norm: Any  # [H]
    head: Any  # [V, H] split over V; None when tied to the embedding
    kv_scales: Any = None  # [2 (K, V), layers, G] float32 split over G, of fp8 pages; None without


def kv_groups(config: ModelConfig, devices: int) -> int:
    """Number of KV groups: the KV heads, or the mesh size when there are fewer of them (each is then replicated)."""
    return max(config.num_kv_heads, devices)


def padded_vocab(config: ModelConfig, devices: int) -> int:
    multiple = VOCAB_MULTIPLE * devices
    return -(-config.vocab_size // multiple) * multiple


def param_infos(
    config: ModelConfig,
    devices: int,
    *,
    o_rows: bool = True,
    o_columns: bool = True,
    dtype: Any = None,
    kv_scales: Mapping[str, tuple[int, ...]] | None = None,
) -> LlamaParams:
    """Declares every weight for a mesh of `devices`.

    o_rows, o_columns  which layouts of O the plan needs
    kv_scales          with fp8 pages, the checkpoint's scales (`kv_scales.find_kv_scales`), which may be none
    """
    dtype = jnp.dtype(dtype or config.dtype)
    H, F, d = config.hidden_size, config.intermediate_size, config.head_dim
    width = config.num_heads * d
    groups, vocab = kv_groups(config, devices), padded_vocab(config, devices)
    rows = config.num_heads // groups + 2

    def plain(name: str, shape: tuple[int, ...], spec: P, init: str = "normal") -> ParamInfo:
        return ParamInfo(shape, dtype, spec, init, (Source(name, shape),), lambda read, index: read(name, index))

    def vocab_rows(name: str) -> ParamInfo:
        real = (config.vocab_size, H)

        def read(read_slice: ReadSlice, index: Index) -> np.ndarray:
            return _read_padded(read_slice, name, config.vocab_size, vocab, index)

        return ParamInfo((vocab, H), dtype, P(AXIS, None), "normal", (Source(name, real),), read)

    def kqv(prefix: str, kind: str) -> ParamInfo:
        tail = (H,) if kind == "weight" else ()
        names = [f"{prefix}.self_attn.{part}_proj.{kind}" for part in "qkv"]
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        sources = tuple(Source(name, (n * d, *tail)) for name, n in zip(names, heads, strict=True))

        def read(read_slice: ReadSlice, index: Index) -> np.ndarray:
            return _read_kqv(read_slice, names, config, groups, index)

        init = "normal" if kind == "weight" else "zeros"
        return ParamInfo((groups, rows, d, *tail), dtype, P(AXIS), init, sources, read)

    def gate_up(prefix: str, kind: str) -> ParamInfo:
        tail = (H,) if kind == "weight" else ()
        names = [f"{prefix}.mlp.{part}_proj.{kind}" for part in ("gate", "up")]

        def read(read_slice: ReadSlice, index: Index) -> np.ndarray:
            return np.stack([read_slice(name, index[1:]) for name in names[index[0]]])

        init = "normal" if kind == "weight" else "zeros"
        return ParamInfo((2, F, *tail), dtype, P(None, AXIS), init, tuple(Source(n, (F, *tail)) for n in names), read)

    def layer_norms() -> ParamInfo:
        kinds = ("input_layernorm", "post_attention_layernorm")
        names = [[f"model.layers.{i}.{kind}.weight" for kind in kinds] for i in range(config.num_layers)]

        def read(read_slice: ReadSlice, index: Index) -> np.ndarray:
            return np.stack([[read_slice(name, index[2:]) for name in pair[index[1]]] for pair in names[index[0]]])

        sources = tuple(Source(name, (H,)) for pair in names for name in pair)
        return ParamInfo((config.num_layers, 2, H), dtype, P(), "ones", sources, read)

    def layer(i: int) -> LayerParams:
        prefix = f"model.layers.{i}"
        o, down = f"{prefix}.self_attn.o_proj", f"{prefix}.mlp.down_proj"
        return LayerParams(
            kqv=kqv(prefix, "weight"),
            kqv_bias=kqv(prefix, "bias") if config.attention_bias else None,
            o_rows=plain(f"{o}.weight", (H, width), P(AXIS, None)) if o_rows else None,
            o_columns=plain(f"{o}.weight", (H, width), P(None, AXIS)) if o_columns else None,
            o_bias=plain(f"{o}.bias", (H,), P(), "zeros") if config.attention_bias else None,
            ug=gate_up(prefix, "weight"),
            ug_bias=gate_up(prefix, "bias") if config.mlp_bias else None,
            down=plain(f"{down}.weight", (H, F), P(None, AXIS)),
            down_bias=plain(f"{down}.bias", (H,), P(), "zeros") if config.mlp_bias else None,
        )

    return LlamaParams(
        embedding=vocab_rows("model.embed_tokens.weight"),
        norms=layer_norms(),
        layers=tuple(layer(i) for i in range(config.num_layers)),
        final_norm=plain("model.norm.weight", (H,), P(), "ones"),
        head=None if config.tie_word_embeddings else vocab_rows("lm_head.weight"),
        kv_scales=None if kv_scales is None else kv_scales_info(config, groups, kv_scales),
    )


def _bounds(index: slice, size: int) -> tuple[int, int]:
    start, stop, _ = index.indices(size)
    return start, stop


def _read_padded(read_slice: ReadSlice, name: str, rows: int, padded_rows: int, index: Index) -> np.ndarray:
    """Rows past the real vocabulary are zero."""
    start, stop = _bounds(index[0], padded_rows)
    real = read_slice(name, (slice(min(start, rows), min(stop, rows)), *index[1:]))
    if stop <= rows:
        return real
    return np.concatenate([real, np.zeros((stop - max(start, rows), *real.shape[1:]), real.dtype)])


def _read_kqv(read_slice: ReadSlice, names: list[str], config: ModelConfig, groups: int, index: Index) -> np.ndarray:
    """Groups [start, stop) of the fused weight, from separate q, k, v tensors; the other dimensions must be whole."""
    d, q_heads, replicas = config.head_dim, config.num_heads // groups, groups // config.num_kv_heads
    start, stop = _bounds(index[0], groups)
    rest = index[3:]

    def heads(name: str, first: int, last: int) -> np.ndarray:
        part = read_slice(name, (slice(first * d, last * d), *rest))
        return part.reshape(last - first, d, *part.shape[1:])

    q = heads(names[0], start * q_heads, stop * q_heads)
    kv_start, kv_stop = start // replicas, (stop - 1) // replicas + 1
    owner = np.arange(start, stop) // replicas - kv_start  # group -> its KV head among those read
    k, v = (heads(name, kv_start, kv_stop)[owner] for name in names[1:])
    return np.concatenate([q.reshape(stop - start, q_heads, *q.shape[1:]), k[:, None], v[:, None]], axis=1)


# ---- the maths of a layer, on local shards
# ------------------------------------------------------------------------------


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [n, H] -> [n, H]; statistics in float32, as Hugging Face does."""
    x32 = x.astype(jnp.float32)
    normed = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight[None, :]


def contract(x: jax.Array, weight: jax.Array, axis: int, out_dtype: Any = None) -> jax.Array:
    """GEMM of x [n, K] (axis 1) or [K, n] (axis 0) with weight [N, K] -> [n, N]. float32 is computed in full
    precision everywhere."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x, weight, (((axis,), (1,)), ((), ())), precision=precision, preferred_element_type=out_dtype or x.dtype
    )


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """x [n, K], weight [N, K], bias [N] or None -> [n, N]."""
    out = contract(x, weight, 1)
    return out if bias is None else out + bias[None, :]


def kqv_projection(x: jax.Array, layer: LayerParams) -> tuple[jax.Array, jax.Array, jax.Array]:
    """KQV: x [n, H] -> q [n, g, r, d], k [n, g, d], v [n, g, d] of this device's g groups."""
    groups, rows, d, hidden = layer.kqv.shape
    bias = None if layer.kqv_bias is None else layer.kqv_bias.reshape(-1)
    fused = linear(x, layer.kqv.reshape(groups * rows * d, hidden), bias).reshape(-1, groups, rows, d)
    return fused[:, :, : rows - 2], fused[:, :, rows - 2], fused[:, :, rows - 1]


def gated_mlp_up(x: jax.Array, layer: LayerParams) -> jax.Array:
    """UG: x [n, H] -> SiLU(gate) * up, [n, f] of this device's f columns."""
    _, f, hidden = layer.ug.shape
    bias = None if layer.ug_bias is None else layer.ug_bias.reshape(-1)
    both = linear(x, layer.ug.reshape(2 * f, hidden), bias)
    return jax.nn.silu(both[:, :f]) * both[:, f:]


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Inverse frequencies [head_dim / 2], float32.

    llama3: long wavelengths are divided by `factor`, short ones kept, those between interpolated (Llama 3.1 model
    card).
    """
    inv = 1.0 / (rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))
    if rope.kind == "linear":
        inv = inv / rope.factor
    elif rope.kind == "llama3":
        wavelength = 2 * math.pi / inv
        ratio = rope.original_max_position_embeddings / wavelength
        smooth = (ratio - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        inv = (1 - smooth) * inv / rope.factor + smooth * inv
    return inv.astype(np.float32)


def rope_tables(rope: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos, sin [n, head_dim / 2] float32 for positions [n]."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(rope_frequencies(rope, head_dim))[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns pairs (i, i + d/2) of x [n, ..., d] by tables [n, d/2]; computed in float32, returned in x's dtype."""
    half = x.shape[-1] // 2
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (half,)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
