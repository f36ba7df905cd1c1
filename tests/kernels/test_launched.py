"""What attention and KV append launch in a compiled program of several layers, besides themselves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import prefill_attention
from kernels_pallas.bench.cases import RANK_70B, WHOLE_8B, Model
from tests.kernels.compiled import compiled, launched


@pytest.mark.aot
@pytest.mark.parametrize("model", [RANK_70B, WHOLE_8B])
def test_layers_share_the_list_of_prefill_tiles(model: Model) -> None:
    """The list depends on the batch, not on the layer: another layer adds its attention and nothing else."""
    layers, rows, segments, pages = 2, 768, 48, 2000

    def step(k: Any, v: Any, table: Any, starts: Any, lengths: Any, *queries: jax.Array) -> list[jax.Array]:
        return [
            prefill_attention(q, k, v, table, starts, lengths, first_page=jnp.int32(500 * layer), backend="mosaic")
            for layer, q in enumerate(queries)
        ]

    pool = jax.ShapeDtypeStruct((pages, model.kv_heads, 64, model.head_dim), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((rows, model.q_heads, model.head_dim), jnp.bfloat16)
    integers = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((segments, 16), (segments + 1,), (segments,))]
    whole = launched(compiled("h200", step, [pool, pool, *integers, *[q] * layers]))
    assert whole[-layers:] == ["prefill_attention"] * layers
    assert "prefill_attention" not in whole[:-layers]
    assert len(whole[:-layers]) == 5  # of one list
