"""The same kernel is the same program, however many were lowered before it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import core
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import append_kv
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.gpu_target import gpu_mesh

pytestmark = pytest.mark.aot


def lowered_text() -> str:
    mesh = gpu_mesh(load_hardware("h200"), 1)
    pool, rows, index = (((512, 1, 64, 128), jnp.bfloat16), ((48, 1, 128), jnp.bfloat16), ((48,), jnp.int32))
    shapes = [
        jax.ShapeDtypeStruct(*x, sharding=NamedSharding(mesh, P())) for x in (pool, pool, rows, rows, index, index)
    ]
    append = jax.shard_map(
        partial(append_kv, backend="mosaic"), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    return jax.jit(append).lower(*shapes).as_text()


def test_lowered_twice_it_is_the_same() -> None:
    assert lowered_text() == lowered_text()


def test_jax_alone_numbers_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once this fails, `kernel_names` can go."""
    dialect: Any = vars(core)["dialect"]
    monkeypatch.setattr(dialect, "get_or_set_dump_options", dialect.get_or_set_dump_options.__wrapped__)
    assert lowered_text() != lowered_text()


def test_files_of_dumps_keep_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSAIC_GPU_DUMP_RESOURCES", "1")
    assert lowered_text() != lowered_text()
