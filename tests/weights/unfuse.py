"""What the tests of this folder share: loaded weights back under their Hugging Face names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from nanoflow_jax.config import ModelConfig
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.layout import ModelParams
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.parallel.mesh import make_mesh
from nanoflow_jax.weights import load_params

MESH_SIZES = (1, 2, 4, 8)


def load(folder: Path, devices: int, dtype: str = "float32", **options: Any) -> tuple[ModelConfig, Mesh, ModelParams]:
    config = read_config(folder / "config.json")
    mesh = make_mesh(config, devices)
    return config, mesh, load_params(folder, config, mesh, param_infos(config, devices, dtype=dtype), **options)


def hugging_face_tensors(params: ModelParams, config: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors in float32; checks that padding is zero, and that KV replicas and both layouts of O are equal."""

    def host(array: Any) -> np.ndarray:
        return np.asarray(array).astype(np.float32)

    def vocabulary(array: Any) -> np.ndarray:
        whole = host(array)
        assert not whole[config.vocab_size :].any()
        return whole[: config.vocab_size]

    tensors = {
        "model.embed_tokens.weight": vocabulary(params.embedding),
        "model.norm.weight": host(params.final_norm),
    }
    if params.head is not None:
        tensors["lm_head.weight"] = vocabulary(params.head)
    for i, layer in enumerate(params.layers):
        prefix = f"model.layers.{i}"
        tensors[f"{prefix}.input_layernorm.weight"] = host(params.norms)[i, 0]
        tensors[f"{prefix}.post_attention_layernorm.weight"] = host(params.norms)[i, 1]
        np.testing.assert_array_equal(host(layer.o_by_output), host(layer.o_by_input))
        tensors[f"{prefix}.self_attn.o_proj.weight"] = host(layer.o_by_input)
        tensors[f"{prefix}.mlp.down_proj.weight"] = host(layer.down)
        for kind, kqv, ug in (("weight", layer.kqv, layer.ug), ("bias", layer.kqv_bias, layer.ug_bias)):
            if kqv is not None:
                for part, values in zip("qkv", _split_kqv(host(kqv), config), strict=True):
                    tensors[f"{prefix}.self_attn.{part}_proj.{kind}"] = values
            if ug is not None:
                tensors[f"{prefix}.mlp.gate_proj.{kind}"], tensors[f"{prefix}.mlp.up_proj.{kind}"] = host(ug)
        for name, bias in (("self_attn.o_proj", layer.o_bias), ("mlp.down_proj", layer.down_bias)):
            if bias is not None:
                tensors[f"{prefix}.{name}.bias"] = host(bias)
    return tensors


def _split_kqv(kqv: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[G, r + 2, d, ...] -> q [heads * d, ...], k and v [KV heads * d, ...]."""
    tail = kqv.shape[3:]
    replicas = len(kqv) // config.num_kv_heads
    kv = kqv[:, -2:].reshape(config.num_kv_heads, replicas, *kqv[:, -2:].shape[1:])
    np.testing.assert_array_equal(kv, np.broadcast_to(kv[:, :1], kv.shape))
    q = kqv[:, :-2].reshape(config.num_heads * config.head_dim, *tail)
    k, v = (kv[:, 0, i].reshape(config.num_kv_heads * config.head_dim, *tail) for i in range(2))
    return q, k, v


def assert_same_tensors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
