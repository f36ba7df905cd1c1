"""Every weight of a model as `ParamInfo`: its shape on any mesh, and how it is read from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from nanoflow_jax.config import Layer, Layouts, ModelConfig
from nanoflow_jax.models.expert_infos import expert_infos
from nanoflow_jax.models.fp8_formats import WeightScale
from nanoflow_jax.models.kv_scales import kv_scales_info
from nanoflow_jax.models.layout import LayerParams, ModelParams, kv_groups, padded_vocab
from nanoflow_jax.models.params import Index, ParamInfo, ReadSlice, Source
from nanoflow_jax.models.quantised import quantised_info
from nanoflow_jax.models.stored_fp8 import stored_info
from nanoflow_jax.parallel.mesh import AXIS

# Hugging Face's names, in the order in which a layer meets them. One of them has two meanings.
_NORMS = {
    "before": ("input_layernorm", "post_attention_layernorm"),
    "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "both": (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    ),
}  # fmt: skip


def param_infos(
    config: ModelConfig,
    devices: int,
    layouts: Layouts = Layouts(),  # noqa: B008
    *,
    dtype: Any = None,
    kv_scales: Mapping[str, tuple[int, ...]] | None = None,
    weight_scales: Mapping[str, WeightScale] | None = None,
) -> ModelParams:
    """Declares every weight for a mesh of `devices`.

    layouts                  which weights the plan needs (`SchedulePlan.layouts`)
    kv_scales                with fp8 pages, the checkpoint's scales (`kv_scales.find_kv_scales`), which may be none
    weight_scales            of an fp8 checkpoint that is to be loaded (`fp8_formats.find_weight_scales`)
    """
    dtype = jnp.dtype(dtype or config.dtype)
    norm_dtype = jnp.dtype(jnp.float32) if config.norm_offset else dtype  # of what was added, no bit is lost
    H, d = config.hidden_size, config.head_dim
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

    def gate_up(prefix: str, F: int, kind: str) -> ParamInfo:
        tail = (H,) if kind == "weight" else ()
        names = [f"{prefix}.{part}_proj.{kind}" for part in ("gate", "up")]

        def read(read_slice: ReadSlice, index: Index) -> np.ndarray:
            return np.stack([read_slice(name, index[1:]) for name in names[index[0]]])

        init = "normal" if kind == "weight" else "zeros"
        return ParamInfo((2, F, *tail), dtype, P(None, AXIS), init, tuple(Source(n, (F, *tail)) for n in names), read)

    def offset(weight: np.ndarray) -> np.ndarray:
        return weight.astype(np.float32) + np.float32(config.norm_offset) if config.norm_offset else weight

    def final_norm() -> ParamInfo:
        source = Source("model.norm.weight", (H,))
        return ParamInfo((H,), norm_dtype, P(), "ones", (source,), lambda read, at: offset(read(source.name, at)))

    def layer_norms(kinds: tuple[str, ...], size: int) -> ParamInfo:
        names = [[f"model.layers.{i}.{kind}.weight" for kind in kinds] for i in range(config.num_layers)]

        def read(read_slice: ReadSlice, index: Index) -> np.ndarray:
            return offset(
                np.stack([[read_slice(name, index[2:]) for name in some[index[1]]] for some in names[index[0]]])
            )

        sources = tuple(Source(name, (size,)) for some in names for name in some)
        return ParamInfo((config.num_layers, len(kinds), size), norm_dtype, P(), "ones", sources, read)

    def projection_norms() -> ParamInfo:
        kinds, sizes = ("q_norm", "k_norm"), (width, config.num_kv_heads * d)
        names = [[f"model.layers.{i}.self_attn.{kind}.weight" for kind in kinds] for i in range(config.num_layers)]
        sources = tuple(Source(name, (size,)) for pair in names for name, size in zip(pair, sizes, strict=True))

        def read(read_slice: ReadSlice, index: Index) -> np.ndarray:
            return np.stack([_read_kqv(read_slice, pair, config, groups, index[1:]) for pair in names[index[0]]])

        shape = (config.num_layers, groups, rows - 1, d)
        return ParamInfo(shape, dtype, P(None, AXIS), "ones", sources, read)

    def qk_norms() -> ParamInfo | None:
        if config.qk_norm == "head":
            return layer_norms(("self_attn.q_norm", "self_attn.k_norm"), d)
        return None if config.qk_norm is None else projection_norms()

    def sinks(prefix: str) -> ParamInfo:
        name, shape = f"{prefix}.self_attn.sinks", (groups, config.num_heads // groups)

        def read(read_slice: ReadSlice, index: Index) -> np.ndarray:
            start, stop = _bounds(index[0], groups)
            return read_slice(name, (slice(start * shape[1], stop * shape[1]),)).reshape(-1, shape[1])[:, index[1]]

        source = Source(name, (config.num_heads,))
        return ParamInfo(shape, jnp.dtype(jnp.float32), P(AXIS), "zeros", (source,), read)

    def gemm(info: ParamInfo) -> Any:
        if weight_scales is not None:
            return stored_info(info, weight_scales, config)
        bound = config.fp8_checkpoint and config.fp8_checkpoint.activation_bound
        return info if config.quantization is None else quantised_info(info, bound)

    def layer(i: int, kind: Layer) -> LayerParams:
        attention, mlp = kind.attention, kind.mlp
        prefix = f"model.layers.{i}"
        o, F = f"{prefix}.self_attn.o_proj", config.dense_size(mlp)
        dense = f"{prefix}.mlp" if mlp.experts is None else f"{prefix}.mlp.shared_expert"
        bias = mlp.bias and F > 0
        return LayerParams(
            kqv=gemm(kqv(prefix, "weight")),
            kqv_bias=kqv(prefix, "bias") if attention.qkv_bias else None,
            o_by_output=gemm(plain(f"{o}.weight", (H, width), P(AXIS, None))) if layouts.o_by_output else None,
            o_by_input=gemm(plain(f"{o}.weight", (H, width), P(None, AXIS))) if layouts.o_by_input else None,
            o_bias=plain(f"{o}.bias", (H,), P(), "zeros") if attention.o_bias else None,
            ug=gemm(gate_up(dense, F, "weight")) if F else None,
            ug_bias=gate_up(dense, F, "bias") if bias else None,
            down=gemm(plain(f"{dense}.down_proj.weight", (H, F), P(None, AXIS))) if F else None,
            down_bias=plain(f"{dense}.down_proj.bias", (H,), P(), "zeros") if bias else None,
            sinks=sinks(prefix) if attention.sinks else None,
            experts=None if mlp.experts is None else expert_infos(config, mlp, prefix, layouts.expert_parallel, dtype),
        )

    return ModelParams(
        embedding=vocab_rows("model.embed_tokens.weight"),
        norms=layer_norms(_NORMS[config.norms], H),
        layers=tuple(layer(i, kind) for i, kind in enumerate(config.layers)),
        final_norm=final_norm(),
        head=None if config.tie_word_embeddings else vocab_rows("lm_head.weight"),
        qk_norms=qk_norms(),
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
    """Groups [start, stop) of the fused weight, from separate tensors of q, k and v, or q and k; the other dimensions
    must be whole."""
    d, q_heads, replicas = config.head_dim, config.num_heads // groups, groups // config.num_kv_heads
    start, stop = _bounds(index[0], groups)
    rest = index[3:]

    def heads(name: str, first: int, last: int) -> np.ndarray:
        part = read_slice(name, (slice(first * d, last * d), *rest))
        return part.reshape(last - first, d, *part.shape[1:])

    q = heads(names[0], start * q_heads, stop * q_heads)
    kv_start, kv_stop = start // replicas, (stop - 1) // replicas + 1
    owner = np.arange(start, stop) // replicas - kv_start  # group -> its KV head among those read
    others = [heads(name, kv_start, kv_stop)[owner][:, None] for name in names[1:]]
    return np.concatenate([q.reshape(stop - start, q_heads, *q.shape[1:]), *others], axis=1)
