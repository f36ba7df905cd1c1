"""Random weights are made on the devices, where their declaration says, and are those of a usual initialisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nanoflow_jax.config import Layouts
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.layout import ModelParams, kv_groups, padded_vocab
from nanoflow_jax.models.params import ParamInfo, abstract_params, is_info, random_params
from nanoflow_jax.models.registry import parse_config
from nanoflow_jax.parallel.mesh import make_mesh

CONFIG = parse_config(
    {
        "vocab_size": 1001,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "attention_bias": True,
        "mlp_bias": True,
        "dtype": "float32",
    }
)


@pytest.fixture(scope="module")
def made() -> tuple[Mesh, ModelParams, ModelParams]:
    """(mesh of 8, declarations, random weights)"""
    mesh = make_mesh(CONFIG, 8)
    infos = param_infos(CONFIG, 8)
    return mesh, infos, random_params(infos, mesh)


def pairs(infos: ModelParams, params: ModelParams) -> list[tuple[ParamInfo, jax.Array]]:
    return list(zip(jax.tree.leaves(infos, is_leaf=is_info), jax.tree.leaves(params), strict=True))


def test_shapes_and_shardings_are_those_declared(made: tuple[Mesh, ModelParams, ModelParams]) -> None:
    """Each device holds its shard and nothing else; KV heads are replicated to 8 groups, the vocabulary is padded."""
    mesh, infos, params = made
    split = 0
    for info, array in pairs(infos, params):
        assert array.shape == info.shape
        assert array.dtype == info.dtype
        assert array.sharding.is_equivalent_to(info.sharding(mesh), array.ndim)
        assert {s.data.size for s in array.addressable_shards} == {array.size if info.spec == P() else array.size // 8}
        assert info.nbytes == array.nbytes
        split += info.spec != P()
    assert split == 2 + 2 * 7  # embedding, head; per layer KQV and its bias, O twice, UG and its bias, D
    assert params.layers[0].kqv.shape == (kv_groups(CONFIG, 8), 3, 32, 128) == (8, 3, 32, 128)
    assert params.embedding.shape == (padded_vocab(CONFIG, 8), 128) == (1024, 128)
    abstract = jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), abstract_params(infos, mesh))
    assert jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), params) == abstract


def test_scale(made: tuple[Mesh, ModelParams, ModelParams]) -> None:
    """Normal with a variance of 1 / fan-in, norms one, biases zero; no weight or shard is a copy of another, but
    for the two layouts of O, which are one matrix."""
    _, infos, params = made
    for layer in params.layers:
        np.testing.assert_array_equal(layer.o_by_output, layer.o_by_input)
    seen: set[bytes] = set()
    for info, array in pairs(infos, params):
        values, name = np.asarray(array), info.sources[0].name
        if "norm" in name:
            assert (values == 1).all(), name
        elif name.endswith("bias"):
            assert (values == 0).all(), name
        else:
            unit = values * np.sqrt(values.shape[-1])
            assert abs(unit.std() - 1) < 0.03, f"{name}: {unit.std()}"
            assert abs(unit.mean()) < 0.03, name
            assert 3 < abs(unit).max() < 7, name
            if info.spec != P() and info not in [layer.o_by_input for layer in infos.layers]:
                for shard in array.addressable_shards:
                    start = np.asarray(shard.data).ravel()[:16].tobytes()
                    assert start not in seen, f"{name}: a shard's values are seen twice"
                    seen.add(start)


def test_deterministic(made: tuple[Mesh, ModelParams, ModelParams]) -> None:
    """The seed decides: the same again, the same on 4 devices where the shape is; other with another seed."""
    mesh, infos, _ = made
    some = (infos.layers[0].down, infos.layers[1].down)
    first, again, other = (random_params(some, mesh, seed) for seed in (7, 7, 8))
    four = random_params(tuple(layer.down for layer in param_infos(CONFIG, 4).layers), make_mesh(CONFIG, 4), 7)
    jax.tree.map(np.testing.assert_array_equal, again, first)
    jax.tree.map(np.testing.assert_array_equal, four, first)
    assert not any((np.asarray(a) == np.asarray(b)).any() for a, b in zip(other, first, strict=True))


def test_declarations_for_a_plan() -> None:
    """Only what the plan and the model need: layouts of O, head, biases; in the dtype asked for."""
    infos = param_infos(CONFIG, 2, Layouts(o_by_output=False), dtype="bfloat16")
    assert infos.layers[0].o_by_output is None
    assert infos.layers[0].o_by_input is not None
    assert {info.dtype for info in jax.tree.leaves(infos, is_leaf=is_info)} == {jnp.dtype(jnp.bfloat16)}
    assert param_infos(CONFIG, 2, Layouts(o_by_input=False)).layers[0].o_by_input is None
    plain = parse_config(
        {
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 8,
            "tie_word_embeddings": True,
        }
    )
    tied = param_infos(plain, 8, Layouts(o_by_input=False))
    assert tied.head is None
    assert (
        tied.layers[0].kqv_bias is tied.layers[0].o_bias is tied.layers[0].ug_bias is tied.layers[0].down_bias is None
    )
    # Every weight of the model is declared once, but for padding: none here, with 96 = 12 * 8 rows padded to 128.
    total = sum(info.nbytes // 2 for info in jax.tree.leaves(tied, is_leaf=is_info))
    assert total == plain.num_params + (128 - 96) * 64
